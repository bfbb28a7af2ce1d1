"""Texts that must stay text wherever a prompt or caption is shown, and every widget and page with them."""

from types import SimpleNamespace

import numpy as np
from playground_pipe import Pipe

from pixart_nb.core import Trace
from pixart_nb.core.cost import StepCost
from pixart_nb.core.hooks.attention_maps import LayerRecord, pack
from pixart_nb.core.hooks.selection import MARK, Text
from pixart_nb.viz.attention_explorer import AttentionExplorer
from pixart_nb.viz.compression_explorer import CompressionExplorer
from pixart_nb.viz.explorers import Choice
from pixart_nb.viz.html_export import export_attention, export_compression
from pixart_nb.viz.playground import Playground
from pixart_nb.viz.tables import Table
from pixart_nb.viz.zoom import ZoomViewer

TEXTS = (
    '<img src="x" onerror="window.ran = 1">',
    "</script><script>window.ran = 1</script>",
    "{{data}} {{title}}",
    '"double" \'single\' onfocus="window.ran = 1" autofocus',
    "$5 and $10",
    r"\frac{1}{2} \(x\)",
    "a & b &amp; c",
)
PROMPT = " ".join(TEXTS)
IMAGE = np.random.default_rng(0).random((32, 32, 3))


def traced():
    """A trace of a prompt whose words are the texts."""
    vectors = lambda n: pack(np.random.default_rng(n).standard_normal((1, 2, n, 8)), [0], [0, 1])  # noqa: E731
    trace = Trace(["blocks.0.attn", "blocks.0.cross_attn"], [0, 1], (4, 4), ["conditional 0"])
    trace.timestep_of, trace.text_of = {0: 999.0}, {0: 0}
    trace.texts = [[Text(PROMPT, tuple(MARK + text for text in TEXTS))]]
    for name, keys in zip(trace.names, (16, len(TEXTS)), strict=True):
        trace.records[name, 0] = LayerRecord(vectors(16), vectors(keys))
    return trace


def studied():
    """A stand-in for a study of compression."""
    outcome = SimpleNamespace(
        layers=(0,), ratio=2, operator="mean", errors=np.array([0.1]), error=0.1, images=IMAGE[None], image_error=0.0,
        cost=StepCost(16, 4, 10, 5, 8, 8), seconds=1.0,
    )  # fmt: skip
    return SimpleNamespace(
        trace=traced(), layers=range(1), images=IMAGE[None], prompt=PROMPT, outcomes=[outcome], cost=outcome.cost,
        timesteps=np.array([999.0]), computed=lambda *choice: outcome, outcome=lambda *choice: outcome,
        compressed_attention=lambda layer, step, queries, *rest: np.full((2, len(queries), 2, 2), 0.25),
        reference=SimpleNamespace(height=32, width=32),
        pipe=SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(patch_size=1))),
    )  # fmt: skip


def explorer_of_compression():
    explorer = CompressionExplorer(studied(), (1, 2), ("mean",), (range(1), 2, "mean"))
    explorer.word.value = 1
    return explorer


WIDGETS = {
    "attention": lambda: AttentionExplorer(traced(), IMAGE),
    "compression": explorer_of_compression,
    "playground": lambda: Playground(
        Pipe(), [(32, 48)], ["own"], prompt=PROMPT, negative_prompt=PROMPT, steps=2, examples=[PROMPT]
    ),
    "table": lambda: Table([{"caption": text, text: text} for text in TEXTS], PROMPT),
    "zoom": lambda: ZoomViewer(IMAGE, PROMPT),
}
PAGES = {
    "attention": lambda path: export_attention(path, traced(), IMAGE, Choice(word=0)),
    "compression": lambda path: export_compression(path, studied(), studied().outcomes),
    "zoom": lambda path: ZoomViewer(IMAGE, PROMPT).write(path),
}
