"""`python -m ddim_lab.score PATH`: the quality of any images, ours or another system's, by the code that scores cells.

PATH is a samples.npz as the field writes it (arr_0, uint8, NHWC) or a folder of images.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import torch
from tqdm import tqdm

from ddim_lab.config.metrics import MetricsConfig
from ddim_lab.data.base import load_data
from ddim_lab.data.images import ImageData
from ddim_lab.data.samples import Samples, read_samples, shape_in_words
from ddim_lab.device.runtime import Runtime
from ddim_lab.errors import ConfigError, exit_status
from ddim_lab.jobs.plan import check_outputs, checked_config
from ddim_lab.metrics.features import Features, feature_network, obtain_features
from ddim_lab.metrics.references import (
    Level,
    Reference,
    obtain_level,
    obtain_reference,
    obtain_statistics,
    read_moments,
)
from ddim_lab.store import Store, content_key, write_json
from ddim_lab.store.housekeeping import working
from ddim_lab.store.records import Value

__all__ = ["main", "score"]

BATCH: Final = 256
"""Images scored at once; it changes no value beyond rounding."""


# -- the score ------------------------------------------------------------------------------------------


def score(
    samples: Samples,
    against: Samples | Path | None,
    metrics: MetricsConfig,
    data: ImageData,
    features: Features,
    store: Store,
    device: torch.device,
) -> list[Value]:
    """What `generate` measures of a cell's quality, of any images: see `ddim_lab.metrics.quality.Quality`.

    Args:
        samples: what is scored.
        against: other images, or a file of statistics; None for what conf/metrics names.
        metrics, data, features, store, device: as configured, resolved.

    Raises:
        ConfigError: the images do not fit those they are compared with.
    """
    from ddim_lab.metrics.quality import Quality  # torchmetrics: seconds to import

    keep = metrics.needs_vectors
    of_data = not feature_network(metrics.network).takes_any_images or against is None
    wanted = data.shape if of_data else samples.images.shape
    for images in (samples, *([against] if isinstance(against, Samples) else [])):
        if images.images.shape != wanted:
            what = f"data={data.name}" if of_data else samples.name
            raise ConfigError(
                f"{images.name} holds images of {shape_in_words(images.images.shape)}, {what} of"
                f" {shape_in_words(wanted)}: they can't be compared"
            )
    held_out = None
    if isinstance(against, Samples):
        key = content_key({"features": features.digest, "samples": against.digest})
        count = len(against.images)
        reference = obtain_statistics(
            *(features, against.images, f"{against.name}, n={count}", key, store),
            count=count,
            keep_features=keep,
            device=device,
        )
    else:
        reference, held_out = _configured(against, metrics, data, features, store, keep, device, len(samples.images))
    network = features.load().to(device)
    with tempfile.TemporaryDirectory(dir=store.root) as scratch:
        count = len(samples.images)
        quality = Quality(metrics, features, network, reference, count, Path(scratch), store, held_out, device)
        with torch.inference_mode(), tqdm(total=count, unit="image", disable=None, leave=False) as bar:
            start = 0
            for part in samples.images.batches(BATCH):
                quality.update(network(part.to(device)), start)
                start += len(part)
                bar.update(len(part))
        return _finite(quality.values())


def _finite(values: Sequence[Value]) -> list[Value]:
    """The values, where they are numbers: JSON has neither NaN nor infinity.

    Raises:
        RuntimeError: one is not finite; names it.
    """
    for value in values:
        named = value.heading or value.column or value.name
        numbers = [
            (named, value.value),
            *((f"{named} without group {g}", r) for g, r in enumerate(value.replicates or ())),
        ]
        for name, number in numbers:
            if isinstance(number, float) and not math.isfinite(number):
                raise RuntimeError(
                    f"{name} is {number}: the features of these images, or the reference, can't be compared"
                )
    return list(values)


def _configured(
    statistics: Path | None,
    metrics: MetricsConfig,
    data: ImageData,
    features: Features,
    store: Store,
    keep: bool,
    device: torch.device,
    count: int,
) -> tuple[Reference, Level | None]:
    """The reference that was named, and what as many held-out images score, as far as there are."""
    if statistics is not None:
        return read_moments(statistics, features, "--reference"), None
    if metrics.reference_statistics is not None:
        reference = read_moments(Path(metrics.reference_statistics), features)
    else:
        reference = obtain_reference(features, data, metrics.reference, store, keep_features=keep, device=device)
    if metrics.reference != "train":
        return reference, None
    return reference, obtain_level(reference, features, data, store, count=count, device=device)


# -- the command line -----------------------------------------------------------------------------------


def _table(samples: Samples, values: Sequence[Value]) -> str:
    """Every value with its N, network and reference."""
    head = [
        f"samples    {samples.name}: N = {len(samples.images):,}, {shape_in_words(samples.images.shape)}, SHA-256"
        f" {samples.digest[:12]}",
        *dict.fromkeys(value.facts for value in values if value.comparable and value.facts),
    ]
    told = [value for value in values if value.heading or value.column or value.label]
    width = max(len(_named(value)) for value in told)
    shown = []
    for value in told:
        if value.number is not None:
            error = value.se if value.se is not None else value.spread
            said = "" if error is None else f" ± {error:.2g}  ({value.error.partition('. ')[0]})"
            shown.append(f"{_named(value):<{width}} {value.number:>10.5g}{said}")
    reasons = [f"no {_named(value)}: {value.why_not}" for value in told if value.why_not is not None]
    return "\n".join([*head, "", *shown, *reasons])


def _named(value: Value) -> str:
    count = f" at N = {value.count:,}" if value.label and value.count is not None else ""
    return (value.heading or value.column or value.label) + count


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python -m ddim_lab.score --help")


def _main(arguments: Sequence[str]) -> int:
    parser = _Parser(prog="python -m ddim_lab.score", description=__doc__.splitlines()[0].split(": ")[1])
    parser.add_argument("path", type=Path, nargs="?", help="samples.npz (arr_0, uint8, NHWC) or a folder of images")
    parser.add_argument(
        "--reference", type=Path, help="compare with these images, or statistics (mu, sigma), instead of the data set"
    )
    parser.add_argument("--json", type=Path, help="write all values to this file")
    parser.add_argument(
        "overrides", nargs="*", metavar="OPTION=VALUE", help="as python -m ddim_lab: data, metrics.*, runtime.*, ..."
    )
    asked = parser.parse_intermixed_args(arguments)
    if asked.path is None or ("=" in str(asked.path) and not asked.path.exists()):
        raise ConfigError("what is to be scored? give a samples.npz or a folder of images before the options")
    if more := [text for text in asked.overrides if "=" not in text and not text.startswith("~")]:
        raise ConfigError(f"{more[0]} is no OPTION=VALUE: to compare with it, give --reference {more[0]}")
    config = checked_config(asked.overrides)
    samples = read_samples(asked.path)
    against = asked.reference
    if against is not None and not _is_statistics(against):
        against = read_samples(against)
    store, runtime = Store(Path(config.outputs_dir)), Runtime.resolve(config.runtime)
    check_outputs(store)
    data, metrics = load_data(config.data), config.metrics
    with working(store):
        features = obtain_features(metrics.network, data, store)
        with runtime.applied():
            values = score(samples, against, metrics, data, features, store, runtime.torch_device)
    print(_table(samples, values), flush=True)  # before what --json=/dev/stdout writes
    if asked.json is not None:
        told = [value.model_dump(mode="json", exclude_defaults=True) for value in values]
        described = {"path": str(asked.path), "num_samples": len(samples.images), "sha256": samples.digest}
        try:
            write_json(asked.json, {"samples": described, "metrics": metrics.model_dump(), "values": told})
        except OSError as error:
            raise ConfigError(f"--json={asked.json} can't be written: {error.strerror or error}") from None
    return 0


def _is_statistics(path: Path) -> bool:
    """Whether a file holds mu and sigma rather than images."""
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def main() -> None:
    """Entry point. Exit status: 0, 1 failed, 2 wrong input (one line says what), 130 interrupted, 143 terminated."""
    sys.exit(exit_status(lambda: _main(sys.argv[1:])))


if __name__ == "__main__":
    main()
