"""The Arrow file of a memory: written from its rows, and checked when somebody else may have written it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from evertune.memory.logits import LOGITS

SCHEMA = pa.schema(
    [
        ("id", pa.large_string()),
        ("label", pa.large_string()),
        ("experience", pa.large_string()),
        ("priority", pa.float64()),
        ("length", pa.int32()),  # number of tokens; null if the example is not a tokenised text
        ("data", pa.large_binary()),
        ("logits", LOGITS),  # that the model gave when the example was stored; null if nobody asked for them
    ]
)
_MAGIC = 8  # bytes of the magic number before the first message
_METADATA_V5 = 4  # the number of this version of Arrow's metadata; versions before hid compression elsewhere
_VERSION, _HEADER, _COMPRESSION = 0, 2, 3  # numbers of fields: of a Message, of a Message, and of a RecordBatch


def serialised(table: pa.Table, settings: dict[str, Any]) -> pa.Buffer:
    """The content of the file of a memory."""
    table = table.combine_chunks().replace_schema_metadata({b"evertune": json.dumps(settings).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def checked_table(data: pa.Buffer) -> pa.Table:
    """The rows of an Arrow file that somebody else may have written; they share its memory.

    A compressed file, which could unpack to far more than its size, is refused before anything is unpacked: a memory
    writes none. Offsets are compared with the buffers that they point into: Arrow itself would read beyond them. The
    columns are checked before any row is read.

    Raises:
        ArrowInvalid, OSError, ValueError: If it is not the file of a memory.
    """
    reader = pa.ipc.open_file(data)
    if not reader.schema.equals(SCHEMA):
        raise ValueError(f"it has other columns ({', '.join(reader.schema.names)[:200]})")
    # The very messages that were checked are read, and not those to which the end of the file points.
    batches = [pa.ipc.read_record_batch(message, reader.schema) for message in _uncompressed(data)]
    if len(batches) != reader.num_record_batches:
        raise ValueError(f"it holds {len(batches)} batches of rows, and its end says {reader.num_record_batches}")
    table = pa.Table.from_batches(batches, reader.schema)
    table.validate(full=True)
    for name in ("id", "experience", "priority", "data"):
        if table.column(name).null_count:
            raise ValueError(f"a row has no {name}")
    return table.combine_chunks() if len(batches) > 1 else table


def _uncompressed(data: pa.Buffer) -> Iterator[pa.Message]:
    """The batches of rows in a file."""
    messages = pa.ipc.MessageReader.open_stream(data.slice(_MAGIC))
    next(messages, None)  # the schema
    for message in messages:
        if message.type != "record batch":
            raise ValueError(f"it holds a message of type {message.type!r}")
        metadata = message.metadata.to_pybytes()
        root = _pointed_to(metadata, 0)
        version = _field(metadata, root, _VERSION)
        if version is None or struct.unpack_from("<h", metadata, version) != (_METADATA_V5,):
            raise ValueError("it has an older version of Arrow's metadata than a memory writes")
        header = _field(metadata, root, _HEADER)
        if header is None or _field(metadata, _pointed_to(metadata, header), _COMPRESSION) is not None:
            raise ValueError(
                "its rows are compressed, and could unpack to far more than its size; a memory's never are"
            )
        yield message


def _pointed_to(flatbuffer: bytes, position: int) -> int:
    """The position to which the offset at a position of a FlatBuffer points."""
    offset: int = struct.unpack_from("<I", flatbuffer, position)[0]
    return position + offset


def _field(flatbuffer: bytes, table: int, number: int) -> int | None:
    """The position of a field of a table in a FlatBuffer, which Arrow has verified; None if the field is not set."""
    fields: int = table - struct.unpack_from("<i", flatbuffer, table)[0]
    (size,) = struct.unpack_from("<H", flatbuffer, fields)
    place = 4 + 2 * number
    offset: int = struct.unpack_from("<H", flatbuffer, fields + place)[0] if place < size else 0
    return table + offset if offset else None
