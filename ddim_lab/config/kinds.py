"""What a configuration knows of the things that have files of their own: their options, and what can be asked of them
before any work. The rooms above add the work itself; `Kind` finds the classes there by name. Needs no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Final

from ddim_lab.config.found import Kind
from ddim_lab.config.options import Options, Words

if TYPE_CHECKING:
    from ddim_lab.sampler import Sampler
    from ddim_lab.schedule import NoiseSchedule
    from ddim_lab.transitions import Gamma

__all__ = ["TASKS", "TaskOptions"]

Config = Any
"""A whole `ddim_lab.config.job.Config`, which is made of these and so can't be imported here."""


class TaskOptions(Options, ABC):
    """conf/task: what is measured of a cell. A task's fields are its options; see `ddim_lab.tasks.base.Task`.

    Attributes:
        reads_images: whether it needs the data set; one that times networks alone does not.
        samples_model: whether it samples the cell's model; one that brings models of its own needs no training.
        scores_samples: whether it compares its samples with metrics.reference, or with a file of statistics.
        keeps_samples: whether save_samples=true means something to it.
        on_several_devices: whether sampling_devices may exceed 1.
        common_start: whether sample i starts from the same x_T in every cell.
        any_formula: whether it takes samplers whose formula a package brings, not the DDIM family alone.
        takes_labels: whether it takes class-conditional models.
        eps_alone: whether it takes only networks that give eps and nothing else, at every t: others' code runs them.
        extra: the extra of this package that it needs, with the module that shows whether it is installed; or None.
    """

    reads_images: ClassVar[bool] = True
    samples_model: ClassVar[bool] = True
    scores_samples: ClassVar[bool] = False
    keeps_samples: ClassVar[bool] = False
    on_several_devices: ClassVar[bool] = False
    any_formula: ClassVar[bool] = True
    takes_labels: ClassVar[bool] = False
    eps_alone: ClassVar[bool] = False
    common_start: ClassVar[bool] = True
    extra: ClassVar[tuple[str, str] | None] = None

    name: Words

    def further_walks(self, config: Config) -> Iterable[Sampler]:
        """The samplers whose walks it takes with the cell's model beside the configured one."""
        return ()

    def own_gamma(self, schedule: NoiseSchedule) -> Gamma | None:
        """Of the model that it brings: what sampler.variance=analytic goes by; None where it samples the cell's."""
        return None

    def check(self, config: Config) -> None:
        """Refuse combinations that this task can't do.

        Raises:
            ConfigError: with one line for the user.
        """

    @abstractmethod
    def forwards(self, config: Config) -> int:
        """Image-forwards that its samples cost; not those of `shared`."""

    def shared(self, config: Config) -> tuple[Hashable, int] | None:
        """What cells compute once together: something that is equal for those that share it, and its image-forwards."""
        return None

    def measuring_forwards(self, config: Config) -> int:
        """Image-forwards that measuring costs beside the samples."""
        return 0


TASKS: Final = Kind("task", "ddim_lab.tasks", TaskOptions)  # type: ignore[type-abstract]
