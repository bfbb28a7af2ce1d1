"""English captions of scenes of one or two things, short and long, in several wordings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.scenes import COLOURS, POSITIONS, RELATIONS, SIZES, USUAL_POSITION, USUAL_SIZE, Scene, Thing

#: Share of captions in which a synonym replaces the word: enough to learn it, too few to blur the ten colours.
SYNONYM_SHARE = 0.05

COLOUR_SYNONYMS: dict[str, tuple[str, ...]] = {"purple": ("violet",), "red": ("crimson",), "teal": ("turquoise",)}

OBJECT_SYNONYMS: dict[str, tuple[str, ...]] = {
    "boat": ("sailboat",),
    "cat": ("kitten",),
    "cup": ("mug",),
    "gem": ("diamond",),
    "hat": ("wizard hat",),
    "lantern": ("lamp",),
    "mushroom": ("toadstool",),
    "tree": ("pine tree",),
}

#: Phrases of each setting, the canonical one first. None has a colour word: the only colour is the object's.
WHERE: dict[str, tuple[str, ...]] = {
    "grass": ("on grass", "on the grass", "on the grass under a clear sky", "on short grass in a meadow"),
    "desert": ("in the desert", "in a sandy desert", "on the sand of a dry desert", "in the desert by a dune"),
    "snow": ("in the snow", "on fresh snow", "in falling snow", "in the snow on a cold winter day"),
    "cave": ("in a cave", "in a dark cave", "on the floor of a stone cave", "in a cave under hanging rocks"),
    "night": ("at night", "at night under the stars", "on a starry night", "on dark ground at night"),
    "beach": ("on a beach", "on a sandy beach", "on a beach by the sea", "on the beach by the waves"),
    "forest": ("in a forest", "in a dark forest", "in a forest among the trunks", "on the soil of a forest"),
    "lava": ("near lava", "near hot lava", "above glowing lava", "in a dark volcano with lava below"),
}

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
#: Phrases of where one thing is, the canonical one first.
POSITION_PHRASES = {
    "left": ("on the left", "at the left"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "at the right"),
}
#: How often a caption names the usual size, or the usual position, of one thing.
NAMED = 0.5
FORMS = (
    "{subject} {where}",
    "{subject} {where}, pixel art",
    "pixel art of {subject} {where}",
    "{setting}: {subject}",
    "{where}, {subject}",
    "a detailed pixel art scene of {subject} {where}",
    "a retro game scene with {subject} {where}, clean outlines and soft shading",
)


#: Thing in a canonical caption: article, size, colour, object.
_THING = re.compile(rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) (\w+)")


def with_article(words: str) -> str:
    """Return the words with ``a`` or ``an`` before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def short_caption(scene: Scene) -> str:
    """Return the canonical caption, such as ``a red cat left of a blue boat on a beach``.

    That of one thing names its size and position if the scene does: ``a large red cat on the left, on a beach``.
    """
    things = [with_article(_words(scene.size, thing.colour, thing.object)) for thing in scene.things]
    subject = f" {scene.relation} ".join(things)
    if scene.position:
        subject += f" {POSITION_PHRASES[scene.position][0]},"
    return f"{subject} {WHERE[scene.setting][0]}"


def silent_caption(scene: Scene) -> str:
    """Return the canonical caption without size and position."""
    return short_caption(replace(scene, size="", position=""))


