"""Read a W&B run file back: 7-byte header, then LevelDB-style blocks of protobuf records (W&B removed its own reader)."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _CHUNK = 32 * 1024, struct.Struct("<IHB")  # checksum, length, type: 1 full, 2 first, 3 middle, 4 last


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Every record of a ``run-*.wandb`` file, in order; a tail that was cut off ends the iteration."""
    data = path.read_bytes()
    magic, number, _version = struct.unpack_from("<4sHB", data)
    assert magic == b":W&B"
    assert number == 0xBEE1
    at, parts = 7, []
    while at + _CHUNK.size <= len(data):
        if _BLOCK - at % _BLOCK < _CHUNK.size:  # the rest of a block that no header fits in is padding
            at += _BLOCK - at % _BLOCK
            continue
        _checksum, length, kind = _CHUNK.unpack_from(data, at)
        if kind == 0 or at + _CHUNK.size + length > len(data):
            return
        parts.append(data[at + _CHUNK.size : at + _CHUNK.size + length])
        at += _CHUNK.size + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def finished(path: Path) -> list[wandb_internal_pb2.Record]:
    """The records of a run that has ended.  W&B's own process may still be writing when ``finish()`` has returned."""
    end = time.monotonic() + 60
    while True:
        found = list(records(path)) if path.stat().st_size > 7 else []
        if any(record.WhichOneof("record_type") == "exit" for record in found) or time.monotonic() > end:
            return found
        time.sleep(0.1)


def history(folder: Path) -> list[dict[str, Any]]:
    """All logged rows of the runs below a folder, oldest file first: key → value, media as dicts with ``_type``."""
    rows = []
    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        for record in finished(path):
            if record.WhichOneof("record_type") == "history":
                row: dict[str, Any] = {}
                for item in record.history.item:
                    *outer, key = [item.key] if item.key else item.nested_key
                    place = row.setdefault(outer[0], {}) if outer else row
                    place[key] = json.loads(item.value_json)
                rows.append(row)
    return rows


def run_ids(folder: Path) -> set[str]:
    """Ids of the runs recorded below a folder."""
    return {
        record.run.run_id
        for path in folder.rglob("run-*.wandb")
        for record in records(path)
        if record.WhichOneof("record_type") == "run"
    }
