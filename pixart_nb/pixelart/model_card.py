"""Model card of a bundled model: ``README.md`` with the words of its training captions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from pixart_nb.core.io import write_text
from pixart_nb.pixelart.captions import COLOUR_SYNONYMS, LONG_FORMS, OBJECT_SYNONYMS, SHORT_FORMS, WHERE
from pixart_nb.pixelart.scenes import COLOURS, OBJECTS, SETTINGS

#: Fields of the forms of captions.
_FIELD = re.compile(r"\{.*?\}")
_CARD = """---
{header}---

# {title}

{about}

## What it draws

{draws}

- Objects: {objects}.
- Colours: {colours}.
- Settings: {settings}.

Words that its training captions do not have are named when a prompt has them; `vocabulary` above lists those that they
have. It knows no photographs, people or text.

## Training

{training} The same command makes it again from nothing: `{command}`. The losses are in `curves/`.

## Scores

{scores}

## Licence

Weights: Apache-2.0. Training images and captions are drawn and written by the code of this repository (CC0 1.0); no
image of anyone else was used.
"""


@dataclass(frozen=True)
class ModelCard:
    """Facts of a bundled model; texts are Markdown."""

    title: str
    about: str
    draws: str
    training: str
    command: str
    scores: str
    vocabulary: tuple[str, ...]
    objects: tuple[str, ...] = OBJECTS
    colours: tuple[str, ...] = COLOURS
    settings: tuple[str, ...] = SETTINGS

    def write(self, folder: Path) -> None:
        """Write ``README.md`` to the model's folder."""
        header = {"license": "apache-2.0", "pipeline_tag": "text-to-image", "vocabulary": sorted(self.vocabulary)}
        lists = {name: ", ".join(getattr(self, name)) for name in ("objects", "colours", "settings")}
        text = {name: getattr(self, name) for name in ("title", "about", "draws", "training", "command", "scores")}
        header_text = yaml.safe_dump(header, sort_keys=False, default_flow_style=None, width=110)
        write_text(folder / "README.md", _CARD.format(header=header_text, **lists, **text))


def words_of(texts: Iterable[str]) -> set[str]:
    """Return the words of texts, without the fields of forms.

    >>> sorted(words_of(["A {colour} cat, pixel-art"]))
    ['a', 'art', 'cat', 'pixel']
    """
    return {word for text in texts for word in re.findall(r"[a-z0-9]+", _FIELD.sub(" ", text.lower()))}


def caption_vocabulary() -> tuple[str, ...]:
    """Return all words that captions of scenes can have."""
    phrases = [*SHORT_FORMS, *LONG_FORMS, *OBJECTS, *COLOURS, *SETTINGS, "a", "an"]
    for table in (WHERE, OBJECT_SYNONYMS, COLOUR_SYNONYMS):
        phrases += [phrase for values in table.values() for phrase in values]
    return tuple(sorted(words_of(phrases)))


def small_images_card() -> ModelCard:
    """Return the card of ``data/tiny-sigma``."""
    return ModelCard(
        title="tiny-sigma",
        about=(
            "A PixArt-Sigma pipeline of 9 MB in the layout of diffusers, so that everything in this repository runs on "
            "a CPU: a transformer (192 wide, 6 blocks, 6 heads, 3.9 M parameters), a VAE of factor 8, a T5 encoder "
            "(128 wide) and its tokenizer, all trained by this project."
        ),
        draws="Pixel art of one coloured object on a setting, at 128 x 128 pixels: `a red mushroom on grass`.",
        training=(
            "VAE, text encoder and transformer were trained one after the other on 17,280 drawn scenes, the "
            "transformer for 16,000 steps of 32 images. 240 of 2,400 combinations of object, colour and setting were "
            "held out."
        ),
        command="pixart-nb tiny",
        scores=(
            "`pixart-nb evaluate --count 240`: 240 held-out scenes, 20 steps, guidance 4.5. Right: object 93.8%, "
            "colour 99.6%, setting 100.0%, all three 93.8%. Distance of textures from drawn images, in that of other "
            "drawn images, by level of a Laplacian pyramid: 128 px 2.57, 64 px 1.47, 32 px 1.10, 16 px 1.13."
        ),
        vocabulary=caption_vocabulary(),
    )
