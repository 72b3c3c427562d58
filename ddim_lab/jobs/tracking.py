"""Mirror one job into Weights & Biases. The only file that imports wandb; its failures never stop a job.

The files under `outputs/` are the truth; a W&B run repeats them. Hence three rules:

- Nothing here raises. The first error of wandb in a run becomes one warning, and the job goes on untracked.
- Nothing here waits long. Starting and finishing are bounded, and a server that did not answer is not asked
  again in the same process: what was logged stays on disk, for `wandb sync`.
- Jobs never share a run, and every run is finished, as failed if its block raised. Under `wandb agent` the run that it
  started the command for is one of them, and the others are outside its sweep.
"""

from __future__ import annotations

import logging
import os
import shlex
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, final

from pydantic import ValidationError

from ddim_lab.errors import ConfigError

JobType = Literal["train", "cell", "report", "audit"]
Mode = Literal["online", "offline", "off"]
Role = Literal["output", "input"]

UPLOAD_AT_MOST = 64 * 2**20
"""Bytes of an artifact's folder beyond which its large files stay here: a sweep must not wait for an upload."""

SMALL_FILE = 2**20

PROJECT: Final = "ddim_lab"
"""Where neither the command line nor the environment names one."""

MODES: Final = ("online", "offline", "disabled", "dryrun", "run", "shared")
"""What WANDB_MODE may be."""

# What a job's curves are drawn over. Lightning names the first; the second is the number of sampling steps.
_AXES: Mapping[JobType, str] = {"train": "trainer/global_step", "cell": "steps", "report": "steps", "audit": "steps"}

_log = logging.getLogger(__name__)

# Servers that did not answer this process. A sweep meets a dead server once, not once a cell.
_unreachable: set[str] = set()


@dataclass(frozen=True)
class TrackingConfig:
    """How jobs are tracked.

    Attributes:
        logger: "wandb", or "csv" for files alone (wandb is then not even imported).
        directory: folder of the runs' files; a run lies in `directory/wandb/`.
        project: W&B project; None follows `WANDB_PROJECT` and `wandb init`, and without them is "ddim_lab".
        entity: W&B user or team; None follows `WANDB_ENTITY`, and without it is the account's default.
        mode: "auto" follows `WANDB_MODE` and `wandb offline`, and without them is online when somebody is
            logged in and offline when nobody is. "online" and "offline" win over the environment.
        init_timeout_seconds: how long to wait for the server before going offline.
        finish_timeout_seconds: how long to wait for the upload at a run's end before leaving it to `wandb sync`.
    """

    logger: Literal["wandb", "csv"]
    directory: Path
    project: str | None = None
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    init_timeout_seconds: float = 10.0
    finish_timeout_seconds: float = 20.0