def scene_of(caption: str) -> Scene | None:
    """Return the scene of a canonical caption, unseen objects included, or None for any other text.

    >>> scene_of("a red anchor on grass")
    Scene(things=(Thing(object='anchor', colour='red'),), setting='grass', relation='', size='', position='')
    """
    setting = next((name for name, phrases in WHERE.items() if caption.endswith(f" {phrases[0]}")), "")
    text = caption.removesuffix(WHERE[setting][0]).strip() if setting else ""
    position = next((name for name in POSITIONS if text.endswith(f" {POSITION_PHRASES[name][0]},")), "")
    text = text.removesuffix(f" {POSITION_PHRASES[position][0]},") if position else text
    relation = next((name for name in RELATIONS if f" {name} " in text), "")
    matches = [_THING.fullmatch(part) for part in (text.split(f" {relation} ") if relation else [text])]
    if not all(matches):
        return None
    try:
        scene = Scene(tuple(Thing(m[3], m[2]) for m in matches), setting, relation, matches[0][1] or "", position)
    except PixArtNBError:  # an unknown object, or a size beside another thing
        return None
    return scene if short_caption(scene) == caption else None


def named_scenes(captions: Iterable[str]) -> list[Scene]:
    """Return the scenes that canonical captions name, in order.

    Raises ``PixArtNBError`` that quotes the first that is no canonical caption.
    """
    captions = list(captions)
    scenes = [scene_of(caption) for caption in captions]
    if None in scenes:
        raise PixArtNBError(
            f"{captions[scenes.index(None)]!r} names no scene; expected such as 'a red mushroom on grass' or "
            "'a red cat left of a blue boat on a beach'"
        )
    return scenes


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption in one of many wordings; the same state of ``rng`` gives the same words.

    A large thing, or one in the middle, may be captioned without its size or position.
    """
    return " ".join(word for word, _ in caption_words(as_captioned(scene, rng), rng))


def long_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption that names everything that the scene has, and the style."""
    return " ".join(word for word, _ in caption_words(scene, rng, form=str(rng.choice(FORMS[-2:]))))


def as_captioned(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return a scene as a caption describes it: some captions leave out a usual size or position of one thing.

    So the words of a caption, or their absence, always say how large a thing is and where it stands.
    """
    usual = {"size": USUAL_SIZE, "position": USUAL_POSITION}
    silent = {key: "" for key, name in usual.items() if rng.random() > NAMED and getattr(scene, key) == name}
    return replace(scene, **silent)


def caption_words(
    scene: Scene, rng: np.random.Generator, names: tuple[str, ...] | None = None, form: str = ""
) -> list[tuple[str, int]]:
    """Return the words of a caption, each with the number of the thing that it belongs to, or -1.

    ``names`` replaces the objects' names, as new words would. ``form`` is one of ``FORMS``, drawn if it is "".
    """
    chosen = names or tuple(_word(thing.object, OBJECT_SYNONYMS, rng) for thing in scene.things)
    things = [
        (with_article(_words(scene.size, _word(thing.colour, COLOUR_SYNONYMS, rng), name)), number)
        for number, (thing, name) in enumerate(zip(scene.things, chosen, strict=True))
    ]
    relation = scene.relation
    if relation and rng.random() < 0.3:
        things, relation = things[::-1], INVERSE[relation]
    form = form or str(rng.choice(FORMS))
    start, end = form.format(
        subject="\n", where=rng.choice(WHERE[scene.setting]), setting=scene.setting
    ).split("\n")  # fmt: skip
    parts = [(start, -1), things[0]]
    if relation:
        parts += [(str(rng.choice(PHRASES[relation])), -1), things[1]]
    if scene.position:
        parts.append((str(rng.choice(POSITION_PHRASES[scene.position])), -1))
        end = end if end.startswith(",") or not end else "," + end
    words = [(word, number) for text, number in parts for word in text.split()]
    if end.startswith(","):  # the comma belongs to the word before
        words[-1] = (words[-1][0] + ",", words[-1][1])
        end = end[1:]
    return words + [(word, -1) for word in end.split()]


def _words(*words: str) -> str:
    return " ".join(word for word in words if word)


def _word(name: str, synonyms: dict[str, tuple[str, ...]], rng: np.random.Generator) -> str:
    others = synonyms.get(name, ())
    return str(rng.choice(others)) if others and rng.random() < SYNONYM_SHARE else name
