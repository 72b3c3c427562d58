"""The field's conventions of how samples are made: what each is, who does it so, and what was published of its size.

Data alone: which of them a model can be tried with, and how, says `ddim_lab.tasks.remade`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final, Literal, final

from ddim_lab.conventions.protocol import Factor

__all__ = ["CONVENTIONS", "Convention", "published_effect"]

DIFFUSERS: Final = f"diffusers {version('diffusers')}"
AUTHORS: Final = "ermongroup/ddim"
DDIM_PAPER: Final = "DDIM (Song et al. 2021)"


@final
@dataclass(frozen=True)
class Convention:
    """One choice in one aspect of the making.

    Attributes:
        aspect, choice: as a pair of `ddim_lab.conventions.protocol.Made`.
        label, says, who, source, common: as of `Factor`.
    """

    aspect: str
    choice: str
    label: str
    says: str
    who: tuple[str, ...]
    source: str
    common: Literal[1, 2, 3]

    def factor(self, effect: float | None = None, why_not: str | None = None) -> Factor:
        """As a factor of an audit.

        Args:
            effect, why_not: as of `Factor`.
        """
        return Factor(
            name=f"{self.aspect}_{self.choice}",
            part="sampling",
            label=self.label,
            says=self.says,
            who=self.who,
            source=self.source,
            common=self.common,
            effect=effect,
            change={"made": ((self.aspect, self.choice),)},
            why_not=why_not,
        )


CONVENTIONS: Final = (
    Convention(
        "spacing",
        "uniform",
        "uniform timesteps",
        "Every (T/S)th timestep from 0 up is visited; the last ones before T - 1 never are.",
        (
            f"{AUTHORS}, --skip_type uniform, its default",
            f"{DIFFUSERS}, timestep_spacing=leading, DDIMScheduler's default",
            f"{DDIM_PAPER} on CelebA and LSUN",
        ),
        "https://github.com/ermongroup/ddim/issues/3",
        3,
    ),
    Convention(
        "spacing",
        "quadratic",
        "quadratic timesteps",
        "Timesteps are squares, int(linspace(0, sqrt(0.8 T), S)^2): denser near the image, from about 0.8 T down.",
        (f"{AUTHORS}, --skip_type quad", f"{DDIM_PAPER} on CIFAR-10", "GDIM (Zhang et al. 2022) on CIFAR-10"),
        "https://github.com/ermongroup/ddim/issues/3",
        3,
    ),
    Convention(
        "spacing",
        "linspace",
        "timesteps from 0 to T - 1",
        "Timesteps are spaced evenly from 0 to T - 1, and both ends are visited.",
        ("Analytic-DPM (Bao et al. 2022)", f"{DIFFUSERS}, timestep_spacing=linspace"),
        "https://arxiv.org/abs/2201.06503",
        2,
    ),
    Convention(
        "spacing",
        "trailing",
        "trailing timesteps",
        "Timesteps are counted down from T - 1 in steps of T/S; 0 is not visited.",
        ("Lin et al. 2023", f"{DIFFUSERS}, timestep_spacing=trailing"),
        "https://arxiv.org/abs/2305.08891",
        2,
    ),
    Convention(
        "clip",
        "none",
        "no clipping",
        "The predicted image is not clamped.",
        (f"{AUTHORS}, generalized_steps", f"{DIFFUSERS}, clip_sample=False"),
        "https://github.com/ermongroup/ddim/blob/main/functions/denoising.py",
        3,
    ),
    Convention(
        "clip",
        "x0",
        "predicted image clamped",
        "The predicted image is clamped to [-1, 1] in every step, and eps is kept as it was.",
        (f"{DIFFUSERS}, DDIMScheduler's default (clip_sample=True)", "Analytic-DPM (Bao et al. 2022), Analytic-DDIM"),
        "https://github.com/huggingface/diffusers/pull/1069",
        3,
    ),
    Convention(
        "clip",
        "x0_eps",
        "predicted image clamped, eps re-derived",
        "The predicted image is clamped to [-1, 1] in every step, and eps is computed again from it.",
        (
            f"{AUTHORS}, ddpm_steps (the rows with sigma-hat)",
            "openai/improved-diffusion and guided-diffusion, clip_denoised",
            f"{DIFFUSERS}, use_clipped_model_output=True",
        ),
        "https://github.com/huggingface/diffusers/pull/1069",
        2,
    ),
    Convention(
        "eta",
        "0",
        "eta 0",
        "Steps add no noise: DDIM.",
        (f"{DDIM_PAPER}", f"{DIFFUSERS}, DDIMPipeline's default"),
        "https://arxiv.org/abs/2010.02502",
        3,
    ),
    Convention(
        "eta",
        "1",
        "eta 1",
        "Steps add DDPM's noise, of the posterior's standard deviation.",
        (f"{DDIM_PAPER}, the rows of eta 1", "DDPM (Ho et al. 2020), fixedsmall"),
        "https://arxiv.org/abs/2010.02502",
        2,
    ),
    Convention(
        "variance",
        "large",
        "sigma-hat",
        "Steps add noise of the larger standard deviation, sqrt(1 - ab_t / ab_prev), around the mean of eta 1.",
        (f"{DDIM_PAPER}, the rows of sigma-hat", "DDPM (Ho et al. 2020), fixedlarge"),
        "https://arxiv.org/abs/2010.02502, appendix D.3",
        2,
    ),
    Convention(
        "weights",
        "ema",
        "averaged weights",
        "The network has the weights averaged over its training.",
        ("DDPM (Ho et al. 2020)", f"{AUTHORS}, its ema_ files"),
        "https://github.com/w86763777/pytorch-ddpm/issues/22",
        3,
    ),
    Convention(
        "weights",
        "raw",
        "raw weights",
        "The network has the weights of the last training step, not their average.",
        ("a run of w86763777/pytorch-ddpm without its average", f"{AUTHORS}, its files without ema_"),
        "https://github.com/w86763777/pytorch-ddpm/issues/22",
        2,
    ),
    Convention(
        "schedule",
        "linear",
        "linear betas",
        "The same weights are walked on evenly spaced betas.",
        ("DDPM (Ho et al. 2020)", f"{DIFFUSERS}, DDIMScheduler's default (beta_schedule=linear)"),
        "https://arxiv.org/abs/2006.11239",
        2,
    ),
    Convention(
        "schedule",
        "scaled_linear",
        "scaled-linear betas",
        "The same weights are walked on betas whose square roots are evenly spaced.",
        (f"{DIFFUSERS}, beta_schedule=scaled_linear, that of Stable Diffusion", f"{AUTHORS}, beta_schedule: quad"),
        "https://huggingface.co/docs/diffusers/api/schedulers/ddim",
        1,
    ),
    Convention(
        "schedule",
        "cosine",
        "cosine schedule",
        "The same weights are walked on the cosine schedule.",
        ("Nichol and Dhariwal 2021", f"{DIFFUSERS}, beta_schedule=squaredcos_cap_v2"),
        "https://arxiv.org/abs/2102.09672",
        1,
    ),
    Convention(
        "first",
        "plus_one",
        "timesteps one later",
        "Every timestep is one later, T - 1 at most.",
        (f"{DIFFUSERS}, steps_offset=1, as in Stable Diffusion's scheduler_config.json",),
        "https://huggingface.co/docs/diffusers/api/schedulers/ddim",
        1,
    ),
    Convention(
        "last",
        "alpha_bar_0",
        "last step to alpha_bar(0)",
        "The last step ends at the level of t = 0 and not at a clean image: a little noise is left.",
        (f"{DIFFUSERS}, set_alpha_to_one=False, as in Stable Diffusion's scheduler_config.json",),
        "https://github.com/huggingface/diffusers/issues/6068",
        2,
    ),
    Convention(
        "seed",
        "plus_1",
        "another seed",
        "All noise comes from the next seed.",
        ("anybody", "NVlabs/edm, which reports the smallest of three"),
        "https://github.com/NVlabs/edm/issues/16",
        3,
    ),
    Convention(
        "seed",
        "plus_2",
        "a third seed",
        "All noise comes from the seed after the next.",
        ("anybody", "NVlabs/edm, which reports the smallest of three"),
        "https://github.com/NVlabs/edm/issues/16",
        3,
    ),
    Convention(
        "arithmetic",
        "bf16",
        "bf16 network",
        "The whole network and its input are bfloat16; the state stays float32.",
        (f"{DIFFUSERS}, torch_dtype=torch.bfloat16",),
        "https://huggingface.co/docs/diffusers/optimization/fp16",
        2,
    ),
    Convention(
        "arithmetic",
        "fp16",
        "fp16 network",
        "The whole network and its input are float16; the state stays float32.",
        (f"{DIFFUSERS}, torch_dtype=torch.float16",),
        "https://huggingface.co/docs/diffusers/optimization/fp16",
        2,
    ),
    Convention(
        "timesteps",
        "bf16",
        "timesteps rounded to bf16",
        "The network is told timesteps that were rounded to bfloat16, as 752 for 750.",
        ("diffusers' pipelines of Flux and SD3 in bf16 (diffusers#9405)", "code that casts t to the network's dtype"),
        "https://github.com/huggingface/diffusers/issues/9405",
        1,
    ),
    Convention(
        "loop",
        "diffusers",
        "diffusers' DDIMPipeline",
        "Images are those of DDIMPipeline and DDIMScheduler with their defaults (leading timesteps, clamped x_0) from"
        " the same x_T; where eta is above 0 its steps have noise of their own, and images are paired no longer.",
        (f"{DIFFUSERS}, DDIMPipeline",),
        "https://huggingface.co/docs/diffusers/api/pipelines/ddim",
        3,
    ),
)
"""All of them, in the order in which they are told."""


TABLE_1: Final[dict[int, Mapping[str, float]]] = {
    10: {"0": 13.36, "1": 41.07, "large": 367.43},
    20: {"0": 6.84, "1": 18.36, "large": 133.37},
    50: {"0": 4.67, "1": 8.01, "large": 32.72},
    100: {"0": 4.16, "1": 5.78, "large": 9.99},
    1000: {"0": 4.04, "1": 4.73, "large": 3.17},
}
"""FID on CIFAR-10 by S, for eta 0, eta 1 and sigma-hat: DDIM's Table 1."""

