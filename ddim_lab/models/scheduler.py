"""A diffusers `scheduler_config.json`: of which process it is, and its betas and prediction where that is ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

from ddim_lab.diffusion import Prediction
from ddim_lab.schedule import NoiseSchedule
from ddim_lab.schedulers.classes import NEEDED, OF_THE_PROCESS, VARIANCE_PRESERVING, check_class

__all__ = ["Process", "read_process"]

PREDICTIONS: Final[dict[str, Prediction]] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""diffusers' names of what a network predicts, and ours."""

SCHEDULES: Final = {
    "linear": NoiseSchedule.linear,
    "scaled_linear": NoiseSchedule.scaled_linear,
    "sigmoid": NoiseSchedule.sigmoid,
}
"""diffusers' schedules that have two ends; ours have the same names."""

OF_THE_WALK: Final = {
    *("algorithm_type", "clip_sample", "clip_sample_range", "corrector_order", "disable_corrector"),
    *("dynamic_thresholding_ratio", "eta", "euler_at_final", "final_sigmas_type", "flow_shift", "interpolation_type"),
    *("lambda_min_clipped", "lower_order_final", "noise_sampler_seed", "num_inference_steps", "predict_x0"),
    *("predictor_order", "sample_max_value", "set_alpha_to_one", "shift_terminal", "sigma_max", "sigma_min"),
    *("skip_prk_steps", "solver_order", "solver_p", "solver_type", "steps_offset", "tau_func", "tensor_format"),
    *("thresholding", "time_shift_type", "timestep_spacing", "timestep_values", "timesteps", "use_beta_sigmas"),
    *("use_clipped_model_output", "use_dynamic_shifting", "use_exponential_sigmas", "use_karras_sigmas"),
    *("use_lu_lambdas", "variance_type"),
}
"""Entries that say how diffusers would sample: conf/sampler says that here."""


@final
@dataclass(frozen=True)
class Process:
    """What a checkpoint was trained on.

    Attributes:
        schedule: its betas.
        described: the options of ours that give them; the number of timesteps alone where they are a list.
        listed: whether they are a list.
        prediction: what the network predicts.
    """

    schedule: NoiseSchedule
    described: dict[str, Any]
    listed: bool
    prediction: Prediction


def read_process(config: dict[str, Any]) -> Process:
    """The process of a diffusers scheduler's configuration.

    Raises:
        ValueError: it is no discrete variance-preserving one that is known here; says what it is and what is needed.
    """
    given = {name: value for name, value in config.items() if value not in (None, False) and not name.startswith("_")}
    if (kind := config.get("_class_name")) is None:
        if not {"beta_schedule", "trained_betas"} & set(given):
            raise ValueError(f"it names neither its class nor betas; {NEEDED}")
        kind = "DDPMScheduler"
    check_class(kind)
    if "use_flow_sigmas" in given:
        raise ValueError(f"use_flow_sigmas=true is flow matching, whatever walks it; {NEEDED}")
    if given.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"timestep_type={given['timestep_type']}: its noise is a continuous sigma; {NEEDED}")
    if "rescale_betas_zero_snr" in given:
        raise ValueError("rescale_betas_zero_snr=true is not supported: its last alpha_bar is 0")
    if unknown := sorted(set(given) - OF_THE_PROCESS - OF_THE_WALK):
        raise ValueError(
            f"{unknown[0]}={given[unknown[0]]} is not known here, and may be of another process; {NEEDED}; if it"
            " changes only how diffusers samples, take it out of the file"
        )
    schedule, described = _betas({**VARIANCE_PRESERVING[kind], **config})
    return Process(schedule, described, config.get("trained_betas") is not None, _prediction(config))


def _betas(config: dict[str, Any]) -> tuple[NoiseSchedule, dict[str, Any]]:
    """A diffusers scheduler's schedule, and the options of ours that give it (its length alone, for a list)."""
    total = config.get("num_train_timesteps", 1000)
    if (listed := config.get("trained_betas")) is not None:
        if not isinstance(listed, list) or not all(_is_number(beta) for beta in listed):
            raise ValueError("trained_betas is no list of numbers")
        return NoiseSchedule(listed), {"schedule.num_timesteps": len(listed)}
    kind = config["beta_schedule"]
    if kind == "squaredcos_cap_v2":
        described = {"schedule": "cosine", "schedule.num_timesteps": total}
        return NoiseSchedule.cosine(total), {**described, "schedule.offset": 0.008, "schedule.max_beta": 0.999}
    if not isinstance(kind, str) or kind not in SCHEDULES:
        raise ValueError(f"beta_schedule={kind} is not known; {', '.join(SCHEDULES)} and squaredcos_cap_v2 are")
    start, end = config["beta_start"], config["beta_end"]
    for name, value in (("beta_start", start), ("beta_end", end)):
        if not _is_number(value):
            raise ValueError(f"{name}={value!r} is not a number")
    described = {"schedule": kind, "schedule.num_timesteps": total}
    return SCHEDULES[kind](total, start, end), {**described, "schedule.beta_start": start, "schedule.beta_end": end}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _prediction(config: dict[str, Any]) -> Prediction:
    """What the network predicts; files of 2022 say it by predict_epsilon."""
    of_old = config.get("predict_epsilon")
    said = "sample" if of_old is False else "epsilon"
    kind = config.get("prediction_type", said)
    if not isinstance(kind, str) or kind not in PREDICTIONS:
        raise ValueError(f"prediction_type={kind} is not known; {', '.join(PREDICTIONS)} are")
    if of_old is not None and kind != said:
        raise ValueError(f"predict_epsilon={of_old} and prediction_type={kind} contradict each other")
    return PREDICTIONS[kind]
