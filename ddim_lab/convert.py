"""`python -m ddim_lab.convert FILE OUT`: a checkpoint of another code base as a folder in diffusers' format.

FILE is of the DDIM authors' code or of OpenAI's improved-diffusion or guided-diffusion; OUT is made, and read by
model=pretrained model.path=OUT, which gives the same images as FILE itself by model=official or model=adm. Diffusers'
own pipelines load it, too, but sample only from networks without classes that give eps alone.
"""

from __future__ import annotations

import argparse
import re
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn, final

from ddim_lab.config.job import Config
from ddim_lab.config.model import AdmConfig, OfficialConfig
from ddim_lab.config.options import path_argument
from ddim_lab.config.schedule import ScheduleConfig
from ddim_lab.errors import ConfigError, exit_status
from ddim_lab.jobs.compose import compose, composer, quoted
from ddim_lab.store import write_json
from ddim_lab.store.files import sync_folder, sync_tree

if TYPE_CHECKING:
    from ddim_lab.models.foreign.converted import Converted

__all__ = ["main", "write_folder"]

_KINDS: Final = {"ddim": "official", "adm": "adm"}
"""Code bases by --family, and what conf/model calls them."""


def write_folder(
    out: Path, options: OfficialConfig | AdmConfig, size: tuple[int, int] | None, schedule: ScheduleConfig
) -> str:
    """Write a checkpoint's file as a diffusers pipeline: whole, or not at all.

    Args:
        out: the folder, which must not be there.
        options: the file.
        size: height and width of its images; None: as it is known of a published file.
        schedule: that it was trained with.

    Returns:
        What it is, in a line.

    Raises:
        ConfigError: `out` is there, or has no folder to be in; the file is none of that code base; diffusers' folders
            can't say what it is.
    """
    from ddim_lab.models.foreign.converted import build
    from ddim_lab.models.pretrained import check_schedule, said_weights
    from ddim_lab.models.unet import weights_digest, write_pipeline

    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} is there already: remove it, or name another folder")
    if not out.parent.is_dir():
        raise ConfigError(f"{out} can't be made: {out.parent} is no folder")
    found = _converted(options, size, schedule.build().num_timesteps)
    if found.process is not None:
        check_schedule(options.path, found.process, schedule)
    try:
        network = build(found)
    except ValueError as error:
        raise ConfigError(f"{options.path}: {error}") from None
    weights, _ = said_weights(options, found.weights)
    record = {
        "source": found.source,
        "digests": {} if weights == "unknown" else {weights: weights_digest(network)},
    }
    fresh = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        network.save_pretrained(fresh / "unet")
        write_pipeline(fresh, schedule.build(), schedule.model_dump())
        write_json(fresh / "model.json", record)
        sync_tree(fresh)
        fresh.rename(out)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    sync_folder(out.parent)
    return f"{found.source}; weights: {weights}" + ("" if found.note is None else f"; {found.note}")


def _converted(options: OfficialConfig | AdmConfig, size: tuple[int, int] | None, num_timesteps: int) -> Converted:
    """The network, if a folder of diffusers can say what it is and of which images."""
    from ddim_lab.models.foreign.checkpoints import convert_file

    try:
        found = convert_file(options, size, num_timesteps)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    sides, halvings = found.config["sample_size"], len(found.config["block_out_channels"]) - 1
    if found.heads is not None:
        raise ConfigError(
            f"{options.path} has {found.heads} heads in attentions of different widths, which diffusers' folders can't"
            " say: use it as it is, by model=adm"
        )
    if sides is None:
        raise ConfigError(f"{options.path} does not say how large its images are: give --image-size")
    if size is not None and list(size) != sides:
        raise ConfigError(f"{options.path} is for images of {sides[0]} pixels: drop --image-size")
    if sides[0] % 2**halvings:
        raise ConfigError(f"{options.path} halves images {halvings} times: --image-size={sides[0]} can't be")
    return found


def _family(path: str) -> str:
    """The code base of a file by the names in it."""
    from ddim_lab.models.foreign.converted import family_of
    from ddim_lab.models.foreign.files import read_content

    try:
        content = read_content(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    family = ("ddim", "") if isinstance(content, list) else family_of(name.removeprefix("module.") for name in content)
    if family is None or family[0] not in _KINDS:
        looks = "" if family is None else f" (it looks like {family[1]})"
        raise ConfigError(f"{path} is of no code base that is known here{looks}: {' and '.join(_KINDS)} are")
    return family[0]


@final
class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python -m ddim_lab.convert --help")


def _main(arguments: Sequence[str]) -> int:
    parser = _Parser(prog="python -m ddim_lab.convert", description=__doc__.splitlines()[0].split(": ")[1])
    parser.add_argument("file", type=path_argument, help="of torch.save, or .safetensors")
    parser.add_argument("out", type=path_argument, help="the folder that is made")
    parser.add_argument("--family", choices=_KINDS, help="its code base; as a rule it shows by itself")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="height and width, unless it is published")
    parser.add_argument(
        "overrides", nargs="*", metavar="OPTION=VALUE", help="schedule, schedule.*, model.*, as python -m ddim_lab"
    )
    asked = parser.parse_intermixed_args(arguments)
    if asked.image_size is not None and asked.image_size < 1:
        raise ConfigError(f"--image-size={asked.image_size}: at least 1 is needed")
    for text in asked.overrides:
        if not re.match(r"\+{0,2}(schedule[.=]|model\.)", text) or text.startswith(("model.path=", "model.kind=")):
            raise ConfigError(f"{text} is no option of a conversion: schedule=, schedule.* and model.* are")
    kind = _KINDS[asked.family or _family(str(asked.file))]
    # The path goes past Hydra's grammar; one step fits every schedule.
    overrides = [f"model={kind}", "model.path=FILE", "steps=1", *map(quoted, asked.overrides)]
    with composer(argparse.Namespace(config_dir=None, overrides=overrides)):
        config = Config.from_hydra(compose(overrides))
    assert isinstance(config.model, OfficialConfig | AdmConfig)
    options = config.model.model_copy(update={"path": str(asked.file)})
    size = None if asked.image_size is None else (asked.image_size, asked.image_size)
    told = write_folder(asked.out.absolute(), options, size, config.schedule)
    print(f"{asked.out} (model=pretrained model.path={asked.out}): {told}")
    return 0


def main() -> None:
    """Entry point. Exit status: 0, 1 failed, 2 wrong input (one line says what), 130 interrupted, 143 terminated."""
    sys.exit(exit_status(lambda: _main(sys.argv[1:])))


if __name__ == "__main__":
    main()
