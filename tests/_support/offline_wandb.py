"""Read offline W&B runs back from the files that ``wandb sync`` would send."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
HEADER = struct.Struct("<4sHB")  # of the file: name, magic number, version
RECORD = struct.Struct("<IHB")  # of a piece of a record: checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What W&B was told of one run.

    Attributes:
        folder: ``offline-run-...``, with ``files/media`` in it.
        config: by key.
        summary: the last value by key.
        history: logged rows, in order.
        finished: whether the run said so.
    """

    folder: Path
    id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    def table(self, key: str) -> list[dict[str, Any]]:
        """Rows of a logged ``wandb.Table``."""
        content = json.loads((self.folder / "files" / self.summary[key]["path"]).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def read_offline_runs(folder: Path, wait: float = 20) -> list[OfflineRun]:
    """All offline runs below ``folder``, in the order of their start; see :func:`read_offline_run`."""
    return [read_offline_run(path, wait) for path in sorted(folder.rglob("offline-run-*/run-*.wandb"))]


def read_offline_run(path: Path, wait: float = 20) -> OfflineRun:
    """One run, from its ``.wandb`` file.

    W&B's service may still be writing when ``wandb.finish`` returns: the end of the run is waited for, at most ``wait``
    seconds.
    """
    deadline = time.monotonic() + wait
    while not (run := _read(path)).finished and time.monotonic() < deadline:
        time.sleep(0.1)
    return run


def _read(path: Path) -> OfflineRun:
    from wandb.proto import wandb_internal_pb2

    run = OfflineRun(path.parent)
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            r = record.run
            run.id, run.name, run.project, run.group = r.run_id, r.display_name, r.project, r.run_group
            run.job_type, run.tags = r.job_type, list(r.tags)
            _update(run.config, r.config)
            _update(run.summary, r.summary)
        elif kind == "config":
            _update(run.config, record.config)
        elif kind == "summary":
            _update(run.summary, record.summary)
        elif kind == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                _put(row, item)
            run.history.append(row)
            run.summary.update(row)
        elif kind == "exit":
            run.finished = record.exit.exit_code == 0
    return run


def _update(values: dict[str, Any], change: Any) -> None:
    for item in change.update:
        _put(values, item)


def _put(values: dict[str, Any], item: Any) -> None:
    keys = list(item.nested_key) or [item.key]
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    values[keys[-1]] = json.loads(item.value_json)


def _records(content: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format: blocks of 32 KiB, and records in pieces where they cross a block."""
    if len(content) < HEADER.size:
        return
    name, magic, _ = HEADER.unpack_from(content)
    assert (name, magic) == (b":W&B", 0xBEE1), "not a file of W&B"
    place, parts = HEADER.size, b""
    while place < len(content):
        if BLOCK - place % BLOCK < RECORD.size:  # padding
            place += BLOCK - place % BLOCK
            continue
        if len(content) - place < RECORD.size:
            return  # not written to its end yet
        checksum, length, kind = RECORD.unpack_from(content, place)
        data = content[place + RECORD.size : place + RECORD.size + length]
        if len(data) < length:
            return
        assert zlib.crc32(data, zlib.crc32(bytes([kind]))) == checksum, "damaged"
        place += RECORD.size + length
        parts = data if kind in (FULL, FIRST) else parts + data
        if kind in (FULL, LAST):
            yield parts