@final
class Run:
    """One job's run. Every method does nothing when the run is off, and none raises.

    Made by `track`. `mode` is "online", "offline" (the data wait on disk for `wandb sync`, also when an upload
    was cut short) or "off".
    """

    def __init__(self, backend: Any = None, mode: Mode = "off", axis: str = "steps") -> None:
        self.mode: Mode = mode
        self._backend = backend
        self._axis = axis
        self._broken = False

    @property
    def directory(self) -> Path | None:
        """The run's folder, to give to `wandb sync`; None when off."""
        return None if self._backend is None else Path(self._backend.dir).parent

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers. `step` is the job's x axis (training step, or sampling steps) and may come in any order."""
        at = {} if step is None else {self._axis: step}
        self._send(lambda backend: backend.log({**values, **at}))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's final values, one column each in W&B's table of runs."""
        self._send(lambda backend: backend.summary.update(dict(values)))

    def image(self, name: str, image: Path | bytes, caption: str | None = None) -> None:
        """Log a picture: a file, or an encoded picture (PNG, JPEG) in memory."""

        def send(backend: Any) -> None:
            import io

            import wandb
            from PIL import Image

            source = str(image) if isinstance(image, Path) else Image.open(io.BytesIO(image))
            backend.log({name: wandb.Image(source, caption=caption)})

        self._send(send)

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Log a table. A column may mix numbers, text and None."""

        def send(backend: Any) -> None:
            import wandb

            data = [list(row) for row in rows]
            backend.log({name: wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

        self._send(send)

    def html(self, name: str, path: Path) -> None:
        """Log a self-contained HTML page, byte for byte."""

        def send(backend: Any) -> None:
            import wandb

            backend.log({name: wandb.Html(path.read_text(encoding="utf-8"), inject=False, data_is_not_path=True)})

        self._send(send)

    def artifact(self, folder: Path, name: str, kind: str, role: Role, metadata: Mapping[str, Any]) -> None:
        """Log a folder as a version of an artifact that this run made ("output") or used ("input").

        The same files are the same version, whichever run names them: that is what joins a training to its cells. The
        files are neither copied nor changed, so they must stay as they are until they are uploaded. Of a folder beyond
        UPLOAD_AT_MOST only the small files go; the metadata then say which were left out.
        """

        def send(backend: Any) -> None:
            import wandb

            files = sorted(path for path in folder.rglob("*") if path.is_file())
            sizes = {path: path.stat().st_size for path in files}
            large = sum(sizes.values()) > UPLOAD_AT_MOST
            left_out = [path for path in files if large and sizes[path] > SMALL_FILE]
            told = {"left_out": [path.relative_to(folder).as_posix() for path in left_out]} if left_out else {}
            artifact = wandb.Artifact(name, type=kind, metadata={**metadata, **told})
            for path in files:
                if path not in left_out:
                    artifact.add_file(str(path), name=path.relative_to(folder).as_posix(), policy="immutable")
            if role == "output":
                backend.log_artifact(artifact)
            else:
                # What use_artifact does with an artifact of files. It refuses offline, where only the wait for the
                # server can't be had: the record itself is written, and `wandb sync` acts on it.
                backend._log_artifact(artifact, is_user_created=True, use_after_commit=True)

        self._send(send)

    def _send(self, action: Callable[[Any], object]) -> None:
        if self._backend is None or self._broken:
            return
        try:
            action(self._backend)
        except Exception as error:
            self._broken = True
            _warn("W&B failed; this run is tracked no further, its results are in the files", error)

    def _finish(self, *, failed: bool) -> None:
        if self._backend is None:
            return
        try:
            self._backend.finish(exit_code=1 if failed else 0)
        except TimeoutError:
            self.mode = "offline"
            _unreachable.add(self._backend.settings.base_url)
            _log.warning("W&B did not take the run in time; the rest of this process is tracked offline.")
        except Exception as error:
            if not self._broken:
                _warn("W&B failed to finish the run; its results are in the files", error)
            _drop_service()


@contextmanager
def track(
    config: TrackingConfig,
    *,
    job_type: JobType,
    name: str,
    group: str,
    run_config: Mapping[str, Any],
    tags: Sequence[str] = (),
    agents: bool = False,
) -> Iterator[Run]:
    """Track one job: a run of its own, finished when the block ends and marked failed when it raises.

    Args:
        config: where and how.
        job_type: "train", "cell", "report" or "audit"; it fixes the x axis of `Run.log`.
        name: what the run is called among its group.
        group: the sweep it belongs to.
        run_config: the job's resolved configuration, plain nested values.
        tags: labels, cut to the 64 characters that W&B allows.
        agents: whether it is the run that `wandb agent` started this command for, if one did: its id, sweep and
            project are then the agent's.
    """
    run = _start(config, job_type, name, group, run_config, tags, agents)
    try:
        yield run
    except BaseException:
        run._finish(failed=True)
        raise
    run._finish(failed=False)


def check_mode(mode: str) -> None:
    """Raise ConfigError where `mode` is auto and WANDB_MODE, which it follows, is no mode of W&B's."""
    given = os.environ.get("WANDB_MODE")
    if mode == "auto" and given and given not in MODES:
        raise ConfigError(
            f"WANDB_MODE={given} in the environment is no mode of W&B; {', '.join(MODES)} are: set it to one of them,"
            " or give logger.mode=offline, or logger=csv"
        )


def offline_sync_hint(directories: Iterable[Path]) -> str | None:
    """The command that uploads these runs' folders, or None where there is nothing to upload.

    Where they are all the offline runs of their parent folder, one pattern names them.
    """
    runs = set(directories)
    # `wandb sync` passes over a run that was begun online, even one that is named.
    arguments = [] if all(run.name.startswith("offline-run-") for run in runs) else ["--include-online"]
    for parent in sorted({run.parent for run in runs}):
        offline = set(parent.glob("offline-run-*"))
        if len(offline) > 1 and offline <= runs:
            arguments.append(f"{shlex.quote(str(parent))}/offline-run-*")
            runs -= offline
    arguments.extend(shlex.quote(str(run)) for run in sorted(runs))
    return " ".join(["wandb", "sync", *arguments]) if arguments else None


def _start(
    config: TrackingConfig,
    job_type: JobType,
    name: str,
    group: str,
    run_config: Mapping[str, Any],
    tags: Sequence[str],
    agents: bool,
) -> Run:
    """A live run, or one that is off."""
    if config.logger == "csv":
        return Run()
    with _hidden_from_wandb(config) as agent:
        return _started(config, job_type, name, group, run_config, tags, agent if agents else None)


def _started(
    config: TrackingConfig,
    job_type: JobType,
    name: str,
    group: str,
    run_config: Mapping[str, Any],
    tags: Sequence[str],
    agent: _Agent | None,
) -> Run:
    try:
        # wandb's own error reports hold up the end of a process by 20 s where the server doesn't answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        library = wandb.setup(wandb.Settings(silent=True, x_service_wait=config.init_timeout_seconds)).settings
        project, entity = config.project or library.project or PROJECT, config.entity
        settings = _settings(config, job_type)
        if agent is not None:  # a sweep is in a project, and its runs are nowhere else
            project, entity = library.project or project, library.entity or entity
            settings.sweep_id = agent.sweep
            run_config = {**run_config, **agent.parameters()}

        def init(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(
                mode=mode,
                id=uuid.uuid4().hex[:12] if agent is None else agent.run,
                project=project,
                entity=entity,
                dir=str(config.directory.absolute()),
                job_type=job_type,
                name=name,
                group=group,
                tags=[tag[:64] for tag in dict.fromkeys(tags)],  # longer or repeated ones it refuses
                config=dict(run_config),
                settings=settings,
            )

        mode = _mode(config, library)
        if mode == "off":
            return Run()
        if mode == "online":
            try:
                backend = init("online")
            except Exception as error:
                _unreachable.add(library.base_url)
                _warn("W&B did not take the run; tracking offline from here on", error)
                mode = "offline"
        if mode == "offline":
            backend = init("offline")
    except Exception as error:
        _warn("W&B did not start; this run is not tracked, its results are in the files", error)
        _drop_service()
        return Run()

    axis = _AXES[job_type]
    run = Run(backend, mode, axis)
    run._send(lambda backend: backend.define_metric(axis))
    run._send(lambda backend: backend.define_metric("*", step_metric=axis))
    return run


@final
@dataclass(frozen=True)
class _Agent:
    """What `wandb agent` started this command for: a run of its sweep, and the file of the run's parameters."""

    sweep: str
    run: str
    file: str | None

    def parameters(self) -> dict[str, Any]:
        """What the sweep chose, by the names that it has for it; empty where the agent's file can't be read."""
        from wandb.sdk.lib import config_util

        with suppress(Exception):
            return dict(config_util.dict_from_config_file(self.file, must_exist=True) or {})
        return {}


@contextmanager
def _hidden_from_wandb(config: TrackingConfig) -> Iterator[_Agent | None]:
    """Hides the agent's variables, which wandb would take for every run of the process, and a WANDB_MODE overruled."""
    names = ["WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"]
    if config.mode != "auto" or not os.environ.get("WANDB_MODE"):
        names.append("WANDB_MODE")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    sweep, run = hidden.get("WANDB_SWEEP_ID"), hidden.get("WANDB_RUN_ID")
    try:
        yield _Agent(sweep, run, hidden.get("WANDB_SWEEP_PARAM_PATH")) if sweep and run else None
    finally:
        os.environ.update(hidden)


def _settings(config: TrackingConfig, job_type: JobType) -> Any:
    """What wandb is told to do, and above all not to do, in a run."""
    import wandb

    return wandb.Settings(
        reinit="create_new",
        init_timeout=config.init_timeout_seconds,
        finish_timeout=config.finish_timeout_seconds,
        finish_timeout_raises=True,
        silent=True,
        console="off",
        symlink=False,
        use_dot_wandb=False,
        allow_offline_artifacts=False,  # they keep a table's data outside the run's folder
        # The files hold the environment that matters. No code, host, user or command line goes out, and no sampling
        # thread runs beside a cell's timing.
        host="",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        label_disable=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_machine_info=job_type != "train",
        x_disable_stats=job_type != "train",
        x_save_requirements=False,
    )


def _mode(config: TrackingConfig, library: Any) -> Mode:
    """Online, offline or off, found without a prompt and without the network."""
    wanted = config.mode if config.mode != "auto" else os.environ.get("WANDB_MODE") or library.mode
    if wanted == "disabled":
        return "off"
    if wanted in ("offline", "dryrun") or library.base_url in _unreachable:
        return "offline"
    try:
        known = _has_credentials(library)
    except Exception as error:
        _warn("W&B: the login can't be used; tracking offline", error)
        return "offline"
    if not known:
        if config.mode == "online":
            _log.warning("W&B: nobody is logged in (`wandb login` does it); tracking offline.")
        return "offline"
    return "online"


def logged_in() -> bool:
    """Whether there are credentials for W&B, found without a prompt and without the network."""
    import wandb

    with suppress(Exception):
        return _has_credentials(wandb.setup(wandb.Settings(silent=True)).settings)
    return False


def _has_credentials(library: Any) -> bool:
    from wandb.sdk.lib import wbauth

    found = wbauth.authenticate_session(host=library.base_url, source="ddim_lab", prompt=False, update_session=False)
    return found is not None


def _drop_service() -> None:
    """Forget wandb's helper process, which has most likely died, so that the next run starts a new one."""
    with suppress(Exception):
        import wandb

        wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)  # the address of a helper that a parent process had started


def _warn(what: str, error: Exception) -> None:
    if isinstance(error, ValidationError):  # of wandb's settings, which the environment or a file has; by name
        fault = error.errors()[0]
        text = f"setting {'.'.join(map(str, fault['loc']))}={fault['input']}: {fault['msg']}"
    else:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    _log.warning("%s (%s).", what, text.rstrip("."))
