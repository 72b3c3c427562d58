"""N images of a cell, made batch by batch, on one device or several."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from ddim_lab.config.job import Config
from ddim_lab.console import Progress, show_progress
from ddim_lab.data.base import load_data
from ddim_lab.data.images import to_uint8
from ddim_lab.device.memory import Halving
from ddim_lab.device.ranks import devices_of_ranks, on_ranks
from ddim_lab.device.runtime import Runtime
from ddim_lab.metrics.extractor import features_by
from ddim_lab.metrics.speed import Contention, PeakMemory, StepClock, larger, timed
from ddim_lab.models.obtain import obtain_model
from ddim_lab.noise import NamedNoise
from ddim_lab.sampler import EpsModel, Sampler
from ddim_lab.store import Store, content_key, read_record, write_record
from ddim_lab.store.chunks import Batch, SampleChunks
from ddim_lab.store.records import Samples
from ddim_lab.store.samples import RECORD, discard, tidy
from ddim_lab.tasks.base import Job
from ddim_lab.tasks.scored import AT_MOST
from ddim_lab.tasks.walks import Batches, check_finite, evaluate

__all__ = ["Maker", "chunks_of", "maker_in_place", "sample_on_ranks", "samples_folder", "samples_identity"]

SAMPLES_VERSION: Final = 1
"""Raised whenever the same identity would be sampled otherwise."""


@final
class Maker:
    """Makes batch after batch of a cell, and hands each to the chunks.

    Args:
        job: the cell.
        sampler: what samples.
        network: the cell's, on its device.
        chunks: take what is made.
        contention: of the device.
        see: whether the images' features are taken, too.

    Attributes:
        networks: the feature networks, in the order of the job's; none where nothing is to be seen.
        noise: of the cell's seed.
        warm: whether a batch has been made.
        peak_memory: bytes, the most that a walk took; None where it is not known.
        phases: seconds that each phase took.
    """

    def __init__(
        self,
        job: Job,
        sampler: Sampler,
        network: Halving,
        chunks: SampleChunks,
        contention: Contention,
        see: bool = True,
    ) -> None:
        self.job: Final = job
        self.sampler: Final = sampler
        self.network: Final = network
        self.contention: Final = contention
        self.device: Final = job.runtime.torch_device
        self._features: Final = job.features if see else ()
        self.networks: Final = tuple(features.load().to(self.device) for features in self._features)
        self.noise: Final = job.runtime.noise(job.config.seed)
        self.warm = False
        self.peak_memory: int | None = None
        self.phases = {"sampling": 0.0, "features": 0.0, "loop": 0.0}
        self._chunks: Final = chunks

    def make(self, missing: Sequence[range], total: int) -> None:
        """Make these batches, the last of `total` samples; they are durable when it returns."""
        clock = time.perf_counter()
        if missing:
            evaluate(Batches(self.job, missing, total=total), self.add, self.network, self.job)
            self._chunks.flush()
        self.phases["loop"] = time.perf_counter() - clock - self.phases["sampling"] - self.phases["features"]
        self.network.to(self.device)  # where Lightning's teardown took it from

    def add(self, indices: Tensor) -> None:
        """Make one batch.

        Args:
            indices: of its samples, int64 [B] on the device.

        Raises:
            NonFiniteError: as `check_finite`.
        """
        first = int(indices[0])
        walk = self.walk(indices, self.noise)
        self.contention.begin()
        x_0, seconds, steps = self.time_walk(walk)

        def extract() -> tuple[Tensor, dict[str, Tensor]]:
            check_finite(x_0, walk, self.network, self.sampler)
            images = to_uint8(x_0).contiguous()  # as they are read back: kernels for other strides may round otherwise
            return images, self._extracted(images, {of.digest for of in self._features if of.kept})

        (images, features), extracting = timed(extract, self.device)
        by_network = {digest: found.cpu() for digest, found in features.items()}
        tensors = {"steps": steps}
        if first == 0:
            tensors["x_0"] = x_0[:AT_MOST].cpu()
        taken = {"sampling": seconds, "features": extracting}
        self._chunks.add(Batch(first, images.cpu(), tensors, by_network, taken, self.warm, self.contention.look()))
        self.warm = True
        self.phases["sampling"] += seconds
        self.phases["features"] += extracting

    def see(self) -> None:
        """Have the features of all images by the job's networks, where they are kept; nothing is sampled."""
        digests = [of.digest for of in self._features if of.kept]
        if not (total := self._chunks.unseen(digests)):
            return
        clock = time.perf_counter()
        with torch.inference_mode(), Progress(f"{self.job.progress} features", total, "image") as progress:

            def extract(images: Tensor, digests: Collection[str]) -> dict[str, Tensor]:
                found = self._extracted(images.to(self.device), digests)
                progress.update(len(images))
                return {digest: features.cpu() for digest, features in found.items()}

            self._chunks.see(digests, extract)
        self.phases["features"] += time.perf_counter() - clock

    def _extracted(self, images: Tensor, digests: Collection[str]) -> dict[str, Tensor]:
        """The features of images on the device by some of the networks, which go by their digests."""
        pairs = zip(self._features, self.networks, strict=True)
        asked = {of.digest: network for of, network in pairs if of.digest in digests}
        return dict(zip(asked, features_by(list(asked.values()), images), strict=True))

    @torch.inference_mode()
    def features_of(self, batch: Batch) -> list[Tensor]:
        """A batch's features by each of the networks: those that are kept, or extracted."""
        pairs = zip(self._features, self.networks, strict=True)
        kept = [(batch.features.get(of.digest), network) for of, network in pairs]
        return [network(batch.images.to(self.device)) if found is None else found for found, network in kept]

    def walk(self, indices: Tensor, noise: NamedNoise) -> Callable[[EpsModel], Tensor]:
        """The walk of these samples, (model) -> x_0, with the noise of its steps.

        It starts from the x_T of the cell's seed, whatever the noise.
        """
        x_T = self.noise.initial(indices, torch.empty(len(indices), *self.job.data.shape, device=self.device))
        return partial(self.sampler.sample, x_T=x_T, indices=indices, noise=noise)

    def time_walk(self, walk: Callable[[EpsModel], Tensor]) -> tuple[Tensor, float, Tensor]:
        """x_0 of a walk, its seconds, and its `StepClock.steps`; `peak_memory` sees it."""
        clock = StepClock(self.network, self.device)

        def run() -> Tensor:
            x_0 = walk(clock)
            clock.mark()
            return x_0

        with self.memory_seen():
            x_0, seconds = timed(run, self.device)
        return x_0, seconds, clock.steps()

    @contextlib.contextmanager
    def memory_seen(self) -> Iterator[None]:
        """Context: `peak_memory` is at least what is used in it."""
        with PeakMemory(self.device) as peak:
            yield
        self.peak_memory = larger(self.peak_memory, peak.nbytes)


