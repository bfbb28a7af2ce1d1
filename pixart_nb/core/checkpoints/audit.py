"""The audit of a conversion: what became of every tensor, in numbers, as a table and in sentences."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pixart_nb.core.checkpoints.configuration import Description
from pixart_nb.core.checkpoints.layouts import Transformer
from pixart_nb.core.checkpoints.lazy_tensor import Stored

Shape = tuple[int, ...]

#: What can become of a tensor, in the order of the summary, and what that means.
OUTCOMES = {
    "mapped": "written under the names of the target",
    "recomputed": "not weights: made for every picture's size; not written",
    "missing": "needed, but not in the source",
    "unexpected": "belongs to no part of this transformer; not written",
    "started": "not in the source; written with the values with which training starts",
    "absent": "not in the source, and sampling does not need it",
    "misfit": "in the source, of another shape than needed",
}
_ALWAYS_COUNTED = ("mapped", "recomputed", "missing", "unexpected")
_EMBEDDING = "y_embedder.y_embedding"
_NUMBER = re.compile(r"(?<=blocks\.)\d+(?=\.)")


@dataclass(frozen=True)
class Entry:
    """What became of a tensor: names and shapes in the source and in the target; either side may be empty."""

    outcome: str
    source: tuple[str, ...] = ()
    source_shapes: tuple[Shape, ...] = ()
    target: tuple[str, ...] = ()
    target_shapes: tuple[Shape, ...] = ()

    @property
    def way(self) -> str:
        """How it was mapped: ``same name``, ``renamed``, ``split in 3``, ``stacked of 3``; else the outcome."""
        if self.outcome != "mapped":
            return self.outcome
        if len(self.source) > 1 and len(self.target) == 1:
            return f"stacked of {len(self.source)}"
        if len(self.target) > 1 and len(self.source) == 1:
            return f"split in {len(self.target)}"
        return "same name" if self.source == self.target else "renamed"


@dataclass
class Audit:
    """The audit of a conversion from ``source`` to ``target``.

    ``config``: what is known of the architecture. ``dtypes``: kinds of numbers in the source and in the target.
    ``sentences``: what a reader should know.
    """

    source: str
    target: str
    layouts: tuple[str, str]
    dtypes: tuple[str, str]
    family: str
    config: dict[str, Any]
    entries: list[Entry]
    sentences: list[str] = field(default_factory=list)

    def of(self, outcome: str) -> list[Entry]:
        """The entries of one outcome."""
        return [entry for entry in self.entries if entry.outcome == outcome]

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by outcome; those of the source, or of the target where the source has none."""
        found = {name: sum(max(len(e.source), 1) for e in self.of(name)) for name in OUTCOMES}
        return {name: count for name, count in found.items() if count or name in _ALWAYS_COUNTED}

    @property
    def complete(self) -> bool:
        """Whether every tensor that the transformer needs is there, with the right shape."""
        return not self.of("missing") and not self.of("misfit")

    def rows(self, folded: bool = True) -> list[dict[str, str]]:
        """The table: a row for each entry, or, ``folded``, for each kind of tensor of all the blocks together."""
        rows: dict[tuple, list[Entry]] = {}
        for entry in self.entries:
            key = (entry.way, *_folded(entry)) if folded else (len(rows),)
            rows.setdefault(key, []).append(entry)
        return [_row(entries, folded) for entries in rows.values()]

    def table(self, folded: bool = True) -> str:
        """The table as aligned text."""
        return aligned(self.rows(folded))

    def links(self) -> list[tuple[tuple[str, ...], tuple[str, ...], str]]:
        """(modules of the source, modules of the target, way) of all entries, blocks folded, each once."""
        found = ((_modules(entry.source), _modules(entry.target), entry.way) for entry in self.entries)
        return list(dict.fromkeys(found))

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it: facts, counts, sentences, and the tensors by outcome."""
        facts = {name: value for name, value in asdict(self).items() if name != "entries"}
        tensors = {name: [asdict(entry) for entry in self.of(name)] for name in self.counts}
        return {**facts, "counts": self.counts, "complete": self.complete, "tensors": tensors}

    def __str__(self) -> str:
        kind = f"PixArt-{self.family}" if self.family else "a PixArt transformer"
        lines = [
            f"{self.source} ({self.layouts[0]} layout, {self.dtypes[0]})",
            f"-> {self.target} ({self.layouts[1]} layout, {self.dtypes[1]})",
            f"{kind}: {', '.join(f'{name} {value}' for name, value in self.config.items())}",
        ]
        for outcome, count in self.counts.items():
            names = "" if outcome == "mapped" or not count else f": {_few(self.of(outcome))}"
            lines.append(f"{count:6d} {outcome} - {OUTCOMES[outcome]}{names}")
        if self.dtypes[0] != self.dtypes[1]:
            lines.append(f"- The numbers are not the same ones: {self.dtypes[0]} became {self.dtypes[1]}.")
        return "\n".join([*lines, *(f"- {sentence}" for sentence in self.sentences)])


def links_between(
    first: Mapping[str, Stored], second: Mapping[str, Stored]
) -> list[tuple[tuple[str, ...], tuple[str, ...], str]]:
    """Two transformers under official names, as ``Audit.links`` gives one conversion: what both have, and one only."""
    found = []
    for name in dict.fromkeys([*first, *second]):
        module, there = _modules((name,)), (name in first, name in second)
        if all(there):
            way = "same shape" if first[name].shape == second[name].shape else "another shape"
        else:
            way = "only here"
        found.append((module * there[0], module * there[1], way))
    return list(dict.fromkeys(found))


def aligned(rows: Sequence[dict[str, str]]) -> str:
    """Rows as columns of text, the keys of the first above them."""
    if not rows:
        return "(nothing)"
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _few(entries: Iterable[Entry]) -> str:
    names = [name for entry in entries for name in entry.source or entry.target]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _general(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_NUMBER.sub("{i}", name) for name in names)


def _modules(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(re.sub(r"\.(weight|bias)$", "", name) for name in _general(names))


def _folded(entry: Entry) -> tuple:
    return _general(entry.source), entry.source_shapes, _general(entry.target), entry.target_shapes


def _row(entries: list[Entry], folded: bool) -> dict[str, str]:
    first = entries[0]
    source, target = (
        (first.source, first.target) if not folded else (_general(first.source), _general(first.target))
    )
    row = {
        "source": _side(source),
        "shape": _shapes(first.source_shapes),
        "target": _side(target),
        "becomes": _shapes(first.target_shapes),
        "outcome": first.way,
    }
    return (
        {**row, "blocks": str(len(entries)) if "{i}" in "".join(source + target) else ""} if folded else row
    )


def _side(names: tuple[str, ...]) -> str:
    """Names as one text; of several only the last differing part is repeated."""
    if len(names) < 2:
        return "".join(names)
    parts = [name.split(".") for name in names]
    where = next((k for k, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    options = "|".join(part[where] for part in parts)
    return ".".join([*parts[0][:where], f"({options})", *parts[0][where + 1 :]])


def _shapes(shapes: tuple[Shape, ...]) -> str:
    texts = ["x".join(map(str, shape)) or "scalar" for shape in shapes]
    return texts[0] + (f" x{len(texts)}" if len(texts) > 1 else "") if texts else ""


# ---- sentences: what people stumble over, one each, for the checkpoint at hand


def sentences_on(
    view: Transformer, found: Description, layout: str, ending: str, started: Collection[str]
) -> list[str]:
    """The sentences of a conversion to ``layout`` (``official``, ``diffusers``) in a file of this ending."""
    return [
        *view.notes,
        *found.notes,
        _on_tokens(view, found),
        _on_embedding(view, layout),
        _on_positions(view),
        *_on_size(found),
        _on_micro_conditions(found),
        *_on_heads(found),
        *_on_compression(found, layout, ending, started),
    ]


def _on_tokens(view: Transformer, found: Description) -> str:
    if _EMBEDDING not in view.tensors:
        known = f"this is taken to be PixArt-{found.family}" if found.family else "its kind is not known"
        return f"Caption tokens: no y_embedding shows whether alpha's 120 or sigma's 300; {known}."
    count = view.tensors[_EMBEDDING].shape[0]
    if count not in (120, 300):
        return (
            f"Caption tokens: {count}, neither alpha's 120 nor sigma's 300; say model_max_length {count} wherever "
            "this is loaded."
        )
    other = ("An alpha", 120) if count == 300 else ("A sigma", 300)
    return (
        f"Caption tokens: {count}, so this is PixArt-{found.family}. {other[0]} configuration, which says {other[1]}, "
        "does not fit it."
    )


def _on_embedding(view: Transformer, layout: str) -> str:
    if _EMBEDDING not in view.tensors:
        return (
            "y_embedding (the caption that training drops to, and the empty prompt of alpha's own scripts) is not in "
            "the source, as in the published folders of sigma. Sampling here and in diffusers encodes an empty prompt "
            "instead. For training, or for the official code, convert the official checkpoint."
        )
    if layout == "official":
        return "y_embedding (the learned empty caption) is kept."
    return (
        "y_embedding (the learned empty caption) is kept as caption_projection.y_embedding, as in the published "
        "folders of alpha; diffusers does not use it and says so when it loads."
    )


def _on_positions(view: Transformer) -> str:
    if view.recomputed:
        return "pos_embed is recomputed for every picture's size; it is not written, and nothing is lost."
    return "pos_embed is not in the source, as in many checkpoints; it is recomputed, and nothing is lost."


def _on_size(found: Description) -> Iterable[str]:
    if not found.knows("input_size"):
        yield (
            "The training size is not known: this layout does not store it. Say it wherever this is loaded "
            "(sample_size, the picture's side / 8): at another one the positions are wrong and pictures are poor."
        )


def _on_micro_conditions(found: Description) -> str:
    if found.config.micro_condition:
        return "Micro conditions (csize_embedder, ar_embedder) are there: of the published models, in alpha-1024 alone."
    return (
        "Micro conditions (csize_embedder, ar_embedder) are not there: of the published models, alpha-1024 alone has "
        "them. A configuration with micro_condition or use_additional_conditions on does not fit."
    )


def _on_heads(found: Description) -> Iterable[str]:
    if "num_heads" in found.assumed:
        yield (
            "The number of heads is not known: no tensor shows it, and the width is no multiple of 72. This layout "
            "does not store it; say num_heads wherever this is loaded."
        )


def _on_compression(found: Description, layout: str, ending: str, started: Collection[str]) -> Iterable[str]:
    layers, ratio = list(found.config.kv_layers), found.config.kv_ratio
    if not layers or ratio == 1:
        yield (
            "KV compression: no layer has weights for it (attn.sr), as in every published checkpoint. With "
            "kv_compress_config in --config they are made, starting as averages."
        )
        return
    if found.config.kv_operator != "conv":
        yield f"KV compression: {found.config.kv_operator!r} in layers {layers}, ratio {ratio}, which has no weights."
        return
    if any(name.endswith("sr.weight") for name in started):
        yield (
            f"KV compression: weights of layers {layers} were absent; they start as averages (1/{ratio * ratio} each, "
            "bias 0, a norm of 1 and 0). Finetune before you judge pictures."
        )
    elif started:
        lacking = ", ".join(sorted({name.split("attn.")[1] for name in started}))
        yield (
            f"KV compression: layers {layers} came without {lacking}, as mindone saves them; these are 0 (biases) "
            "and 1 (norm), which changes nothing."
        )
    else:
        yield f"KV compression: layers {layers} shrink by {ratio}, with their trained weights."
    if layout == "diffusers":
        yield "diffusers itself knows no KV compression: the target loads in this kit, not there."
    elif ending == ".ckpt":
        yield "mindone's model has no place for sr.bias and for the weights of attn.norm: there they would be ignored."
