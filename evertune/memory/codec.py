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
from evertune.utils import typed_json

_MAGIC = b"EVX1"
_ALIGNMENT = 16
_DEEPEST = 30  # nested containers; a dataclass counts twice
_PACK_FROM = 8  # length; shorter lists of numbers stay in the header
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, RuntimeError, struct.error)
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
        TypeError: If the example contains anything else, or is nested more than 30 levels deep; the message names the
            type and the place.

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

    The bytes may come from anyone: what they claim is compared with what they hold before memory is taken for it.

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
        header = typed_json.decode(memory[8:start].decode(), surrogates=True)
        return _Builder(memory, start + -start % _ALIGNMENT).build(header)
    except MissingTypeError:
        raise
    except _DAMAGED as error:
        raise ValueError(f"not an encoded example, or a damaged one: {error}") from error


class StorableCheck:
    """Checks that examples can be stored, at a fraction of the cost of storing them.

    An example is encoded only if no other with the same containers, keys and types has been.

    Example:
        >>> check = StorableCheck()
        >>> check({"text": "hello", "label": 1})
        >>> check({"text": "hello", "label": object()})
        Traceback (most recent call last):
        TypeError: cannot store example['label'], a builtins.object; replay stores tensors, ...
    """

    def __init__(self) -> None:
        self._known: set[Any] = set()

    def __call__(self, example: Any) -> None:
        """Raise the ``TypeError`` of :func:`encode`, or return."""
        kinds = _kinds(example)
        if kinds not in self._known:
            encode(example)
            if kinds is not None:
                self._known.add(kinds)


def _kinds(value: Any) -> Any:
    """The types in a value, hashable; None if they do not say whether it can be stored."""
    kind = type(value)
    if kind is Tensor:
        return value.layout, value.dtype
    if kind is np.ndarray:
        return kind, value.dtype.kind
    if kind not in (dict, list, tuple):
        return kind if kind in (type(None), bool, str, int, float, bytes) else None
    items = value.values() if kind is dict else value
    parts = tuple(map(_kinds, items)) if kind is not list else tuple({_kinds(item): None for item in items})
    if None in parts:
        return None
    return (kind, tuple(value), parts) if kind is dict else (kind, parts)


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


def _describe(value: Any, buffers: _Buffers, where: str, level: int = 0) -> Any:  # noqa: PLR0911, PLR0912  (one a type)
    kind = type(value)
    if value is None or kind in (bool, str, int):
        return value
    if kind is float:
        return value if math.isfinite(value) else ["float", str(value)]
    if level >= _DEEPEST and kind in (dict, list, tuple):
        raise TypeError(f"cannot store {where}: it is nested more than {_DEEPEST} levels deep")
    if kind is dict:
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"cannot store {where}: a dict key of type {type(key).__name__}; {_SUPPORTED}")
        return ["dict", [[k, _describe(item, buffers, f"{where}[{k!r}]", level + 1)] for k, item in value.items()]]
    if kind in (list, tuple):
        # A list of token ids as JSON numbers would take several times the space and time.
        if kind is list and len(value) >= _PACK_FROM and (packed := _pack(value)) is not None:
            return ["numbers", packed.dtype.str, *buffers.add(packed.tobytes())]
        items = (_describe(item, buffers, f"{where}[{index}]", level + 1) for index, item in enumerate(value))
        return [kind.__name__, list(items)]
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
        return ["object", name, details, _describe(inner, buffers, where, level + 1)]
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


class _Builder:
    """Builds an example from its description. Each buffer belongs to one tensor, array or text, in the order in which
    they are described, so that the example takes no more memory than its bytes."""

    def __init__(self, memory: bytearray, base: int) -> None:
        self.memory = memory
        self.base = self.free = base

    def build(self, node: Any) -> Any:  # noqa: PLR0911  (one return a type)
        if not isinstance(node, list):
            return node
        kind, *details = node
        match kind:
            case "float":
                return float(details[0])
            case "dict":
                return {key: self.build(item) for key, item in details[0]}
            case "list":
                return [self.build(item) for item in details[0]]
            case "tuple":
                return tuple(self.build(item) for item in details[0])
            case "object":
                return put_together(details[0], details[1], self.build(details[2]))
        *description, offset, length = details
        buffer = self._take(offset, length)
        if kind == "bytes":
            return bytes(buffer)
        if kind == "tensor":
            dtype, shape = _TORCH_DTYPES[description[0]], description[1]
            _check_shape(shape, length, dtype.itemsize)
            return torch.frombuffer(buffer, dtype=dtype).reshape(shape) if length else torch.empty(shape, dtype=dtype)
        if kind not in ("array", "scalar", "numbers"):
            raise ValueError(f"unknown kind {kind!r}")
        numpy_dtype = np.dtype(str(description[0]))
        if numpy_dtype.kind not in "biufcSUmM" or not numpy_dtype.itemsize:
            raise ValueError(f"an array of {numpy_dtype}")
        if kind == "array":
            _check_shape(description[1], length, numpy_dtype.itemsize)
        array = np.frombuffer(buffer, dtype=numpy_dtype)
        if kind == "array":
            return array.reshape(description[1])
        return array.tolist() if kind == "numbers" else array[0]

    def _take(self, offset: int, length: int) -> bytearray:
        """A copy of a buffer, which must begin behind the one before it."""
        start, stop = self.base + offset, self.base + offset + length
        if not self.free <= start <= stop <= len(self.memory):
            raise ValueError("truncated, or its buffers overlap")
        self.free = stop
        return self.memory[start:stop]


def _check_shape(shape: list[int], length: int, itemsize: int) -> None:
    if any(type(size) is not int or not 0 <= size < 2**63 for size in shape):
        raise ValueError(f"the shape {str(shape)[:100]}")
    if math.prod(shape) * itemsize != length:
        raise ValueError(f"the shape {str(shape)[:100]} of {itemsize} bytes each, in {length} bytes")
