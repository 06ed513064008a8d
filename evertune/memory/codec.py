"""Training examples as bytes and back, without pickle.

The encoding is a magic number, a JSON header that describes the containers, and the raw buffers of tensors, arrays and
long lists of numbers. Decoding never imports a module and never runs code named in the bytes: see
:mod:`~evertune.memory.objects`.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evertune.memory.objects import MissingTypeError, put_together, take_apart

_MAGIC = b"EVX1"
_ALIGNMENT = 16
_PACK_FROM = 8  # length; shorter lists of numbers stay in the header
_TORCH_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
}
_SUPPORTED = (
    "replay stores tensors, numpy arrays, strings, bytes, numbers, booleans, dates and None in dicts, lists and "
    "tuples, and the namedtuples, dataclasses and enums at the top of a module; return these from the dataset and "
    "build other types in the collate_fn"
)


def encode(example: Any) -> bytes:
    """Encode one example as bytes.

    Args:
        example: Tensors (any device and memory layout; stored dense, on the CPU), numpy arrays and scalars, ``str``,
            ``bytes``, ``int``, ``float``, ``bool``, ``date``, ``datetime``, ``timedelta`` and ``None``, nested in
            ``dict``, ``OrderedDict``, ``list``, ``tuple`` and transformers' ``BatchEncoding`` (its ``encodings`` are
            left out). Also namedtuples, dataclasses and enums whose class can be found by its module and name.

    Raises:
        TypeError: If the example contains anything else; the message names its type and its place.

    Example:
        >>> decode(encode({"text": "hello", "ids": (1, 2), "x": torch.ones(2)}))
        {'text': 'hello', 'ids': (1, 2), 'x': tensor([1., 1.])}
    """
    buffers = _Buffers()
    header = json.dumps(_describe(example, buffers, "example"), separators=(",", ":"), allow_nan=False).encode()
    prefix = _MAGIC + struct.pack("<I", len(header)) + header
    return b"".join([prefix, bytes(-len(prefix) % _ALIGNMENT), *buffers.chunks])


def decode(data: bytes | bytearray | memoryview) -> Any:
    """Decode an example that :func:`encode` encoded. Tensors and arrays own their memory and are writable.

    The attributes of a dataclass are restored; its ``__init__`` and ``__post_init__`` do not run again.

    Raises:
        ValueError: If the bytes are not an encoded example, or are truncated.
        MissingTypeError: If the example holds an object whose class this process has not imported.
    """
    # A writable copy: frombuffer would otherwise return read-only tensors that share the caller's bytes.
    memory = bytearray(data)
    try:
        if memory[:4] != _MAGIC:
            raise ValueError("wrong magic number")
        (length,) = struct.unpack_from("<I", memory, 4)
        start = 8 + length
        header = json.loads(memory[8:start])
        return _build(header, memory, start + -start % _ALIGNMENT)
    except MissingTypeError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        raise ValueError(f"not an encoded example, or a damaged one: {error}") from error


class _Buffers:
    """The raw bytes after the header, with every chunk aligned."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.size = 0

    def add(self, data: bytes) -> tuple[int, int]:
        """Append ``data`` and return its offset and length."""
        padding = -self.size % _ALIGNMENT
        offset = self.size + padding
        self.chunks += [bytes(padding), data]
        self.size = offset + len(data)
        return offset, len(data)


def _describe(value: Any, buffers: _Buffers, where: str) -> Any:  # noqa: PLR0911  (one return a type)
    kind = type(value)
    if value is None or kind in (bool, str, int):
        return value
    if kind is float:
        return value if math.isfinite(value) else ["float", str(value)]
    if kind is dict:
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"cannot store {where}: a dict key of type {type(key).__name__}; {_SUPPORTED}")
        return ["dict", [[key, _describe(item, buffers, f"{where}[{key!r}]")] for key, item in value.items()]]
    if kind in (list, tuple):
        # A list of token ids as JSON numbers would take several times the space and time.
        if kind is list and len(value) >= _PACK_FROM and (packed := _pack(value)) is not None:
            return ["numbers", packed.dtype.str, *buffers.add(packed.tobytes())]
        return [kind.__name__, [_describe(item, buffers, f"{where}[{index}]") for index, item in enumerate(value)]]
    if kind is bytes:
        return ["bytes", *buffers.add(value)]
    if kind is Tensor and value.layout is torch.strided and str(value.dtype) in _TORCH_DTYPES:
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return ["tensor", str(value.dtype), list(value.shape), *buffers.add(flat.numpy().tobytes())]
    if kind is np.ndarray and value.dtype.kind in "biufcSUmM":
        return ["array", value.dtype.str, list(value.shape), *buffers.add(value.tobytes())]
    if isinstance(value, np.generic) and value.dtype.kind in "biufcmM":
        return ["scalar", value.dtype.str, *buffers.add(value.tobytes())]
    if (parts := take_apart(value)) is not None:
        name, details, inner = parts
        return ["object", name, details, _describe(inner, buffers, where)]
    raise TypeError(f"cannot store {where}, a {kind.__module__}.{kind.__qualname__}; {_SUPPORTED}")


def _pack(values: list[Any]) -> np.ndarray[Any, Any] | None:
    """A list of ints only or floats only as an array of the smallest type; None for any other list."""
    kinds = set(map(type, values))
    if kinds == {float}:
        return np.array(values, dtype="<f8")
    if kinds != {int}:
        return None
    low, high = min(values), max(values)
    for dtype in ("<i1", "<i2", "<i4", "<i8"):
        limits = np.iinfo(dtype)
        if limits.min <= low and high <= limits.max:
            return np.array(values, dtype=dtype)
    return None


def _build(node: Any, memory: bytearray, base: int) -> Any:  # noqa: PLR0911  (one return a type)
    if not isinstance(node, list):
        return node
    kind, *details = node
    match kind:
        case "float":
            return float(details[0])
        case "dict":
            return {key: _build(item, memory, base) for key, item in details[0]}
        case "list":
            return [_build(item, memory, base) for item in details[0]]
        case "tuple":
            return tuple(_build(item, memory, base) for item in details[0])
        case "object":
            return put_together(details[0], details[1], _build(details[2], memory, base))
    *description, offset, length = details
    start, stop = base + offset, base + offset + length
    if not base <= start <= stop <= len(memory):
        raise ValueError("truncated")
    if kind == "bytes":
        return bytes(memory[start:stop])
    if kind == "tensor":
        dtype, shape = _TORCH_DTYPES[description[0]], description[1]
        return (
            torch.frombuffer(memory[start:stop], dtype=dtype).reshape(shape)
            if length
            else torch.empty(shape, dtype=dtype)
        )
    if kind not in ("array", "scalar", "numbers"):
        raise ValueError(f"unknown kind {kind!r}")
    array = np.frombuffer(memory[start:stop], dtype=np.dtype(description[0]))
    if kind == "array":
        return array.reshape(description[1])
    return array.tolist() if kind == "numbers" else array[0]
