"""Read a W&B run's transaction file (`run-ID.wandb`): what an offline run will upload.

A header of 7 bytes, then blocks of 32,768 bytes as in LevelDB's log: chunks with a CRC-32, a length and a type
(whole, first, middle, last), padded with zeros where less than a chunk's head fits. A record is a protobuf.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32_768
_HEAD = struct.Struct("<IHB")
_FILE_HEAD = 7
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class OfflineArtifact:
    """An artifact that a run made, or used."""

    name: str
    kind: str
    digest: str
    """Of the files' names and contents."""
    used: bool
    files: dict[str, Path]
    metadata: dict[str, Any]


@dataclass
class OfflineRun:
    """What was logged, as plain values. Nested keys are joined by a dot."""

    config: dict[str, Any] = field(default_factory=dict)
    id: str = ""
    sweep: str = ""
    """Of W&B's agents."""
    project: str = ""
    group: str = ""
    job_type: str = ""
    name: str = ""
    host: str = ""
    tags: tuple[str, ...] = ()
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    """Metric (or pattern of metrics) -> the metric it is drawn over."""
    artifacts: list[OfflineArtifact] = field(default_factory=list)
    exit_code: int | None = None
    """None where the run was never finished."""
    record_types: set[str] = field(default_factory=set)

    def values(self, key: str) -> list[Any]:
        """All that was logged under a key, in order."""
        return [row[key] for row in self.history if key in row]


def read_run(directory: Path, *, wait_seconds: float = 5.0) -> OfflineRun:
    """Read the run in a folder such as `wandb/offline-run-20261122_202730-243g19vv`.

    A run's last records reach the disk some milliseconds after `finish` returned: this waits for the very last.
    """
    (path,) = directory.glob("*.wandb")
    deadline = time.monotonic() + wait_seconds
    while (run := _read(path)).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return run


def _read(path: Path) -> OfflineRun:
    from wandb.proto import wandb_internal_pb2

    run = OfflineRun()
    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        run.record_types.add(kind)
        if kind == "run":
            run.config.update(_items(record.run.config.update))
            run.config.pop("_wandb", None)
            run.id, run.sweep = record.run.run_id, record.run.sweep_id
            run.project, run.group = record.run.project, record.run.run_group
            run.job_type, run.name = record.run.job_type, record.run.display_name
            run.host, run.tags = record.run.host, tuple(record.run.tags)
        elif kind == "history":
            run.history.append(_items(record.history.item))
        elif kind == "summary":
            run.summary.update(_items(record.summary.update))
        elif kind == "metric" and record.metric.step_metric:
            run.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            found = record.artifact
            files = {entry.path: Path(entry.local_path) for entry in found.manifest.contents}
            metadata = json.loads(found.metadata or "{}")
            run.artifacts.append(
                OfflineArtifact(found.name, found.type, found.digest, found.use_after_commit, files, metadata)
            )
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _items(items: Any) -> dict[str, Any]:
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def _payloads(data: bytes) -> Iterator[bytes]:
    """The records' bytes; a last one that is not written to its end is left out."""
    if data and data[:4] != b":W&B":
        raise ValueError("not a W&B transaction file")
    at, parts = _FILE_HEAD, b""
    while at + _HEAD.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEAD.size:
            at += left
            continue
        checksum, length, kind = _HEAD.unpack_from(data, at)
        chunk = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(chunk) < length:
            return
        if zlib.crc32(bytes([kind]) + chunk) != checksum:
            raise ValueError(f"bad checksum at byte {at}")
        at += _HEAD.size + length
        parts = chunk if kind in (_WHOLE, _FIRST) else parts + chunk
        if kind in (_WHOLE, _LAST):
            yield parts
