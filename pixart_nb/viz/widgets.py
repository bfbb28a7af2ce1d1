"""Explorer widgets. They call functions that work without widgets."""

from __future__ import annotations

from pixart_nb.viz.attention_explorer import AttentionExplorer
from pixart_nb.viz.compression_explorer import CompressionExplorer
from pixart_nb.viz.explorers import Choice

__all__ = ["AttentionExplorer", "Choice", "CompressionExplorer"]
