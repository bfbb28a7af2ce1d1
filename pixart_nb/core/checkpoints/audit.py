"""Audit of a conversion: the outcome of every tensor, as a table, and what the user has to know or do."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pixart_nb.core.checkpoints.configuration import FAMILIES, Description
from pixart_nb.core.checkpoints.key_maps import TransformerTensors, general_name
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
from pixart_nb.core.errors import first_few
from pixart_nb.core.models.transformer import PixArtConfig

Shape = tuple[int, ...]
#: Modules of the source, modules of the target, outcome.
Link = tuple[tuple[str, ...], tuple[str, ...], str]

#: Outcomes of a tensor, in the order of the summary.
OUTCOMES = {
    "mapped": "written under the names of the target",
    "recomputed": "no weights: computed for every image size; not written",
    "missing": "needed, but not in the source",
    "unexpected": "of no part of this transformer; not written",
    "started": "not in the source; written with the values with which training starts",
    "absent": "not in the source, and not needed for sampling",
    "misfit": "in the source, with another shape than needed",
}
_ALWAYS_COUNTED = ("mapped", "recomputed", "missing", "unexpected")
_EMBEDDING = "y_embedder.y_embedding"
#: Bits of exponent and mantissa of the dtypes of weights.
_BITS = {"F64": (11, 52), "F32": (8, 23), "BF16": (8, 7), "F16": (5, 10), "F8_E5M2": (5, 2), "F8_E4M3": (4, 3)}


@dataclass(frozen=True)
class AuditEntry:
    """Outcome of one tensor, with its names and shapes in the source and in the target; either side may be empty."""

    outcome: str
    source: tuple[str, ...] = ()
    source_shapes: tuple[Shape, ...] = ()
    target: tuple[str, ...] = ()
    target_shapes: tuple[Shape, ...] = ()

    @property
    def action(self) -> str:
        """``same name``, ``renamed``, ``split in 3``, ``stacked of 3`` of a mapped tensor; else the outcome."""
        if self.outcome != "mapped":
            return self.outcome
        if len(self.source) > 1 and len(self.target) == 1:
            return f"stacked of {len(self.source)}"
        if len(self.target) > 1 and len(self.source) == 1:
            return f"split in {len(self.target)}"
        return "same name" if self.source == self.target else "renamed"


@dataclass
class Audit:
    """Audit of a conversion: the certain values of the configuration, and ``sentences`` that the user has to know."""

    source: str
    target: str
    layouts: tuple[str, str]
    dtypes: tuple[str, str]
    family: str
    config: dict[str, Any]
    entries: list[AuditEntry]
    sentences: list[str] = field(default_factory=list)

    def of(self, outcome: str) -> list[AuditEntry]:
        """Return the entries with an outcome."""
        return [entry for entry in self.entries if entry.outcome == outcome]

    @property
    def counts(self) -> dict[str, int]:
        """Number of tensors by outcome: those of the source, or of the target if the source has none."""
        counts = {name: sum(max(len(e.source), 1) for e in self.of(name)) for name in OUTCOMES}
        return {name: count for name, count in counts.items() if count or name in _ALWAYS_COUNTED}

    @property
    def complete(self) -> bool:
        """True if every tensor that the transformer needs exists with the right shape."""
        return not self.of("missing") and not self.of("misfit")

    def rows(self) -> list[dict[str, str]]:
        """Return the rows of a table, one for the tensors of the same name in all blocks."""
        rows: dict[tuple, list[AuditEntry]] = {}
        for entry in self.entries:
            names = (tuple(map(general_name, side)) for side in (entry.source, entry.target))
            rows.setdefault((entry.action, *names, entry.source_shapes, entry.target_shapes), []).append(entry)
        return [
            {
                "source": _joined(source),
                "shape": _shapes(source_shapes),
                "target": _joined(target),
                "becomes": _shapes(target_shapes),
                "outcome": action,
                "blocks": str(len(entries)) if "{i}" in "".join(source + target) else "",
            }
            for (action, source, target, source_shapes, target_shapes), entries in rows.items()
        ]

    def links(self) -> list[Link]:
        """Return which modules of the source become which of the target, all blocks together."""
        return list(dict.fromkeys((_modules(e.source), _modules(e.target), e.action) for e in self.entries))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        facts = {name: value for name, value in asdict(self).items() if name != "entries"}
        tensors = {name: [asdict(entry) for entry in self.of(name)] for name in self.counts}
        return {**facts, "counts": self.counts, "complete": self.complete, "tensors": tensors}

    def __str__(self) -> str:
        model = f"PixArt-{self.family}" if self.family else "a PixArt transformer"
        lines = [
            f"{self.source} ({self.layouts[0]} layout, {self.dtypes[0]})",
            f"-> {self.target} ({self.layouts[1]} layout, {self.dtypes[1]})",
            f"{model}: {', '.join(f'{name} {value}' for name, value in self.config.items())}",
        ]
        for outcome, count in self.counts.items():
            names = [name for entry in self.of(outcome) for name in entry.source or entry.target]
            listed = f": {first_few(names)}" if outcome != "mapped" and count else ""
            lines.append(f"{count:6d} {outcome} - {OUTCOMES[outcome]}{listed}")
        sentences = [*_about_dtypes(*self.dtypes), *self.sentences]
        return "\n".join([*lines, *(f"- {sentence}" for sentence in sentences)])


def links_between(first: Mapping[str, LazyTensor], second: Mapping[str, LazyTensor]) -> list[Link]:
    """Compare two transformers under official names, in the form of ``Audit.links``."""
    links = []
    for name in dict.fromkeys([*first, *second]):
        module = _modules((name,))
        if name in first and name in second:
            same = first[name].shape == second[name].shape
            links.append((module, module, "same shape" if same else "another shape"))
        else:
            links.append((module * (name in first), module * (name in second), "only here"))
    return list(dict.fromkeys(links))


def _modules(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(re.sub(r"\.(weight|bias)$", "", general_name(name)) for name in names)


def _joined(names: tuple[str, ...]) -> str:
    """Join names that differ in one part: ``attn1.(to_q|to_k|to_v).weight``."""
    if len(names) < 2:
        return "".join(names)
    parts = [name.split(".") for name in names]
    index = next((k for k, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    options = "|".join(part[index] for part in parts)
    return ".".join([*parts[0][:index], f"({options})", *parts[0][index + 1 :]])


def _shapes(shapes: tuple[Shape, ...]) -> str:
    texts = ["x".join(map(str, shape)) or "scalar" for shape in shapes]
    return texts[0] + (f" x{len(texts)}" if len(texts) > 1 else "") if texts else ""


# ---- sentences


def _about_dtypes(before: str, after: str) -> Iterator[str]:
    """Yield a sentence if floating-point dtypes changed: values are rounded if a target has fewer bits of a part."""
    sources, targets = ([name for name in names.split(", ") if name in _BITS] for names in (before, after))
    if sources == targets:
        return
    pairs = [zip(_BITS[source], _BITS[target], strict=True) for source in sources for target in targets]
    if any(had > has for pair in pairs for had, has in pair):
        yield f"The values are rounded: {before} became {after}."
    else:
        yield f"The dtype changed without loss: {before} became {after}."


def sentences_on(
    view: TransformerTensors, description: Description, layout: str, ending: str, started: Collection[str]
) -> Iterator[str]:
    """Yield what the user has to know or do after a conversion to ``layout`` in a file with this ending."""
    yield from view.notes
    yield from description.notes
    family = f"taken to be {description.family}" if description.family else "unknown"
    if _EMBEDDING not in view.tensors:
        yield (
            "The learned empty caption (y_embedding) is not in the source. Sampling does not need it, here or in "
            f"diffusers; for training or for the official code convert the official checkpoint. The family is {family}."
        )
    elif (tokens := view.tensors[_EMBEDDING].shape[0]) not in FAMILIES:
        yield (
            f"Caption tokens: {tokens}, neither alpha's 120 nor sigma's 300; set model_max_length {tokens} wherever "
            "this checkpoint is loaded."
        )
    if not description.is_certain("input_size"):
        yield (
            "The training size is unknown: this layout does not store it. Give it wherever this checkpoint is loaded "
            "(sample_size, the image side / 8): with another one the positions are wrong and images are poor."
        )
    if "num_heads" in description.assumed:
        yield (
            "The number of heads is unknown: no tensor shows it, and the width is no multiple of 72. Give num_heads "
            "wherever this checkpoint is loaded."
        )
    if description.config.kv_operator == "conv" and description.config.kv_ratio > 1:
        yield from _on_compression(description.config, layout, ending, started)


def _on_compression(config: PixArtConfig, layout: str, ending: str, started: Collection[str]) -> Iterator[str]:
    layers, ratio = list(config.kv_layers), config.kv_ratio
    if any(name.endswith("sr.weight") for name in started):
        yield (
            f"KV compression: layers {layers} had no weights; they start as averages (1/{ratio * ratio} each, bias 0, "
            "an identity norm). Finetune before you judge images."
        )
    elif started:
        parts = ", ".join(sorted({name.split("attn.")[1] for name in started}))
        yield f"KV compression: layers {layers} came without {parts}, as mindone saves them; they start as identity."
    if layers and layout == "diffusers":
        yield "KV compression is not supported by diffusers: the target loads in this kit, not there."
    elif layers and ending == ".ckpt":
        yield "KV compression: mindone's model has no sr.bias and no weights of attn.norm; there they would be ignored."
