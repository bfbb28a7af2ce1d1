"""Tensors of checkpoint files, mapped into memory and not read until they are used."""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pixart_nb.core.io import CheckpointError

#: Dtypes under safetensors' names, and NumPy's dtype of their bytes; bfloat16 is kept as its bits.
DTYPES = {f"{letter}{8 * size}": np.dtype(f"<{letter.lower()}{size}") for letter in "FIU" for size in (8, 4, 2)}
DTYPES |= {"I8": np.dtype("i1"), "U8": np.dtype("u1"), "BF16": np.dtype("<u2"), "BOOL": np.dtype("?")}
#: 8-bit floats, stored as one byte and read as float32.
FP8 = ("F8_E4M3", "F8_E5M2")
DTYPES |= dict.fromkeys(FP8, np.dtype("u1"))
FLOATS = ("F64", "F32", "F16", "BF16")
#: More tensors than any checkpoint has; each takes memory, however small it is in its file.
MAX_TENSORS = 100_000
#: Elements that are processed at once: bounds the memory of reading, casting and writing.
CHUNK = 4 * 2**20
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor of a file: ``parts`` stacked along axis 0, stored as ``storage_dtype`` and read as ``dtype``.

    ``np.asarray`` reads it, bfloat16 as float32: a view of the file where possible, else a copy. ``name`` is for
    messages.
    """

    dtype: str
    parts: tuple[np.ndarray, ...]
    storage_dtype: str = ""
    name: str = ""

    def __post_init__(self):
        object.__setattr__(self, "storage_dtype", self.storage_dtype or self.dtype)

    def __repr__(self) -> str:
        return f"LazyTensor({self.name or 'unnamed'}, {self.shape}, {self.dtype})"

    @classmethod
    def of(cls, values: np.ndarray, name: str = "") -> LazyTensor:
        """Wrap an array of floats, integers or booleans."""
        dtype = next((key for key, value in DTYPES.items() if key != "BF16" and value == values.dtype), None)
        if dtype is None:
            raise CheckpointError(f"{name or 'a tensor'} has dtype {values.dtype}; expected {', '.join(DTYPES)}")
        return cls(dtype, (values,), name=name)

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        return first if len(self.parts) == 1 else (sum(len(part) for part in self.parts), *first[1:])

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes as ``dtype``."""
        return self.size * DTYPES[self.dtype].itemsize

    def astype(self, dtype: str) -> LazyTensor:
        """Return the tensor in another float dtype; integers keep theirs."""
        return replace(self, dtype=dtype) if self.dtype in FLOATS else self

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Return rows ``start`` to ``stop`` along axis 0, without reading them."""
        parts, first = [], 0
        for part in self.parts:
            parts.append(part[max(start - first, 0) : max(stop - first, 0)])
            first += len(part)
        return replace(self, parts=tuple(part for part in parts if len(part)) or (parts[0],))

    def split(self, count: int) -> tuple[LazyTensor, ...]:
        """Split into ``count`` tensors of equally many rows."""
        if not self.shape or self.shape[0] % count:
            raise CheckpointError(f"{self.name} has shape {self.shape}; expected {count} equal parts along axis 0")
        rows = self.shape[0] // count
        return tuple(self.rows(i * rows, (i + 1) * rows) for i in range(count))

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the values as ``dtype``, in order, as flat arrays of bounded size; memory of the file is released."""
        for part in self.parts:
            rows = max(1, CHUNK // max(1, part[:1].size)) if part.ndim else 1
            for start in range(0, len(part) if part.ndim else 1, rows):
                flat = np.ascontiguousarray(part[start : start + rows] if part.ndim else part).reshape(-1)
                yield from (self._cast(flat[i : i + CHUNK]) for i in range(0, flat.size, CHUNK))
            release(part)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        stored = self.parts[0] if len(self.parts) == 1 else np.concatenate(self.parts)
        if not (stored.flags.c_contiguous and stored.flags.aligned):
            stored = stored.copy()
        values = self._cast(stored)
        values = bf16_to_fp32(values) if self.dtype == "BF16" else values
        return values.astype(dtype or values.dtype, copy=bool(copy))

    def _cast(self, stored: np.ndarray) -> np.ndarray:
        try:
            return cast(stored, self.storage_dtype, self.dtype)
        except OverflowError as error:
            raise CheckpointError(f"{self.name}: {error}. Take fp32 or bf16, or keep the dtype.") from None


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Stack tensors along axis 0, without reading them; they must agree in dtype and in the other axes."""
    layouts = {(part.dtype, part.storage_dtype, part.shape[1:]) for part in parts}
    if len(layouts) > 1 or any(not part.shape for part in parts):
        listed = ", ".join(f"{part.name} {part.shape} {part.dtype}" for part in parts)
        raise CheckpointError(f"cannot stack {listed}: expected one dtype, and shapes that differ in axis 0 only")
    return replace(parts[0], parts=tuple(array for part in parts for array in part.parts))


def same_bits(first: Mapping[str, LazyTensor], second: Mapping[str, LazyTensor]) -> bool:
    """Return whether two sets of tensors have the same names, dtypes, shapes and bits."""
    if {n: (t.dtype, t.shape) for n, t in first.items()} != {n: (t.dtype, t.shape) for n, t in second.items()}:
        return False
    return all(np.array_equal(_bytes_of(tensor), _bytes_of(second[name])) for name, tensor in first.items())


def _bytes_of(tensor: LazyTensor) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint8), *(chunk.view(np.uint8) for chunk in tensor.chunks())])


# ---- dtypes


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    """Convert bits of bfloat16 to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def fp8_to_fp32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Convert bits of ``F8_E4M3`` (E4M3FN) or ``F8_E5M2`` to float32, exactly (Micikevicius et al. 2022)."""
    codes = np.arange(256, dtype=np.uint8)
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (codes.astype(np.uint16) << 8).view(np.float16).astype(np.float32)[bits]
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent.astype(int) - 10), mantissa * 2.0**-9)
    values[(codes & 127) == 127] = np.nan
    return np.where(codes > 127, -values, values).astype(np.float32)[bits]


def cast(stored: np.ndarray, source: str, target: str) -> np.ndarray:
    """Convert stored values from dtype ``source`` to ``target``, rounded to nearest; no copy if they are the same.

    Raises ``OverflowError`` for a finite value that is infinite in ``target``.
    """
    if source == target:
        return stored
    values = stored
    if source in FP8:
        values = fp8_to_fp32(stored, source)
    elif source == "BF16":
        values = bf16_to_fp32(stored)
    with np.errstate(over="ignore"):
        out = fp32_to_bf16(values.astype(np.float32)) if target == "BF16" else values.astype(DTYPES[target])
    lost = np.isinf(bf16_to_fp32(out) if target == "BF16" else out) & np.isfinite(values)
    if lost.any():
        raise OverflowError(f"values up to {np.abs(values[lost]).max():.4g} do not fit {target}")
    return out


# ---- mapped files


def check_count(path: str | Path, count: int) -> None:
    """Refuse a file of so many tensors that their names alone would exhaust the memory."""
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path} holds more than {MAX_TENSORS} tensors, as no checkpoint does")


def map_file(path: str | Path) -> np.ndarray:
    """Map the bytes of a file, (size,) uint8, read-only."""
    with Path(path).open("rb") as file:
        if not file.seek(0, 2):
            return np.zeros(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def checksum(data: np.ndarray, total: int = 0) -> int:
    """Return the CRC-32 of mapped bytes, after those with the CRC-32 ``total``, releasing their memory as it goes."""
    for start in range(0, data.size, _CHUNK_BYTES):
        total = zlib.crc32(data[start : start + _CHUNK_BYTES], total)
        release(data)
    return total


def mapping_of(array: np.ndarray) -> mmap.mmap | None:
    """Return the mapped file that an array views; None for an array in memory."""
    base = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None


def release(array: np.ndarray) -> None:
    """Release the memory of an array's mapped file; it is read again when it is used again."""
    mapping = mapping_of(array)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
