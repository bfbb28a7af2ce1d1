"""Heads split and merged by gathering rows, which is ten times as fast on the CPU as transposing (MindSpore 2.8).

A matrix (B N, parts D) holds ``parts`` vectors for each token, such as query, key and value.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from mindspore import ops

from pixart_nb.core.backend import ms

gather = ops.Gather()


def _indices(rows: np.ndarray) -> ms.Tensor:
    return ms.Tensor(np.ascontiguousarray(rows).reshape(-1).astype(np.int32))


@lru_cache(maxsize=12)
def head_rows(batch: int, tokens: int, heads: int, parts: int = 1, part: int = 0) -> ms.Tensor:
    """Return the rows of (batch * tokens * parts * heads, d) that make one part as (batch, heads, tokens, d)."""
    rows = np.arange(batch * tokens * parts * heads).reshape(batch, tokens, parts, heads)
    return _indices(rows[:, :, part].transpose(0, 2, 1))


@lru_cache(maxsize=12)
def _merged_rows(batch: int, heads: int, tokens: int) -> ms.Tensor:
    return _indices(np.arange(batch * heads * tokens).reshape(batch, heads, tokens).transpose(0, 2, 1))


def merge_heads(x: ms.Tensor) -> ms.Tensor:
    """Heads (B, H, N, d) -> tokens (B N, H d)."""
    batch, heads, tokens, size = x.shape
    rows = gather(x.reshape(-1, size), _merged_rows(batch, heads, tokens), 0)
    return rows.reshape(batch * tokens, heads * size)


@lru_cache(maxsize=12)
def cell_rows(
    batch: int, height: int, width: int, ratio: int, count: int, parts: int = 1, part: int = 0
) -> list[ms.Tensor]:
    """Return, for each of the first ``count`` positions of the R x R cells, its rows of (B N parts, D) of one part."""
    grid = np.arange(batch * height * width).reshape(batch, height, width) * parts + part
    grid = grid[:, : height // ratio * ratio, : width // ratio * ratio]
    return [_indices(grid[:, n // ratio :: ratio, n % ratio :: ratio]) for n in range(count)]
