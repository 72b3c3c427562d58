"""samples.npz: the images of a cell as they are kept, and added to a cell that was made without."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from ddim_lab.metrics.determinism import ImagesHash, nhwc
from ddim_lab.store import content_key, read_json
from ddim_lab.store.chunks import SampleChunks
from ddim_lab.store.records import Result
from ddim_lab.tasks.base import Job
from ddim_lab.tasks.sampling import chunks_of, samples_identity
from ddim_lab.tasks.walks import Batches, network_in_place, sample_uint8

__all__ = ["resample", "write_samples"]


def resample(job: Job, cell: Path) -> Path:
    """A finished cell with samples.npz added, in its place: its images, kept or made again, must be the same."""
    folder, _ = job.store.obtain("cells", cell.name, lambda fresh: _resample(job, fresh, cell), replace=True)
    return folder


def _resample(job: Job, folder: Path, cell: Path) -> None:
    """Write samples.npz into `folder`, and copy the rest of the cell.

    Raises:
        RuntimeError: their SHA-256 is not the one that the cell holds.
    """
    config, runtime, sampler = job.config, job.runtime, job.sampler
    values = Result.read(read_json(cell / "result.json")).values
    expected = next(str(value.value) for value in values if value.name == "sha256")
    noise = runtime.noise(config.seed)
    sha256 = ImagesHash()

    def again() -> Iterator[Tensor]:
        with network_in_place(job) as network:
            for indices in Batches(job, config.num_samples):
                images = sample_uint8(sampler, network, indices, job.data.shape, noise, runtime.torch_device).cpu()
                sha256.update(images)
                yield images

    def hashed(chunks: SampleChunks) -> Iterator[Tensor]:
        for batch in chunks:
            sha256.update(batch.images)
            yield batch.images

    with job.store.growing(content_key(samples_identity(job, sampler)), waiting_for="the same samples") as place:
        chunks = chunks_of(job, place)
        images, told = (again(), "sampling again gave") if chunks.missing() else (hashed(chunks), f"{place} holds")
        write_samples(folder / "samples.npz", config.num_samples, images)
    if sha256.hexdigest() != expected:
        raise RuntimeError(
            f"{told} other images (SHA-256 {sha256.hexdigest()[:12]}, the cell holds {expected[:12]}): "
            "this machine does not reproduce the cell; force=true replaces it"
        )
    for file in cell.iterdir():
        if file.name != "MANIFEST.json":
            (folder / file.name).write_bytes(file.read_bytes())


def write_samples(path: Path, count: int, batches: Iterable[Tensor]) -> None:
    """samples.npz as the field's evaluators read it: arr_0, uint8, [N, H, W, C]; one batch in memory at a time.

    Args:
        path: where.
        count: N.
        batches: uint8 [B, C, H, W], N images together.
    """
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        for number, images in enumerate(map(nhwc, batches)):
            if number == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *images.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(images.tobytes())
