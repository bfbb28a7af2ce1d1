"""Model card of a bundled model: ``README.md`` with the words of its training captions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from pixart_nb.core.io import write_text
from pixart_nb.pixelart.captions import COLOUR_SYNONYMS, FORMS, OBJECT_SYNONYMS, PHRASES, POSITION_PHRASES, WHERE
from pixart_nb.pixelart.objects import OBJECTS
from pixart_nb.pixelart.scenes import COLOURS, SIZES
from pixart_nb.pixelart.settings import SETTINGS

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

{training}

The same command makes it again from scratch: `{command}`. The losses are in `curves/`.

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
    sizes: tuple[int, ...]
    objects: tuple[str, ...] = tuple(OBJECTS)
    colours: tuple[str, ...] = COLOURS
    settings: tuple[str, ...] = tuple(SETTINGS)

    def write(self, folder: Path) -> None:
        """Write ``README.md`` to the model's folder."""
        header = {"license": "apache-2.0", "pipeline_tag": "text-to-image", "sizes": list(self.sizes)}
        header |= {"most_objects": 2, "objects": list(object_words()), "vocabulary": sorted(self.vocabulary)}
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
    phrases = [*FORMS, *OBJECTS, *COLOURS, *SETTINGS, *SIZES, "a", "an"]
    for table in (WHERE, OBJECT_SYNONYMS, COLOUR_SYNONYMS, PHRASES, POSITION_PHRASES):
        phrases += [phrase for values in table.values() for phrase in values]
    return tuple(sorted(words_of(phrases)))


def object_words() -> tuple[str, ...]:
    """Return the words that name an object: of two words the last."""
    names = [name for object in OBJECTS for name in (object, *OBJECT_SYNONYMS.get(object, ()))]
    return tuple(sorted({name.split()[-1] for name in names}))


_TEXTURES = """
Textures: sliced Wasserstein distance of patches from drawings of other scenes, divided by that of drawings of the same
scenes, by level of a Laplacian pyramid (1: as near as a drawing)."""
#: Results of ``pixart-nb evaluate`` by stage, as Markdown; empty for stages that nobody has evaluated.
_SCORES: dict[str, str] = {
    "256": f"""`pixart-nb evaluate --count 240`: 240 held-out scenes, 20 steps, guidance 2.

| right | objects | colours | setting | relation | everything |
| --- | --- | --- | --- | --- | --- |
| one object | 100% | 100% | 100% | | 100% |
| two objects (`--things 2`) | 99.6% | 100% | 99.2% | 100% | 98.8% |
| one object, 4 steps | 100% | 100% | 100% | | 100% |
| one object, guidance 4.5 | | | | | 99.6% |
{_TEXTURES}

| | 256 px | 128 px | 64 px | 32 px | 16 px |
| --- | --- | --- | --- | --- | --- |
| one object | 1.86 | 1.41 | 1.56 | 1.37 | 0.98 |
| two objects | 1.60 | 1.09 | 1.01 | 1.08 | 1.00 |
| one object, 4 steps | 2.67 | 2.48 | 3.26 | 2.25 | 1.09 |
| one object, guidance 4.5 | 2.76 | 2.05 | 2.24 | 1.59 | 1.21 |

Guidance above 2 adds contrast and bleaches skies. The VAE reconstructs 40 emoji, which no training showed, with
30.2 dB.""",
    "1024": f"""`pixart-nb evaluate -c configs/inference/tiny-1k.yaml`: 20 steps, guidance 2,
240 held-out scenes at 512 and 200 at 1024.

| right | objects | colours | setting | size | position | relation | everything |
| --- | --- | --- | --- | --- | --- | --- | --- |
| 512 x 512, one object | 98.3% | 97.5% | 99.2% | 97.5% | 99.0% | | 95.8% |
| 512 x 512, two objects | 85.4% | 82.1% | 96.7% | | | 90.0% | 78.8% |
| 1024 x 1024, one object | 99.0% | 99.0% | 99.5% | 98.8% | 99.4% | | 98.0% |
{_TEXTURES}

| 200 scenes | 1024 px | 512 px | 256 px | 128 px | 64 px | 32 px | 16 px |
| --- | --- | --- | --- | --- | --- | --- | --- |
| 512 x 512, one object | | 2.29 | 2.52 | 1.77 | 1.57 | 2.15 | 0.96 |
| 1024 x 1024, one object | 4.10 | 4.53 | 4.07 | 2.34 | 2.47 | 1.75 | 1.08 |

An image took 3.4 s at 512 and 23 s at 1024, on one core of an AMD EPYC.

### Compression of keys and values

The same training with and without it, 40 scenes of one object at 1024 x 1024. Textures are divided by the distance of
one drawing of the same scenes from another, so they compare with each other only.

| | setting | size | everything | time of a step | textures, from 1024 px to 16 px |
| --- | --- | --- | --- | --- | --- |
| compressed | 97.5% | 100% | 97.5% | 1 | 3.22, 4.02, 3.91, 2.42, 2.37, 1.84, 1.73 |
| not compressed | 100% | 97.0% | 97.5% | 1.30 | 3.79, 5.07, 4.77, 3.36, 3.02, 2.11, 1.55 |

### 4096 x 4096

`pixart-nb upscale` (1024, 2048 and 4096; strengths 0.5 and 0.4), 4 scenes of one object and 4 of two: everything right
in 7 of 8. The three finest levels of a Laplacian pyramid have 0.66, 0.74 and 1.11 times the energy of drawn scenes on
average (0.38 to 1.08 at the finest). 7 minutes an image on one core, beside other work.""",
}


