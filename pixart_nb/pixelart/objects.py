"""Vector drawings of the objects, in the unit square, from back to front: ``objects.json`` beside this file.

A part has a shape and the fields of ``Piece``. A shape is a list of calls that are united: ``smooth``, ``polygon`` and
``stroke`` with points (x, y), ``ellipse`` with centre, radii and turn, ``box`` with two corners.
"""

from __future__ import annotations

import json
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from pixart_nb.pixelart.render import Piece, Shape, box, ellipse, polygon, smooth, stroke

_SHAPES = {"box": box, "ellipse": ellipse, "polygon": polygon, "smooth": smooth, "stroke": stroke}


def _shape(calls: list[list[Any]]) -> Shape:
    return reduce(or_, (_call(*call) for call in calls))


def _call(shape: str, *values: Any) -> Shape:
    named = values[-1] if isinstance(values[-1], dict) else {}
    return _SHAPES[shape](*values[: len(values) - bool(named)], **named)


def _read(path: Path) -> dict[str, tuple[Piece, ...]]:
    drawings = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: tuple(Piece(**part | {"shape": _shape(part["shape"])}) for part in parts)
        for name, parts in drawings.items()
    }


#: Drawings of all objects by name.
DRAWINGS = _read(Path(__file__).with_name("objects.json"))
#: Objects that can be drawn but are in no training set of the bundled model, for teaching it something new.
UNSEEN_OBJECTS: dict[str, tuple[Piece, ...]] = {name: DRAWINGS[name] for name in ("anchor", "robot")}
OBJECTS: dict[str, tuple[Piece, ...]] = {name: d for name, d in DRAWINGS.items() if name not in UNSEEN_OBJECTS}
