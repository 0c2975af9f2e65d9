"""Reads a .wandb file, a LevelDB log of protobuf records (wandb's own reader is in its Go service)."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768
_FILE_HEADER = 7
_CHUNK_HEADER = struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _LAST = 1, 4


def read_wandb_file(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, body = path.read_bytes(), _FILE_HEADER, b""
    while position + _CHUNK_HEADER.size <= len(data):
        if _BLOCK - position % _BLOCK < _CHUNK_HEADER.size:
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = _CHUNK_HEADER.unpack_from(data, position)
        position += _CHUNK_HEADER.size
        body += data[position : position + length]
        position += length
        if kind in (_WHOLE, _LAST):
            record = Record()
            record.ParseFromString(body)
            body = b""
            yield record


def values(items: Any) -> dict[str, Any]:
    """The items of a history, summary or config record; nested keys joined with dots."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
