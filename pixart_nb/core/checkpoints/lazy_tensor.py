"""Tensors as they lie in a file: kind of number, shape and bytes, mapped and not read until somebody looks at them."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pixart_nb.core.io import CheckpointError

#: Kinds of numbers under safetensors' names, and NumPy's dtype for their bytes; bfloat16 is kept as its bits.
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
#: More tensors than any checkpoint has; each takes memory, however small it is in its file.
MOST_TENSORS = 100_000
#: Elements that are looked at together: bounds the memory of reading, casting and writing.
CHUNK = 4 * 2**20


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of a file: ``parts`` stacked along axis 0, whose numbers are of kind ``lies`` and are read as ``dtype``.

    It has a shape and is turned into an array by ``np.asarray``, bfloat16 into float32: a view of the file where that
    can be, else a copy. ``name`` is for messages.
    """

    dtype: str
    parts: tuple[np.ndarray, ...]
    lies: str = ""
    name: str = ""

    def __post_init__(self):
        object.__setattr__(self, "lies", self.lies or self.dtype)

    def __repr__(self) -> str:
        return f"Stored({self.name or 'unnamed'}, {self.shape}, {self.dtype})"

    @classmethod
    def of(cls, values: np.ndarray, name: str = "") -> Stored:
        """An array of float, integer or bool as a stored tensor."""
        kind = next((k for k, dtype in DTYPES.items() if k != "BF16" and dtype == values.dtype), None)
        if kind is None:
            raise CheckpointError(
                f"{name or 'a tensor'} has dtype {values.dtype}; expected {', '.join(DTYPES)}"
            )
        return cls(kind, (values,), name=name)

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return first if len(self.parts) == 1 else (sum(len(part) for part in self.parts), *first[1:])

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes as ``dtype``."""
        return self.size * DTYPES[self.dtype].itemsize

    def read_as(self, dtype: str) -> Stored:
        """The same tensor in another kind of float; integers stay as they are."""
        return replace(self, dtype=dtype) if self.dtype in FLOATS else self

    def rows(self, start: int, stop: int) -> Stored:
        """Rows ``start`` to ``stop`` along axis 0, without reading them."""
        kept, first = [], 0
        for part in self.parts:
            kept.append(part[max(start - first, 0) : max(stop - first, 0)])
            first += len(part)
        return replace(self, parts=tuple(part for part in kept if len(part)) or (kept[0],))

    def split(self, count: int) -> tuple[Stored, ...]:
        """``count`` tensors of as many rows each."""
        if not self.shape or self.shape[0] % count:
            raise CheckpointError(
                f"{self.name} has shape {self.shape}; expected {count} equal parts along axis 0"
            )
        rows = self.shape[0] // count
        return tuple(self.rows(i * rows, (i + 1) * rows) for i in range(count))

    def chunks(self) -> Iterator[np.ndarray]:
        """The numbers as ``dtype``, in order, as flat arrays of bounded size; the file's pages are given back."""
        for part in self.parts:
            for raw in _flat_pieces(part):
                yield self._cast(raw)
            release(part)

    def __array__(self, dtype: np.dtype | None = None) -> np.ndarray:
        whole = self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)
        if not (whole.flags.c_contiguous and whole.flags.aligned):
            whole = whole.copy()
        values = self._cast(whole)
        return (widened(values) if self.dtype == "BF16" else values).astype(
            dtype or values_dtype(self), copy=False
        )

    def _cast(self, raw: np.ndarray) -> np.ndarray:
        try:
            return cast(raw, self.lies, self.dtype)
        except OverflowError as error:
            raise CheckpointError(f"{self.name}: {error}. Take fp32 or bf16, or keep the dtype.") from None


def values_dtype(tensor: Stored) -> np.dtype:
    """NumPy's dtype of the values: float32 for bfloat16."""
    return DTYPES["F32"] if tensor.dtype == "BF16" else DTYPES[tensor.dtype]


def stacked(parts: Sequence[Stored]) -> Stored:
    """Tensors stacked along axis 0, without reading them; they must agree in everything but their rows."""
    kinds = {(part.dtype, part.lies, part.shape[1:]) for part in parts}
    if len(kinds) > 1 or any(not part.shape for part in parts):
        found = ", ".join(f"{part.name} {part.shape} {part.dtype}" for part in parts)
        raise CheckpointError(
            f"cannot stack {found}: expected one dtype, and shapes that differ in axis 0 only"
        )
    return replace(parts[0], parts=tuple(array for part in parts for array in part.parts))


def same_bits(first: Mapping[str, Stored], second: Mapping[str, Stored]) -> bool:
    """Whether two sets of tensors have the same names, kinds, shapes and bits; they are read piece by piece."""
    return set(first) == set(second) and all(_same(first[name], second[name]) for name in first)


def _same(one: Stored, other: Stored) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    pieces = zip(_bytes_of(one), _bytes_of(other), strict=True)
    return all(a == b for a, b in pieces)


def _bytes_of(tensor: Stored) -> Iterator[bytes]:
    """The bytes of a tensor in pieces of one size, however it lies in its file."""
    left = b""
    for chunk in tensor.chunks():
        left += chunk.tobytes()
        while len(left) >= CHUNK:
            yield left[:CHUNK]
            left = left[CHUNK:]
    yield left


def _flat_pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array's numbers in order; copied only where they do not lie in order."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        yield from (flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK))
    else:
        rows = max(1, CHUNK // max(1, array[:1].size))
        for i in range(0, len(array), rows):
            yield np.ascontiguousarray(array[i : i + rows]).reshape(-1)


# ---- kinds of numbers


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16's bits -> the float32 of the same value, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 -> bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def cast(raw: np.ndarray, source: str, target: str) -> np.ndarray:
    """Numbers of kind ``source`` as kind ``target``, rounded to the nearest; the same array if the kinds are one.

    Raises ``OverflowError`` where a finite number has no finite one in ``target``.
    """
    if source == target:
        return raw
    wide = widened(raw) if source == "BF16" else raw
    with np.errstate(over="ignore"):
        out = narrowed(wide.astype(np.float32)) if target == "BF16" else wide.astype(DTYPES[target])
    lost = np.isinf(widened(out) if target == "BF16" else out) & np.isfinite(wide)
    if lost.any():
        raise OverflowError(f"values up to {np.abs(wide[lost]).max():.4g} do not fit {target}")
    return out


# ---- mapped files


def check_count(path: str | Path, count: int) -> None:
    """Refuse a file of so many tensors that their bookkeeping would take the memory."""
    if count > MOST_TENSORS:
        raise CheckpointError(f"{path} holds more than {MOST_TENSORS} tensors, as no checkpoint does")


def map_file(path: str | Path) -> np.ndarray:
    """The bytes of a file, (size,) uint8, read-only; memory is taken by what is looked at."""
    with Path(path).open("rb") as file:
        if not file.seek(0, 2):
            return np.zeros(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def mapping_of(array: np.ndarray) -> mmap.mmap | None:
    """The mapped file in which an array lies; None for one in memory."""
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base.obj if isinstance(base, memoryview) and isinstance(base.obj, mmap.mmap) else None


def release(array: np.ndarray) -> None:
    """Give the memory of an array's mapped file back. It is read again when it is looked at again."""
    mapping = mapping_of(array)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
