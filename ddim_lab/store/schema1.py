"""Results of schema 1: what cells held before they held Values, and the one place that still knows those names.

Such a result has `measurements`: the numbers of its task by name, and up to three groups of them, `quality` (a Fréchet
distance and what stands beside it), `speed` and `determinism`. What a number is called, and what it means nothing
without, stood in the report; it stands here now, and never changes.

Plain dicts come out, as a result of schema 2 holds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["upgraded"]

Dict = dict[str, Any]
Kind = type | tuple[type, ...]

JACKKNIFE: Final = "by the delete-a-group jackknife over groups of samples"
BEYOND: Final = (
    "It covers sampling only: neither the training seed nor the bias that a finite N gives the Fréchet distance"
)


def upgraded(result: Mapping[str, Any]) -> Dict:
    """A result of schema 1 as one of schema 2.

    Raises:
        ValueError: its measurements are not what that schema has.
    """
    measurements = result.get("measurements", {})
    if not isinstance(measurements, dict):
        raise ValueError("measurements: not numbers by name")
    for name in ("quality", "speed", "determinism"):
        if not isinstance(measurements.get(name) or {}, dict):
            raise ValueError(f"measurements.{name}: not numbers by name")
    parts = (_quality, _tasks, _speed, _determinism, _nearest)
    values = [value for part in parts for value in part(measurements)]
    kept = {name: value for name, value in result.items() if name not in ("schema", "measurements")}
    nfe, headline = measurements.get("nfe"), measurements.get("headline", "")
    started = kept.get("task") != "reconstruct"  # which starts from images
    return {**kept, "nfe": nfe, "headline": headline, "common_start": started, "values": values}


def _given(group: Mapping[str, Any], name: str, kind: Kind = (int, float)) -> Any:
    """An entry; None where it is absent."""
    value = group.get(name)
    if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise ValueError(f"measurements.{name}: not what belongs there")
    return value


def _plain(group: Mapping[str, Any], names: Mapping[str, str], kind: Kind = (int, float)) -> list[Dict]:
    """Entries that stand in results.csv alone, called as `names` has it."""
    found = ((called, _given(group, name, kind)) for name, called in names.items())
    return [{"name": called, "value": value} for called, value in found if value is not None]


# -- quality --------------------------------------------------------------------------------------------


def _quality(measurements: Mapping[str, Any]) -> Iterator[Dict]:
    quality = measurements.get("quality")
    if not quality:
        return
    name, count = _given(quality, "name", str) or "FD", _given(quality, "num_samples", int)
    equal_n = quality.get("equal_n") or {}
    features = _given(quality, "features", str) or "not said"
    if re.fullmatch(r"[0-9a-f]{32,}", features):
        features = features[:12]
    facts = f"features: {features} · reference: {_given(quality, 'reference', str) or 'not said'}"
    of = ("name", "features", "reference", "reference_key", "num_samples")
    comparable = {part: quality.get(part) for part in of} | {"name": name}
    yield {
        "name": "fd",
        "value": _given(quality, "fd"),
        "heading": name,
        "facts": facts,
        "se": _given(quality, "fd_se"),
        "error": f"{JACKKNIFE}. {BEYOND}",
        "count": count,
        "counted": "",
        "better": "lower",
        "level": "fd_held_out_at_equal_n" if equal_n else None,
        "level_says": f"{name} of held-out real images against the same reference",
        "replicates": _given(quality, "leave_one_out", (list, tuple)),
        "comparable": comparable,
        "akin": ("FID", "FD"),
    }
    yield from _beside(quality, name, count)
    if equal_n:
        yield from _equal_n(equal_n, name, count, facts)
    yield from quality.get("values") or ()  # of metrics that came later, as schema 2 has them


def _beside(quality: Mapping[str, Any], name: str, of: int | None) -> Iterator[Dict]:
    """Kernel distance, Inception Score, precision and recall, where they were asked for."""
    for measured, (called, column, more) in BESIDE.items():
        if measured not in quality:
            continue
        notes = ["On the features of the Fréchet distance."]
        if measured == "kid" and (subsets := _subsets(quality, of)):
            notes.append(subsets)
        # KID, too, is of Inception's features alone
        is_kid = measured == "kid" and name == "FID"
        value: Dict = {"name": called, "value": _given(quality, measured), "column": "KID" if is_kid else column}
        if value["value"] is None:
            value["why_not"] = (quality.get("not_measured") or {}).get(measured)
        if f"{measured}_spread" in quality:
            value["spread"] = _given(quality, f"{measured}_spread")
            value["error"] = "a spread over parts of the images, no standard error"
        yield {**value, "table": "Beside the Fréchet distance", "notes": (*notes, *more)}


def _subsets(quality: Mapping[str, Any], of: int | None) -> str:
    count, size = _given(quality, "kid_subsets", int), _given(quality, "kid_subset_size", int)
    if quality.get("kid") is None or not count or not size:
        return ""
    told = f"Kernel distance: mean over {count} {'subset' if count == 1 else 'subsets'} of {size:,} images."
    if of is not None and size >= of and count > 1:
        told += f" All {of:,} samples are in each: its spread is over subsets of the reference alone."
    return told


DRIFT: Final = "Precision and recall drift with the number of images: compare them at equal N alone."
BESIDE: Final[dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "kid": ("kid", "kernel distance", ()),
    "inception_score": ("inception_score", "Inception Score", ()),
    "precision": ("improved_precision", "precision", (DRIFT,)),  # `precision` is the arithmetic's
    "recall": ("improved_recall", "recall", (DRIFT,)),
}


def _nearest(measurements: Mapping[str, Any]) -> Iterator[Dict]:
    nearest = (measurements.get("quality") or {}).get("nearest") or {}
    for part, column in NEAREST.items() if nearest else ():
        shown = {"section": "Nearest neighbours", "column": column, "notes": (NEAREST_NOTE,)}
        yield {"name": f"nearest_{part}", "value": _given(nearest, part), **shown}


NEAREST: Final = {
    "samples_to_train": "sample → nearest training image",
    "samples_to_held_out": "sample → nearest held-out image",
    "held_out_to_train": "held-out → nearest training image",
}
NEAREST_NOTE: Final = (
    "Median Euclidean distance over pixels, with values in [−1, 1]. A model that copies has samples much nearer to "
    "the training images than held-out real images are: the first column far below the last. New images give about "
    "the same in both."
)


def _equal_n(equal_n: Mapping[str, Any], name: str, of: int | None, facts: str) -> Iterator[Dict]:
    count = _given(equal_n, "num_samples", int)
    yield from _plain({"equal_n": count}, {"equal_n": "equal_n"})
    yield {
        "name": "fd_at_equal_n",
        "value": _given(equal_n, "fd_samples"),
        # at the cell's own N it is the distance itself
        "heading": "" if count == of or count is None else f"{name} at N = {count:,}, beside held-out real images",
        "facts": facts,
        "against": None,
        "count": count,
        "counted": "",
        "better": "lower",
        "level": "fd_held_out_at_equal_n",
        "level_says": "Held-out real images",
        "level_as": "row",
        "comparable": {"num_samples": count},
    }
    yield {
        "name": "fd_held_out_at_equal_n",
        "value": _given(equal_n, "fd_held_out"),
        "se": _given(equal_n, "fd_held_out_se"),
        "label": "held-out real images",
        "facts": "one draw of them",
        "count": count,
        "counted": "",
    }


# -- speed and determinism ------------------------------------------------------------------------------


def _speed(measurements: Mapping[str, Any]) -> Iterator[Dict]:
    speed = measurements.get("speed")
    if not speed:
        return
    images, quartiles = _given(speed, "images", int), [_given(speed, f"seconds_{q}") for q in ("q1", "q3")]
    contended = bool(_given(speed, "contended", bool))
    timing = {"section": "Speed", "table": "Timing", "fair": not contended}
    each = [seconds / images for seconds in quartiles if seconds is not None and images]
    yield {
        "name": "seconds_per_image",
        "value": _given(speed, "seconds_per_image"),
        "unit": "s/image",
        "column": "an image",
        "quartiles": each if len(each) == 2 else None,
        "count": images,
        "notes": ("Median of the repeats over one batch; quartiles in brackets.",),
        **timing,
    }
    for name, (called, unit, column, note) in TIMING.items():
        shown = {"unit": unit, "column": column, "notes": (note,) if note else ()}
        yield {"name": called, "value": _given(speed, name), **shown, **timing}
    yield from _plain(speed, SPEED)
    yield {"name": "contended", "value": contended}


TIMING: Final = {
    "images_per_second": ("images_per_second", "images/s", "images a second", ""),
    "forward_share": (
        "forward_share",
        "share",
        "forward's share",
        "Forward's share: the network's forwards alone over the whole walk; median of the ratios, timed in pairs.",
    ),
    "peak_memory_bytes": (
        "peak_memory",
        "B",
        "peak memory",
        "Peak memory: what a GPU had allocated at most during the walk; on a CPU it is not known.",
    ),
}
SPEED: Final = {"images": "speed_images", "repeats": "speed_repeats"} | {
    name: name for name in ("forward_images", "seconds_median", "seconds_q1", "seconds_q3", "warmup_seconds")
}


def _determinism(measurements: Mapping[str, Any]) -> Iterator[Dict]:
    found = measurements.get("determinism")
    if not found:
        return
    sizes = " and ".join(map(str, _given(found, "batch_sizes", (list, tuple)) or ()))
    notes = (REPEATS, f"The two batch sizes: {sizes}.") if sizes else (REPEATS,)
    repeats = {"section": "Determinism", "table": "Repeats and batch sizes", "notes": notes}
    for name, (kind, called, column) in DETERMINISM.items():
        yield {"name": called, "value": _given(found, name, kind), "column": column, **repeats}
        if name == "batch_max_abs_diff":
            yield {**_noise_variance(found), **repeats}
    yield from _plain(found, {"noise_seeds": "noise_seeds", "noise_images": "noise_images"}, int)
    if (variance := _given(found, "noise_variance")) is not None:
        # two runs differ by twice the variance; images on [0, 1] have a quarter of it
        yield {"name": "noise_mse", "value": variance / 2}


DETERMINISM: Final[dict[str, tuple[Kind, str, str]]] = {
    "repeat_max_abs_diff": ((int, float), "repeat_max_abs_diff", "same x_T twice: max |difference|"),
    "repeat_identical": (bool, "repeat_identical", "bitwise equal"),
    "batch_max_abs_diff": ((int, float), "batch_max_abs_diff", "two batch sizes: max |difference|"),
    "sha256": (str, "sha256", "SHA-256 of all samples"),
    "images": (int, "determinism_images", "tested on images"),
}
REPEATS: Final = (
    "The same x_T sampled twice, and in batches of two sizes: differences of the final state, in which images "
    "span [−1, 1]. Variance: over noise seeds at fixed x_T, ± its standard error over images where that was taken; "
    "at η 0 nothing is drawn, but by the analytic variance, so it must be exactly 0."
)


def _noise_variance(found: Mapping[str, Any]) -> Dict:
    return {
        "name": "noise_variance",
        "value": _given(found, "noise_variance"),
        "heading": "Variance across noise seeds",
        "facts": "mean over pixels that span [−1, 1], between runs from the same x_T with different noise; half of it "
        "is the MSE between two runs on the [0, 1] scale",
        "column": "variance across noise seeds",
        "against": "eta",
        "se": _given(found, "noise_variance_se"),
        "error": "over images",
        "count": _given(found, "noise_images", int),
    }


# -- what tasks measured --------------------------------------------------------------------------------


def _tasks(measurements: Mapping[str, Any]) -> Iterator[Dict]:
    """The task's own numbers: those with a heading first, in the order of their tables."""
    own = {
        name: value
        for name, value in measurements.items()
        if isinstance(value, int | float | str | None)
        and name not in ("nfe", "headline")
        and not (name.endswith("_se") and name.removesuffix("_se") in measurements)
    }
    for name in sorted(own, key=lambda name: list(TASKS).index(name) if name in TASKS else len(TASKS)):
        more = dict(TASKS.get(name, {}))
        if (count := more.pop("count", None)) is not None:
            more["count"] = _given(measurements, count, int)
        se = _given(measurements, f"{name}_se")
        error = {"error": more.pop("error", "over images")} if se is not None else {}
        yield {
            "name": RENAMED.get(name, name),
            "value": _given(own, name) if more else own[name],
            **more,
            "se": se,
            **error,
        }


