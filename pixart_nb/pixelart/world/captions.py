"""English captions of scenes of one or two things, short and long, in several wordings."""

from __future__ import annotations

import numpy as np

from pixart_nb.pixelart.captions import COLOUR_SYNONYMS, OBJECT_SYNONYMS, SYNONYM_SHARE, WHERE, with_article
from pixart_nb.pixelart.world.scenes import WorldScene

#: The relation seen from the second thing, which some wordings name first.
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "in front of": "behind"}
PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "high above", "over"),
    "below": ("below", "under", "beneath"),
    "in front of": ("in front of", "before"),
    "behind": ("behind", "at the back of"),
}
FORMS = (
    "{subject} {where}",
    "{subject} {where}, pixel art",
    "pixel art of {subject} {where}",
    "{setting}: {subject}",
    "{where}, {subject}",
    "a detailed pixel art scene of {subject} {where}",
    "a retro game scene with {subject} {where}, clean outlines and soft shading",
)


def short_world_caption(scene: WorldScene) -> str:
    """Return the canonical caption, such as ``a red cat left of a blue boat on a beach``."""
    things = [f"{with_article(thing.colour)} {thing.object}" for thing in scene.things]
    return f"{f' {scene.relation} '.join(things)} {WHERE[scene.setting][0]}"


def world_caption(scene: WorldScene, rng: np.random.Generator) -> str:
    """Return a caption in one of many wordings; the same state of ``rng`` gives the same words."""
    return " ".join(word for word, _ in caption_words(scene, rng))


def caption_words(
    scene: WorldScene, rng: np.random.Generator, names: tuple[str, ...] | None = None
) -> list[tuple[str, int]]:
    """Return the words of ``world_caption``, each with the number of the thing that it belongs to, or -1.

    ``names`` replaces the objects' names, as new words would.
    """
    chosen = names or tuple(_word(thing.object, OBJECT_SYNONYMS, rng) for thing in scene.things)
    things = [
        (f"{with_article(_word(thing.colour, COLOUR_SYNONYMS, rng))} {name}", number)
        for number, (thing, name) in enumerate(zip(scene.things, chosen, strict=True))
    ]
    relation = scene.relation
    if relation and rng.random() < 0.3:
        things, relation = things[::-1], INVERSE[relation]
    form = str(rng.choice(FORMS))
    start, end = form.format(
        subject="\n", where=rng.choice(WHERE[scene.setting]), setting=scene.setting
    ).split("\n")  # fmt: skip
    parts = [(start, -1), things[0]]
    if relation:
        parts += [(str(rng.choice(PHRASES[relation])), -1), things[1]]
    words = [(word, number) for text, number in parts for word in text.split()]
    if end.startswith(","):  # the comma belongs to the word before
        words[-1] = (words[-1][0] + ",", words[-1][1])
        end = end[1:]
    return words + [(word, -1) for word in end.split()]


def _word(name: str, synonyms: dict[str, tuple[str, ...]], rng: np.random.Generator) -> str:
    others = synonyms.get(name, ())
    return str(rng.choice(others)) if others and rng.random() < SYNONYM_SHARE else name