#: What the training of the shipped weights had beside the recipe.
_BESIDE = {
    "256": (
        " The shipped weights were trained while the recipe took shape: with 1,427 steps of 16 whole images "
        "before the squares, with mirrored objects in the images of the first 1,734 steps of squares, and by "
        "two workers. The recipe as it is now was not run from scratch."
    ),
    "1024": (
        " The shipped weights were trained while the recipe took shape. Beside what the card of tiny-sigma says, the "
        "stage of 512 pixels began with weights that had 2,285 further steps at 256 pixels."
    ),
}


_COMPRESSED = {"1024": " Keys and values of the last three blocks are compressed 2 x 2 by a convolution."}


def bundled_card(stage: str, side: int, recipe: str) -> ModelCard:
    """Return the card of the bundled model of a stage for images of ``side`` pixels.

    ``recipe`` is the table of the stages of its transformer.
    """
    sizes = (512, 1024) if stage == "1024" else (side,)
    in_words = " or ".join(f"{size} x {size}" for size in sizes)
    return ModelCard(
        title={"256": "tiny-sigma", "1024": "tiny-sigma-1k"}.get(stage, f"tiny-sigma-{stage}"),
        about=(
            "A PixArt-Sigma pipeline of 11 MB in the layout of diffusers, so that everything in this repository runs "
            "on a CPU: a transformer (192 wide, 6 blocks, 6 heads, 3.9 M parameters), a VAE of factor 8, a T5 encoder "
            "(128 wide, 3 layers) and its tokenizer, all trained by this project." + _COMPRESSED.get(stage, "")
        ),
        draws=(
            f"Pixel art of one or two coloured objects in a setting, at {in_words} pixels with cells of 8 x 8: "
            "`a red mushroom on grass`, `a large red mushroom on the left, on grass`, `a red cat left of a blue boat "
            "on a beach`. One object is small, medium-sized or large, and stands on the left, in the middle or on the "
            "right. Two are left of, right of, above or in front of each other."
        ),
        training=(
            "Weak to strong, as the paper does. Squares lie near an object and are cut out of the images.\n\n"
            f"{recipe}\n\n"
            "240 of 2,400 combinations of object, colour and setting, and 45 of 435 pairs of objects, were held out. "
            "The VAE also saw synthetic images of other kinds, so that it serves other images; its decoder was then "
            "trained alone, for sharp cells." + _BESIDE.get(stage, "")
        ),
        command={"256": "pixart-nb tiny", "1024": "pixart-nb tiny --stage 1024 -o data/tiny-sigma-1k"}.get(
            stage, f"pixart-nb tiny --stage {stage}"
        ),
        scores=_SCORES.get(stage, "Not evaluated."),
        vocabulary=caption_vocabulary(),
        sizes=sizes,
    )