RUNTIME: Final = "the same x_T under this runtime and in fp32 on deterministic kernels"
RENAMED: Final = {"reference_steps": "many_steps"}
UNRELATED: Final = "Two of them from different x_T"

TASKS: Final[dict[str, Dict]] = {
    "reconstruction_mse": {
        "heading": "Reconstruction MSE",
        "facts": "held-out images encoded and decoded, a dimension, on the [0, 1] scale",
        "count": "reconstruction_images",
        "better": "lower",
        "level": "reconstruction_mse_median",
        "level_says": "Median over images instead of mean",
    },
    "consistency_mse": {
        "heading": "MSE to many steps",
        "facts": "the same x_T at S steps and at many, a dimension, on the [0, 1] scale",
        "count": "compared_images",
        "better": "lower",
        "level": "unrelated_mse",
        "level_says": UNRELATED,
    },
    "feature_distance": {
        "heading": "Feature distance to many steps",
        "facts": "the same x_T at S steps and at many, mean Euclidean distance in the feature network",
        "count": "compared_images",
        "better": "lower",
        "level": "unrelated_feature_distance",
        "level_says": UNRELATED,
    },
    "interpolation_path_length": {
        "heading": "Path between images",
        "facts": "length in pixels of the path that slerp of x_T takes, as a multiple of the straight line; median "
        "over lines",
        "count": "interpolation_lines",
        "counted": "lines",
        "level": "lerp_path_length",
        "level_says": "By lerp of x_T",
    },
    "interpolation_largest_step": {
        "heading": "Largest step between neighbours",
        "facts": "of the path that slerp of x_T takes, as a share of the straight line between its ends; median over "
        "lines",
        "count": "interpolation_lines",
        "counted": "lines",
        "level": "lerp_largest_step",
        "level_says": "By lerp of x_T",
    },
    "midpoint_to_train": {
        "heading": "Distance of midpoints to the training images",
        "facts": "median Euclidean distance of a slerp's midpoint to its nearest training image, pixels in [−1, 1]",
        "count": "interpolation_lines",
        "counted": "lines",
        "level": "crossfade_midpoint_to_train",
        "level_says": "Of the cross-fade of the two end images",
    },
    "first_prediction_mse": {
        "heading": "MSE of the first predicted x_0",
        "facts": "to the image that the sample becomes, both clamped, a dimension, on the [0, 1] scale",
        "better": "lower",
    },
    "mse_to_sampler": {
        "heading": "MSE of DDPM's formula to the sampler",
        "facts": "from the same x_T and noise, a dimension, on the [0, 1] scale",
        "better": "lower",
    },
    "found_fd": {
        "heading": "Fréchet distance of the timesteps that were found",
        "facts": "at noise that the search has not seen; the cell's table has every spacing and the paired differences",
        "count": "found_images",
        "better": "lower",
        "level": "best_builtin_fd",
        "level_says": "Of the best built-in spacing at the same NFE",
        "error": JACKKNIFE,
    },
    "times_diffusers": {
        "heading": "Times diffusers' pipeline",
        "facts": "how many times as long diffusers' DDIMPipeline took for the same weights, steps and batch, in one "
        "process; median over rounds in turns, the cell's table has the intervals and the other peers",
    },
    "one_image_times_diffusers": {
        "heading": "Times diffusers' pipeline, one image",
        "facts": "the same for one image alone: how much sooner it is there",
    },
    "ceiling_share": {
        "heading": "Share of a matrix product's speed",
        "facts": "operations a second of the network at the largest batch, over those of a large square product of "
        "the same precision in the same run",
    },
    "loop_overhead": {
        "heading": "Loop over forwards alone",
        "facts": "time of the walk, its noise included, over that of as many forwards in a row, less 1; median over "
        "rounds",
        "better": "lower",
    },
    "noisy_loop_overhead": {
        "heading": "Loop with noise over forwards alone",
        "facts": "the same of the walk with noise in every step but the last: at η 1 where the cell draws none",
        "better": "lower",
    },
    "precision_fd_percent": {
        "heading": "Change of the Fréchet distance against fp32, in percent",
        "facts": f"{RUNTIME}; paired",
        "count": "compared_images",
        "error": f"{JACKKNIFE}, paired",
    },
    "precision_mse": {
        "heading": "MSE to fp32",
        "facts": f"{RUNTIME}, a dimension, on the [0, 1] scale",
        "count": "compared_images",
        "better": "lower",
    },
    "precision_speedup": {
        "heading": "Times the speed of fp32",
        "facts": "images a second under this runtime over those in fp32 on deterministic kernels",
    },
}
