"""Scenes to train on and scenes held out: new combinations of an object, its colour and the setting, and new pairs."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.captions import as_captioned
from pixart_nb.pixelart.objects import OBJECTS
from pixart_nb.pixelart.scenes import COLOURS, POSITIONS, RELATIONS, SIZES, Scene, Thing, one
from pixart_nb.pixelart.settings import SETTINGS

HELD_OUT_TRIPLES = 240
HELD_OUT_PAIRS = 45
PAIR_SHARE = 0.5
#: Shares of the sizes of single things in training. Small ones have few cells to learn from.
SIZE_SHARES = (0.2, 0.35, 0.45)

Triple = tuple[str, str, str]


@cache
def held_out_triples() -> tuple[Triple, ...]:
    """Return the (object, colour, setting) that training never shows; it shows every two parts of them together."""
    triples = list(product(OBJECTS, COLOURS, SETTINGS))
    remaining: dict[tuple[str, str], int] = {}
    for pair in (pair for triple in triples for pair in combinations(triple, 2)):
        remaining[pair] = remaining.get(pair, 0) + 1
    chosen: list[Triple] = []
    for index in np.random.default_rng(0).permutation(len(triples)):
        pairs = list(combinations(triples[index], 2))
        if len(chosen) < HELD_OUT_TRIPLES and all(remaining[pair] > 1 for pair in pairs):
            chosen.append(triples[index])
            remaining.update({pair: remaining[pair] - 1 for pair in pairs})
    return tuple(chosen)


@cache
def held_out_pairs() -> tuple[tuple[str, str], ...]:
    """Return the pairs of objects that training never shows in one scene; it shows each of them in other pairs."""
    pairs = list(combinations(sorted(OBJECTS), 2))
    return tuple(pairs[k] for k in np.random.default_rng(1).permutation(len(pairs))[:HELD_OUT_PAIRS])


def is_held_out(scene: Scene) -> bool:
    """Return True for a scene with a held-out combination or pair."""
    if any((thing.object, thing.colour, scene.setting) in held_out_triples() for thing in scene.things):
        return True
    return tuple(sorted(thing.object for thing in scene.things)) in held_out_pairs()


def training_scene(rng: np.random.Generator, pair_share: float = PAIR_SHARE) -> Scene:
    """Draw a scene that is not held out; one of two different objects with the probability ``pair_share``.

    One of a single object has a size and a position.
    """
    relation = str(rng.choice(RELATIONS)) if rng.random() < pair_share else ""
    where = () if relation else (str(rng.choice(list(SIZES), p=SIZE_SHARES)), str(rng.choice(list(POSITIONS))))
    while True:
        objects = rng.choice(list(OBJECTS), 2 if relation else 1, replace=False)
        things = tuple(Thing(str(name), str(rng.choice(COLOURS))) for name in objects)
        scene = Scene(things, str(rng.choice(list(SETTINGS))), relation, *where)
        if not is_held_out(scene):
            return scene


def held_out_scenes(count: int, things: int = 1) -> list[Scene]:
    """Return ``count`` held-out scenes of one thing, or of two, spread evenly; the same for the same arguments.

    One thing has sizes and positions as in training, of which captions of the training may not tell the usual ones.
    """
    if things not in (1, 2) or not 1 <= count <= HELD_OUT_TRIPLES:
        named = {1: "one thing"}.get(things, f"{things} things")
        raise PixArtNBError(f"{count} scenes of {named}; expected 1 to {HELD_OUT_TRIPLES} of one or two things")
    if things == 1:
        chosen = [k * HELD_OUT_TRIPLES // count for k in range(count)]
        return [_with_position(*held_out_triples()[k], np.random.default_rng((3, k))) for k in chosen]
    rng, scenes = np.random.default_rng(2), []
    for number in range(count):
        pair = held_out_pairs()[number % HELD_OUT_PAIRS]
        chosen = rng.choice(COLOURS, 2, replace=False)
        both = tuple(Thing(name, str(colour)) for name, colour in zip(rng.permutation(pair), chosen, strict=True))
        scenes.append(Scene(both, str(rng.choice(list(SETTINGS))), RELATIONS[number % len(RELATIONS)]))
    return scenes


def _with_position(name: str, colour: str, setting: str, rng: np.random.Generator) -> Scene:
    where = str(rng.choice(list(SIZES), p=SIZE_SHARES)), str(rng.choice(list(POSITIONS)))
    return as_captioned(one(name, colour, setting, *where), rng)