def samples_identity(job: Job, sampler: Sampler, altered: Mapping[str, str] | None = None) -> dict[str, Any]:
    """All that makes the images by this sampler, but not how many they are: their key is its digest.

    Args:
        job, sampler: of the samples.
        altered: what is made otherwise on purpose, in an audit, than any cell makes it: such samples are no cell's.
    """
    config, own = job.config, sampler is job.sampler
    concerned = ("data", "sampler") if own else ("data", "sampler", "task")  # a task's sampler is of its code
    plugins = [plugin for plugin in config.plugins() if plugin["kind"] in concerned]
    return {
        "version": SAMPLES_VERSION,
        "model": job.model.recipe(),
        "shape": list(job.data.shape),
        "sampler": sampler.recipe(),
        "seed": config.seed,
        "batch_size": config.batch_size,
        "runtime": job.runtime.recipe(),
        **({} if (moments := job.second_moments()) is None else {"second_moments": moments.key}),
        **({"plugins": plugins} if plugins else {}),
        **({"audit": dict(altered)} if altered else {}),
    }


@contextlib.contextmanager
def samples_folder(job: Job, sampler: Sampler, altered: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Context: the folder of the job's samples, whatever their number, held by this process alone.

    With force=true it is emptied first. Arguments as `samples_identity`.
    """
    config, identity = job.config, samples_identity(job, sampler, altered)
    key = content_key(identity)
    words = (
        f"{config.data.name} {job.model.kind}, {config.sampler.name} eta={config.sampler.eta:g} S={sampler.steps}, seed"
        f" {config.seed}, batches of {config.batch_size}"
        + "".join(f", audited with {aspect}={choice}" for aspect, choice in (altered or {}).items())
    )
    with job.store.growing(key, waiting_for=f"the same samples ({words})") as folder:
        if config.force:
            discard(folder)
        tidy(folder)
        try:
            Samples.read(read_record(folder / RECORD))
        except (FileNotFoundError, ValueError):
            record = Samples(key=key, identity=identity, words=words, nfe=sampler.nfe, batch_size=config.batch_size)
            write_record(folder / RECORD, record.content())
        yield folder


def chunks_of(job: Job, folder: Path) -> SampleChunks:
    """The samples of the job that lie in the folder of its samples."""
    config = job.config
    networks = {features.digest: features.name for features in job.features if features.kept}
    return SampleChunks(folder, config.num_samples, config.batch_size, config.checkpoint_seconds, networks)


@contextlib.contextmanager
def maker_in_place(
    job: Job, sampler: Sampler, chunks: SampleChunks, *, lock: bool = True, see: bool = True
) -> Iterator[Maker]:
    """What makes the job's samples, under its runtime's settings and alone on its device.

    Args:
        job, sampler, chunks, see: as `Maker`.
        lock: as `Job.timed_alone`.
    """
    with job.runtime.applied(), job.timed_alone("images", lock=lock) as contention:
        network = Halving(job.network(min(job.config.batch_size, job.config.num_samples)))
        yield Maker(job, sampler, network, chunks, contention, see)


# -- a cell on several devices: each makes a share of the batches, and writes the chunks of its own -----


def sample_on_ranks(job: Job, folder: Path, missing: Sequence[range], sampler: Sampler) -> None:
    """Make the missing batches in several processes, `sampling_devices` at most; each a run of whole batches."""
    values, on_gpus = job.config.model_dump(mode="json"), job.runtime.torch_device.type == "cuda"
    with contextlib.ExitStack() as stack:
        devices = stack.enter_context(devices_of_ranks(job.store, job.runtime, job.config.sampling_devices))
        if not on_gpus:  # ranks on GPUs lock each its own
            stack.enter_context(job.alone("images"))
        count, total = len(devices), len(missing)
        shares = [missing[total * rank // count : total * (rank + 1) // count] for rank in range(count)]
        on_ranks(count, _sample_share, values, devices, folder, shares, sampler)


def _sample_share(
    rank: int, values: dict[str, Any], devices: list[str], folder: Path, shares: list[list[range]], sampler: Sampler
) -> None:
    """One of several processes that sample together."""
    config = Config.model_validate(values)
    show_progress(config.progress)
    runtime = Runtime.resolve(config.runtime.model_copy(update={"device": devices[rank]}))
    data, store = load_data(config.data), Store(Path(config.outputs_dir))
    model = obtain_model(config, data, runtime, store, contextlib.nullcontext)  # it is there: the first process has it
    job = Job(config, data, model, runtime, store, f"rank {rank}")
    if not shares[rank]:
        return
    on_gpu = runtime.torch_device.type == "cuda"
    with maker_in_place(job, sampler, chunks_of(job, folder), lock=on_gpu) as maker:
        maker.make(shares[rank], sum(map(len, shares[rank])))
