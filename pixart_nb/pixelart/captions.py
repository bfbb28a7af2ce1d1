"""English captions of drawn scenes, in many wordings that all name the object, its colour and the setting."""

from collections.abc import Iterable
from functools import lru_cache
from itertools import product

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.scenes import COLOURS, OBJECTS, SETTINGS, UNSEEN_OBJECTS, Scene

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

SHORT_FORMS = (
    "{a_colour} {object} {where}",
    "{colour} {object} {where}",
    "{colour} {object}, {setting}",
    "{a_colour} {object} {where}, pixel art",
    "pixel art of {a_colour} {object} {where}",
    "pixel art, {colour} {object}, {setting}",
    "a game icon: {a_colour} {object} {where}",
    "a sprite of {a_colour} {object} {where}",
    "a small {colour} {object} {where}",
    "{setting}, {colour} {object}",
)

LONG_FORMS = (
    "a small {colour} {object} {where}, 16-bit game sprite",
    "a pixel art picture of {a_colour} {object} {where}, retro game style",
    "{a_colour} {object} with a dark outline and a bright highlight, {where}, pixel art",
    "a retro video game sprite of a single {colour} {object} {where}, seen in the middle of the picture",
    "pixel art in which the {object} is {colour}, drawn {where} with a few flat shades",
    "one {colour} {object} {where}, large square pixels, clean outline, 16-bit game item",
)


def with_article(words: str) -> str:
    """Return the words with ``a`` or ``an`` before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _word(name: str, synonyms: dict[str, tuple[str, ...]], rng: np.random.Generator) -> str:
    others = synonyms.get(name, ())
    return str(rng.choice(others)) if others and rng.random() < SYNONYM_SHARE else name


def _fill(form: str, scene: Scene, rng: np.random.Generator) -> str:
    colour = _word(scene.colour, COLOUR_SYNONYMS, rng)
    where = str(rng.choice(WHERE[scene.setting]))
    return form.format(
        colour=colour,
        a_colour=with_article(colour),
        object=_word(scene.object, OBJECT_SYNONYMS, rng),
        setting=scene.setting,
        where=where,
    )


def short_caption(scene: Scene) -> str:
    """Return the canonical caption of a scene, such as ``a red mushroom on grass``."""
    return f"{with_article(scene.colour)} {scene.object} {WHERE[scene.setting][0]}"


def named_scenes(captions: Iterable[str]) -> list[Scene]:
    """Return the scenes that canonical captions name, in order; unseen objects are among them.

    >>> named_scenes(["a red anchor on grass"])
    [Scene(object='anchor', colour='red', setting='grass')]

    Raises ``PixArtNBError`` that quotes the first that is no canonical caption.
    """
    scenes, captions = scenes_by_caption(), list(captions)
    for caption in captions:
        if caption not in scenes:
            raise PixArtNBError(f"{caption!r} names no scene; expected such as 'a red mushroom on grass'")
    return [scenes[caption] for caption in captions]


@lru_cache(maxsize=1)
def scenes_by_caption() -> dict[str, Scene]:
    """Return all scenes, unseen objects included, by their canonical captions."""
    scenes = (Scene(*parts) for parts in product(OBJECTS + UNSEEN_OBJECTS, COLOURS, SETTINGS))
    return {short_caption(scene): scene for scene in scenes}


def long_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption of 9 to 25 words that also names the style."""
    return _fill(str(rng.choice(LONG_FORMS)), scene, rng)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption in one of many wordings, short or long; the same state of ``rng`` gives the same words."""
    return _fill(str(rng.choice(SHORT_FORMS + LONG_FORMS)), scene, rng)
