"""The audit of a conversion: what became of every tensor, in numbers, as a table and in sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Shape = tuple[int, ...]

#: What can become of a tensor, in the order of the summary, and what that means.
OUTCOMES = {
    "mapped": "written under the names of the target",
    "recomputed": "not weights but computed from the picture's size; left out",
    "left out": "the target's layout has no place for it",
    "started": "not in the source; starts at a value that changes nothing, or as an average",
    "unexpected": "belongs to no part of this transformer; left out",
    "missing": "needed, but not in the source",
    "misfit": "in the source, of another shape than needed",
}
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
        return {name: sum(max(len(e.source), 1) for e in self.of(name)) for name in OUTCOMES if self.of(name)}

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

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {**asdict(self), "counts": self.counts, "complete": self.complete}

    def __str__(self) -> str:
        kind = f"PixArt-{self.family}" if self.family else "a PixArt transformer"
        lines = [
            f"{self.source} ({self.layouts[0]} layout, {self.dtypes[0]})",
            f"-> {self.target} ({self.layouts[1]} layout, {self.dtypes[1]})",
            f"{kind}: {', '.join(f'{name} {value}' for name, value in self.config.items())}",
        ]
        for outcome, count in self.counts.items():
            names = "" if outcome == "mapped" else f": {_few(self.of(outcome))}"
            lines.append(f"{count:6d} {outcome} - {OUTCOMES[outcome]}{names}")
        return "\n".join([*lines, *(f"- {sentence}" for sentence in self.sentences)])


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
