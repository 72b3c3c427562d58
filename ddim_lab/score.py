"""`python -m ddim_lab.score PATH`: the quality of any images, ours or another system's, by the code that scores cells.

PATH is a samples.npz as the field writes it (arr_0, uint8, NHWC) or a folder of images.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

import torch

from ddim_lab.config.metrics import NETWORKS, MetricsConfig, NetworkOptions
from ddim_lab.config.options import path_argument
from ddim_lab.console import Progress, show_progress
from ddim_lab.data.base import load_data
from ddim_lab.data.files import readable
from ddim_lab.data.images import ImageData
from ddim_lab.data.samples import Samples, read_samples, shape_in_words
from ddim_lab.device.runtime import Runtime
from ddim_lab.errors import ConfigError, exit_status
from ddim_lab.jobs.compose import quoted
from ddim_lab.jobs.plan import check_outputs, checked_config
from ddim_lab.metrics.extractor import features_by
from ddim_lab.metrics.features import Features, feature_network, obtain_features
from ddim_lab.metrics.references import (
    Reference,
    fits,
    obtain_held_out,
    obtain_reference,
    obtain_statistics,
    read_moments,
)
from ddim_lab.store import Store, content_key, write_json
from ddim_lab.store.housekeeping import working
from ddim_lab.store.records import Value

__all__ = ["main", "reference_in", "score"]

BATCH: Final = 256
"""Images scored at once; it changes no value beyond rounding."""


# -- the score ------------------------------------------------------------------------------------------


def score(
    samples: Samples,
    against: Samples | None,
    statistics: Path | None,
    metrics: MetricsConfig,
    data: ImageData,
    features: Sequence[Features],
    store: Store,
    device: torch.device,
) -> dict[str, list[Value]]:
    """What `generate` measures of a cell's quality, of any images: see `ddim_lab.metrics.quality.Quality`.

    The images are looked at once, by every network.

    Args:
        samples: what is scored.
        against, statistics: other images, a file of statistics, or both of one set; None for what conf/metrics names.
        metrics, data, features, store, device: as configured, resolved.

    Returns:
        The values by the name of the feature network, told apart as those of a cell.

    Raises:
        ConfigError: the images do not fit those they are compared with.
    """
    from ddim_lab.metrics.quality import Quality, Seen

    if statistics is not None and len(features) > 1:
        fitting = [each.statistics for each in features if against is None or fits(statistics, each)]
        if several := [names for names in fitting if fitting.count(names) > 1]:
            raise ConfigError(
                f"--reference={statistics}: its {' and '.join(several[0])} are of one network's features, and may be of"
                f" {len(several)} of those that metrics.features names: name one"
            )
    compared = [
        _compared(samples, against, statistics, metrics, options, data, each, store, device)
        for options, each in zip(metrics.networks, features, strict=True)
    ]
    each = zip(metrics.networks, features, compared, strict=True)
    seen = [Seen(options.name, of, of.load().to(device), *against) for options, of, against in each]
    count = len(samples.images)
    with tempfile.TemporaryDirectory(dir=store.root) as folder:
        quality = Quality(metrics, seen, count, Path(folder), store, device)
        with torch.inference_mode(), Progress(samples.name, count, "image") as progress:
            for part in samples.images.batches(BATCH):
                images = part.to(device)
                quality.update(features_by([one.network for one in seen], images))
                progress.update(len(part))
        return {name: _finite(values) for name, values in quality.values().items()}


def _compared(
    samples: Samples,
    against: Samples | None,
    statistics: Path | None,
    metrics: MetricsConfig,
    options: NetworkOptions,
    data: ImageData,
    features: Features,
    store: Store,
    device: torch.device,
) -> tuple[Reference, Reference | None]:
    """What the images are compared with, and the held-out ones beside them, as one network sees them; see `score`.

    Raises:
        ConfigError: the images do not fit those they are compared with.
    """
    keep = metrics.needs_vectors(options.name)
    fitting = statistics is not None and (against is None or fits(statistics, features))
    if fitting and not keep:
        against = None  # no features of images are needed
    of_data = not feature_network(options).takes_any_images or (against is None and not fitting)
    wanted = data.shape if of_data else samples.images.shape
    for images in (samples, *([] if against is None else [against])):
        if images.images.shape != wanted:
            what = f"data={data.name}" if of_data else samples.name
            raise ConfigError(
                f"{images.name} holds images of {shape_in_words(images.images.shape)}, {what} of"
                f" {shape_in_words(wanted)}: they can't be compared"
            )
    if against is None and statistics is None:
        return _configured(metrics, data, features, store, keep, device, len(samples.images))
    if against is None:
        assert statistics is not None
        return read_moments(statistics, features, "--reference"), None
    key = content_key({"features": features.digest, "samples": against.digest})
    count = len(against.images)
    unfit = "" if statistics is None or fitting else " (its mu and sigma are of other features)"
    reference = obtain_statistics(
        *(features, against.images, f"{against.name}, n={count}{unfit}", key, store),
        count=count,
        keep_features=keep,
        device=device,
    )
    if fitting and statistics is not None:
        reference = read_moments(statistics, features, "--reference").with_features_of(reference, count)
    return reference, None


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
    metrics: MetricsConfig,
    data: ImageData,
    features: Features,
    store: Store,
    keep: bool,
    device: torch.device,
    count: int,
) -> tuple[Reference, Reference | None]:
    """The reference that conf/metrics names, and as many held-out images, as far as there are."""
    if metrics.reference_statistics is not None:
        reference = read_moments(Path(metrics.reference_statistics), features)
    else:
        reference = obtain_reference(features, data, metrics.reference, store, keep_features=keep, device=device)
    if metrics.reference != "train":
        return reference, None
    return reference, obtain_held_out(features, data, store, count=count, device=device)


# -- the command line -----------------------------------------------------------------------------------


def _tables(samples: Samples, by_network: Mapping[str, Sequence[Value]]) -> str:
    """Every value with its N, network and reference: a table a network."""
    shape, digest = shape_in_words(samples.images.shape), samples.digest[:12]
    head = f"samples    {samples.name}: N = {len(samples.images):,}, {shape}, SHA-256 {digest}"
    return "\n".join([head, "\n\n".join(map(_table, by_network.values()))])


def _table(values: Sequence[Value]) -> str:
    """The values of one network, below what they are of."""
    head = dict.fromkeys(value.facts for value in values if value.comparable and value.facts)
    told = [value for value in values if value.heading or value.column or value.label]
    width = max(len(_named(value)) for value in told)
    shown = [_row(value, width) for value in told if value.number is not None]
    reasons = [f"no {_named(value)}: {value.why_not}" for value in told if value.why_not is not None]
    return "\n".join([*head, "", *shown, *reasons])


def _row(value: Value, width: int) -> str:
    row, error = f"{_named(value):<{width}} {value.number:>10.5g}", value.se if value.se is not None else value.spread
    if error is not None:
        row += f" ± {error:.2g}"
        if how := value.error.partition(". ")[0]:
            row += f"  ({how})"
    return row


def _named(value: Value) -> str:
    count = f" at N = {value.count:,}" if value.label and value.count is not None else ""
    return (value.heading or value.column or value.label) + count


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see python -m ddim_lab.score --help")


def _main(arguments: Sequence[str]) -> int:
    parser = _Parser(prog="python -m ddim_lab.score", description=__doc__.splitlines()[0].split(": ")[1])
    parser.add_argument(
        "path", type=path_argument, nargs="?", help="samples.npz (arr_0, uint8, NHWC) or a folder of images"
    )
    parser.add_argument(
        "--reference",
        type=path_argument,
        help="compare with these images, statistics (mu, sigma), or an .npz of both, instead of the data set",
    )
    parser.add_argument("--json", type=path_argument, help="write all values to this file")
    parser.add_argument(
        "overrides", nargs="*", metavar="OPTION=VALUE", help="as python -m ddim_lab: data, metrics.*, runtime.*, ..."
    )
    asked = parser.parse_intermixed_args(arguments)
    if asked.path is None or ("=" in str(asked.path) and not asked.path.exists()):
        raise ConfigError("what is to be scored? give a samples.npz or a folder of images before the options")
    if more := [text for text in asked.overrides if "=" not in text and not text.startswith("~")]:
        raise ConfigError(f"{more[0]} is no OPTION=VALUE: to compare with it, give --reference {more[0]}")
    config = checked_config([quoted(text) for text in asked.overrides])
    show_progress(config.progress)
    samples = read_samples(asked.path)
    against, statistics = (None, None) if asked.reference is None else reference_in(asked.reference)
    store, runtime = Store(Path(config.outputs_dir)), Runtime.resolve(config.runtime)
    check_outputs(store)
    data, metrics = load_data(config.data), config.metrics
    for name, files in (
        (readable(asked.path), samples.files),
        (readable(asked.reference), None if against is None else against.files),
        (f"data={data.name}", data.files),
    ):
        if files is not None:
            print(f"ddim_lab: {name}: {files}", file=sys.stderr)
    with working(store):
        features = [obtain_features(network, data, store) for network in metrics.networks]
        with runtime.applied():
            by_network = score(samples, against, statistics, metrics, data, features, store, runtime.torch_device)
    print(_tables(samples, by_network), flush=True)  # before what --json=/dev/stdout writes
    if asked.json is not None:
        values = [value for found in by_network.values() for value in found]
        told = [value.model_dump(mode="json", exclude_defaults=True) for value in values]
        described = {"path": str(asked.path), "num_samples": len(samples.images), "sha256": samples.digest}
        described |= {} if samples.files is None else {"files": samples.files}
        try:
            write_json(asked.json, {"samples": described, "metrics": metrics.model_dump(), "values": told})
        except OSError as error:
            raise ConfigError(f"--json={asked.json} can't be written: {error.strerror or error}") from None
    return 0


def reference_in(path: Path) -> tuple[Samples | None, Path | None]:
    """The images to compare with, and the file of their statistics: one of them, or both."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        names = set()
    statistics = dict(network.statistics for network in NETWORKS.ours().values())
    means = names & statistics.keys()
    images = read_samples(path) if "arr_0" in names or not means else None
    given = any(images is None or statistics[mean] in names for mean in means)
    return images, path if given else None


def main() -> None:
    """Entry point. Exit status: 0, 1 failed, 2 wrong input (one line says what), 130 interrupted, 143 terminated."""
    sys.exit(exit_status(lambda: _main(sys.argv[1:])))


if __name__ == "__main__":
    main()
