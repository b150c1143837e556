"""Tensors: datatypes, shapes, and elements, which are Python's values here and bytes in row-major order on a wire."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np

BYTES = "BYTES"
WHOLE = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
FLOATING = ("FP16", "BF16", "FP32", "FP64")
NUMPY = {
    "BOOL": "?",
    **dict(zip(WHOLE, ("i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8"), strict=True)),
    **dict(zip(FLOATING, ("<f2", "<u2", "<f4", "<f8"), strict=True)),  # numpy has no BF16: the upper half of an FP32
}
"""Datatype → numpy's, in the wire's little-endian order."""
DATATYPES = frozenset({BYTES, *NUMPY})
MAX_DIMENSIONS, MAX_SIZE = 32, 2**63 - 1
"""Of a shape: as numpy and protobuf have them."""
MAX_NAME = 100
"""The most characters of a client's name that a sentence repeats."""
_LENGTH = 4
"""The bytes of the length before each element of a raw BYTES tensor."""


class InferenceError(Exception):
    """A call fails: the message is a sentence for the client."""

    def __init__(
        self, message: str, status: int = HTTPStatus.BAD_REQUEST, headers: Mapping[str, str] | None = None
    ) -> None:
        """`status`: HTTP's."""
        super().__init__(message)
        self.message, self.status, self.headers = message, int(status), dict(headers or {})


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    datatype: str
    shape: Sequence[int]
    elements: list[Any]
    """Flat, in row-major order: bytes of BYTES, else bool, int or float."""
    content_type: str = ""
    """Of an output's BYTES that are no text: what each of them is."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the metadata of a model say of a tensor."""

    name: str
    datatype: str
    shape: Sequence[int] = field(default=(-1,))
    """-1 is any length."""


def shortened(text: str) -> str:
    """A client's words, as a sentence repeats them."""
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}…"


def quoted(name: str) -> str:
    return f'"{shortened(name)}"'


def count_of(name: str, datatype: str, shape: Sequence[int]) -> int:
    """How many elements an input has. Raises InferenceError for a shape or datatype that is none."""
    if datatype not in DATATYPES:
        raise InferenceError(f"The datatype of the input {quoted(name)} is {quoted(datatype)}, which is none.")
    if not 0 < len(shape) <= MAX_DIMENSIONS or not all(0 <= size <= MAX_SIZE for size in shape):
        raise InferenceError(f"The shape of the input {quoted(name)} is not the size of each of its dimensions.")
    return math.prod(shape)


def checked(name: str, datatype: str, shape: Sequence[int], elements: list[Any]) -> Tensor:
    """An input whose elements came one by one. Raises InferenceError."""
    _expect(name, shape, len(elements), count_of(name, datatype, shape))
    kinds = _KINDS.get(datatype, (float, int))
    wrong = next((i for i, element in enumerate(elements) if type(element) not in kinds), None)
    if wrong is None and datatype in WHOLE:
        limits = np.iinfo(NUMPY[datatype])
        wrong = next((i for i, element in enumerate(elements) if not limits.min <= element <= limits.max), None)
    if wrong is not None:
        found = repr(elements[wrong])
        raise InferenceError(f"The input {quoted(name)} is {datatype}, and its element {wrong} is {shortened(found)}.")
    return Tensor(name, datatype, shape, elements)


_KINDS: dict[str, tuple[type, ...]] = {BYTES: (bytes,), "BOOL": (bool,), **dict.fromkeys(WHOLE, (int,))}
"""Datatype → the types of its elements; of all others, numbers."""


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes | memoryview) -> Tensor:
    """An input whose elements came as bytes. Raises InferenceError."""
    count = count_of(name, datatype, shape)
    if datatype == BYTES:
        elements = _split(name, raw)
        _expect(name, shape, len(elements), count)
        return Tensor(name, datatype, shape, elements)
    kind = np.dtype(NUMPY[datatype])
    if len(raw) != count * kind.itemsize:
        what = f"{count:,} elements of {kind.itemsize} bytes each, and {len(raw):,} bytes came"
        raise InferenceError(f"The shape of the input {quoted(name)} says {what}.")
    array = np.frombuffer(raw, kind)
    if datatype == "BF16":
        array = (array.astype("<u4") << 16).view("<f4")
    return Tensor(name, datatype, shape, array.tolist())


def to_raw(tensor: Tensor) -> bytes:
    """The elements as bytes. An output is never BF16."""
    if tensor.datatype == BYTES:
        return b"".join(len(element).to_bytes(_LENGTH, "little") + element for element in tensor.elements)
    return np.array(tensor.elements, NUMPY[tensor.datatype]).tobytes()


def _split(name: str, raw: bytes | memoryview) -> list[bytes]:
    """The elements of a raw BYTES tensor, each of which has its length before it."""
    elements, at = [], 0
    while at < len(raw):
        begins = at + _LENGTH
        at = begins + int.from_bytes(raw[at:begins], "little")
        if at > len(raw):
            raise InferenceError(
                f"The bytes of the input {quoted(name)} end within an element: each is its length in 4 bytes, "
                "little-endian, and its bytes."
            )
        elements.append(bytes(raw[begins:at]))
    return elements


def _expect(name: str, shape: Sequence[int], found: int, count: int) -> None:
    if found != count:
        raise InferenceError(
            f"The shape {list(shape)[:10]} of the input {quoted(name)} says {count:,} elements, and {found:,} came."
        )


class NoTensorError(ValueError):
    """Lists whose lengths differ have no shape."""


def flattened(values: list[Any], depth: int) -> tuple[list[int], list[Any]]:
    """The shape and the elements of a list of lists, `depth` levels of them below the first. Raises NoTensorError."""
    shape = [len(values)]
    for _ in range(depth):
        if not all(isinstance(value, list) for value in values):
            raise NoTensorError
        lengths = {len(value) for value in values}
        if len(lengths) > 1:
            raise NoTensorError
        shape.append(lengths.pop() if lengths else 0)
        values = [element for value in values for element in value]
    return shape, values


def nested(elements: list[Any], shape: Sequence[int]) -> Any:
    """Elements as lists of lists of a shape; the element itself where the shape has no dimension."""
    if not shape:
        return elements[0]
    if not elements:
        return []
    for size in reversed(shape[1:]):
        elements = [elements[i : i + size] for i in range(0, len(elements), size)]
    return elements