PUBLISHED: Final[Mapping[tuple[str, str, str], tuple[float, float]]] = {
    ("spacing", "quadratic", "uniform"): (4.16, 5.68),  # CIFAR-10, S = 100: ermongroup/ddim#3
    ("weights", "ema", "raw"): (3.21, 8.06),  # CIFAR-10, DDPM: w86763777/pytorch-ddpm#22
    ("seed", "", "plus_1"): (4.16, 4.26),  # CIFAR-10, S = 100: ermongroup/ddim#3
    ("seed", "", "plus_2"): (4.16, 4.26),
}
"""FIDs by aspect, what is, and what it is changed to: the one and the other."""


def published_effect(aspect: str, base: str, choice: str, steps: int) -> float | None:
    """How far the FID moved where somebody published it, in percent, without its sign; None where nobody did.

    Args:
        aspect, choice: of the change.
        base: what is so far, by the same names; of eta and variance "0", "1" or "large".
        steps: S; of Table 1 the nearest counts.
    """
    if aspect in ("eta", "variance"):
        row = TABLE_1[min(TABLE_1, key=lambda listed: abs(math.log(listed / steps)))]
        pair = (row[base], row[choice]) if base in row and choice in row else None
    else:
        there = PUBLISHED.get((aspect, base, choice))
        back = PUBLISHED.get((aspect, choice, base))
        pair = there if there is not None else None if back is None else (back[1], back[0])
    return None if pair is None else round(abs(pair[1] / pair[0] - 1.0) * 100.0, 1)
