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
    things = [
        f"{with_article(_word(thing.colour, COLOUR_SYNONYMS, rng))} {_word(thing.object, OBJECT_SYNONYMS, rng)}"
        for thing in scene.things
    ]
    relation = scene.relation
    if relation and rng.random() < 0.3:
        things, relation = things[::-1], INVERSE[relation]
    subject = things[0] if not relation else f"{things[0]} {rng.choice(PHRASES[relation])} {things[1]}"
    form = str(rng.choice(FORMS))
    return form.format(subject=subject, where=rng.choice(WHERE[scene.setting]), setting=scene.setting)


def _word(name: str, synonyms: dict[str, tuple[str, ...]], rng: np.random.Generator) -> str:
    others = synonyms.get(name, ())
    return str(rng.choice(others)) if others and rng.random() < SYNONYM_SHARE else name
