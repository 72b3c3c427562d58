"""What diffusers' scheduler classes are of, and what of their settings says so. Facts alone: imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "ASTRAY",
    "NEEDED",
    "OF_THE_PROCESS",
    "OTHERS",
    "VARIANCE_PRESERVING",
    "check_class",
    "claimed_order",
    "process_of",
]

OURS: Final = "a discrete variance-preserving process"

_HO: Final = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
_LATENT: Final = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012}

VARIANCE_PRESERVING: Final[dict[str, dict[str, Any]]] = {
    "DDIMInverseScheduler": _HO,
    "DDIMParallelScheduler": _HO,
    "DDIMScheduler": _HO,
    "DDPMParallelScheduler": _HO,
    "DDPMScheduler": _HO,
    "DEISMultistepScheduler": _HO,
    "DPMSolverMultistepInverseScheduler": _HO,
    "DPMSolverMultistepScheduler": _HO,
    "DPMSolverSDEScheduler": _LATENT,
    "DPMSolverSinglestepScheduler": _HO,
    "EulerAncestralDiscreteScheduler": _HO,
    "EulerDiscreteScheduler": _HO,
    "HeunDiscreteScheduler": _LATENT,
    "KDPM2AncestralDiscreteScheduler": _LATENT,
    "KDPM2DiscreteScheduler": _LATENT,
    "LMSDiscreteScheduler": _HO,
    "PNDMScheduler": _HO,
    "RePaintScheduler": _HO,
    "SASolverScheduler": _HO,
    "UnCLIPScheduler": {**_HO, "beta_schedule": "squaredcos_cap_v2"},
    "UniPCMultistepScheduler": _HO,
}
"""diffusers' schedulers of the discrete variance-preserving process, and the betas that each has where it names none.

They walk differently, which is no matter here: a network is of the process that it was trained on.
"""

OTHERS: Final[dict[str, tuple[str, ...]]] = {
    "flow matching": (
        *("FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
        *("FlowMatchLCMScheduler", "HeliosDMDScheduler", "HeliosScheduler", "LTXEulerAncestralRFScheduler"),
        *("MiniMaxH3Scheduler", "PiflowScheduler"),
    ),
    "EDM, whose noise is a continuous sigma": (
        *("CosineDPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"),
    ),
    "a variance-exploding process": ("KarrasVeScheduler", "ScoreSdeVeScheduler"),
    "a variance-preserving process in continuous time": (
        *("DDPMWuerstchenScheduler", "IPNDMScheduler", "ScoreSdeVpScheduler"),
    ),
    "a consistency model, whose network predicts where a walk ends": (
        *("CMStochasticIterativeScheduler", "ConsistencyDecoderScheduler", "LCMScheduler", "SCMScheduler"),
        "TCDScheduler",
    ),
    "a process whose alpha_bar is shifted": ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
    "a process on tokens": (
        *("AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"),
        "VQDiffusionScheduler",
    ),
}
"""What those are of that are not; one that stands in neither table is refused, too."""

OF_THE_PROCESS: Final = {
    *("beta_schedule", "beta_start", "beta_end", "trained_betas", "num_train_timesteps", "prediction_type"),
    *("predict_epsilon", "rescale_betas_zero_snr", "timestep_type", "use_flow_sigmas"),
}
"""Entries that say what the network was trained on: each is checked."""

ASTRAY: Final = {
    "DDIMInverseScheduler": "walks from an image to noise",
    "DPMSolverMultistepInverseScheduler": "walks from an image to noise",
    "RePaintScheduler": "fills in a part of an image that is given",
    "UnCLIPScheduler": "has betas of its own alone",
}
"""Those of the variance-preserving ones that take no walk from noise to image by our betas, and why."""

NEEDED: Final = "a discrete variance-preserving process is needed, one of betas, as of DDPMScheduler or DDIMScheduler"


def check_class(kind: Any) -> None:
    """Raise ValueError unless a scheduler's class is of the discrete variance-preserving process."""
    process = process_of(kind) if isinstance(kind, str) else None
    if process == OURS:
        return
    what = f"{kind} is not known here" if process is None else f"{kind} is of {process}"
    raise ValueError(f"{what}; {NEEDED}")


def process_of(kind: str) -> str | None:
    """A key of `OTHERS`, `OURS`, or None for a class that is not known here."""
    if kind in VARIANCE_PRESERVING:
        return OURS
    return next((process for process, kinds in OTHERS.items() if kind in kinds), None)


def claimed_order(kind: str, options: Mapping[str, Any]) -> int | None:
    """The order of convergence that a scheduler's method is said to have on the ODE; None where nothing is said."""
    if options.get("thresholding") or (options.get("clip_sample", kind in CLIPS)):
        return None
    if kind in SOLVER_ORDER:
        order = int(options.get("solver_order", 2))
        return order + 1 if kind == "UniPCMultistepScheduler" and not options.get("disable_corrector") else order
    return ORDERS.get(kind)


CLIPS: Final = ("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler")
"""Those that clamp the predicted image to [-1, 1] where nothing is said."""

SOLVER_ORDER: Final = (
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    "UniPCMultistepScheduler",
)
"""Those of the order that their `solver_order` says, 2 by default; UniPC's corrector adds one."""

ORDERS: Final = {
    "DDIMParallelScheduler": 1,
    "DDIMScheduler": 1,
    "EulerDiscreteScheduler": 1,
    "HeunDiscreteScheduler": 2,
    "KDPM2DiscreteScheduler": 2,
    "PNDMScheduler": 2,
}
"""The others' orders: Song et al. 2021; Karras et al. 2022 (Heun, and DPM-2 as k-diffusion has it); Liu et al. 2022."""
