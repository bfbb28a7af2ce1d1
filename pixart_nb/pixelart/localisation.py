"""Localisation by attention: overlap of word maps with the objects that the evaluator finds in the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import zoom
from tqdm.auto import tqdm

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_STEPS
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.recorder import trace
from pixart_nb.core.hooks.selection import Layers, Numbers
from pixart_nb.core.hooks.trace import Trace
from pixart_nb.core.sampling.images import to_uint8
from pixart_nb.core.sampling.pipeline_base import hidden_progress_bar
from pixart_nb.core.sampling.samplers import image_generators
from pixart_nb.pixelart.batches import generator
from pixart_nb.pixelart.captions import short_caption
from pixart_nb.pixelart.evaluation import evaluator_of
from pixart_nb.pixelart.scenes import Scene, draw_with_masks
from pixart_nb.pixelart.split import training_scene

#: Position of the threshold of a map between its minimum and its maximum.
THRESHOLD = 0.5


@dataclass(frozen=True)
class LocatedWords:
    """An image (H, W, 3) uint8, the masks (H, W) bool of its one or two things, and the words of its prompt.

    ``maps`` (words, h, w) are the words' maps in tokens; ``overlaps`` (words, things) are the overlaps (IoU, 0 to 1) of
    the thresholded maps with each thing.
    """

    scene: Scene
    image: np.ndarray
    masks: tuple[np.ndarray, ...]
    words: tuple[str, ...]
    maps: np.ndarray
    overlaps: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        """Mask of the first thing."""
        return self.masks[0]

    def overlap_of(self, word: str, thing: int = 0) -> float:
        """Return the overlap of a word of the prompt with a thing."""
        return float(self.overlaps[self.words.index(word), thing])

    def prefers_its_own(self, part: str = "object") -> list[bool]:
        """Return for the noun (or the ``colour``) of each of two things whether its map overlaps its own thing more.

        A colour that both things have is left out.
        """
        names = [getattr(thing, part) for thing in self.scene.things]
        return [
            self.overlap_of(name, k) > self.overlap_of(name, 1 - k)
            for k, name in enumerate(names)
            if names.count(name) == 1
        ]


def locate_words(
    pipe: Any,
    scenes: Sequence[Scene],
    *,
    sampling_steps: int = SAMPLING_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 8,
    seed: int = 0,
    height: int = 256,
    width: int = 256,
    layers: Layers = None,
    kept_steps: Numbers = None,
    threshold: float = THRESHOLD,
) -> list[LocatedWords]:
    """Draw scenes from their short captions, and compare the attention maps of words with the objects.

    Args:
        pipe: a pipeline of a model of drawn scenes, such as data/tiny-sigma.
        scenes: ``held_out_scenes(count)`` gives those that training never shows.
        sampling_steps, guidance_scale, seed, height, width: of the sampling; each image has its own random stream.
        batch_size: images drawn and traced at once.
        layers, kept_steps: layers and steps whose maps are averaged; None is all.
        threshold: see ``THRESHOLD``.
    """
    if batch_size < 1 or not scenes:
        raise PixArtNBError(f"need a batch size of at least 1 and a scene, got {batch_size} and {len(scenes)} scenes")
    size = {"height": height, "width": width}
    call = {"num_inference_steps": sampling_steps, "guidance_scale": guidance_scale, **size}
    located: list[LocatedWords] = []
    reader = evaluator_of(scenes)
    with hidden_progress_bar(pipe), tqdm(total=len(scenes), desc="locate", unit="image") as bar:
        for first in range(0, len(scenes), batch_size):
            batch = scenes[first : first + batch_size]
            rngs = image_generators(seed, range(first, first + len(batch)))
            prompts = [short_caption(scene) for scene in batch]
            with trace(pipe, layers, attention="cross", steps=kept_steps, announce=None) as t:
                drawn = pipe(prompts, generator=rngs, use_resolution_binning=False, output_type="np", **call)[0]
            images = to_uint8(drawn)
            for row, scene in enumerate(batch):
                masks = reader.read_for(images[row], scene).masks
                located.append(_located(t, row, scene, images[row], masks, threshold))
            bar.update(len(batch))
    return located


def _located(
    t: Trace, row: int, scene: Scene, image: np.ndarray, masks: tuple[np.ndarray, ...], threshold: float
) -> LocatedWords:
    maps = t.word_maps(row=row)
    covered = [thresholded(part, image.shape[:2], threshold) for part in maps]
    overlaps = np.array([[overlap(one, mask) for mask in masks] for one in covered])
    return LocatedWords(scene, image, masks, tuple(t.words(row)), maps, overlaps)


def position_prior(height: int = 256, width: int = 256, count: int = 240, seed: int = 0) -> np.ndarray:
    """Return the mean mask (H, W) float64 of the objects of ``count`` training scenes: a map that needs no model."""
    rng = generator(seed, 16)
    return np.mean([draw_with_masks(training_scene(rng, 0), rng, height, width).masks[0] for _ in range(count)], axis=0)


def overlaps_by_word(located: Sequence[LocatedWords], prior: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Return the overlap (IoU) with the first thing in each image, by word: arrays (images that have the word,).

    ``object``, ``colour`` and ``setting`` stand for the words of the scene; other words, such as "on" and the end mark,
    for themselves. ``position prior`` is the overlap of the thresholded ``prior`` (H, W), a baseline without a model.
    """
    values: dict[str, list[float]] = {"object": [], "colour": [], "setting": []}
    for one in located:
        thing = one.scene.things[0]
        roles = {thing.object: "object", thing.colour: "colour", one.scene.setting: "setting"}
        for word, value in zip(one.words, one.overlaps[:, 0], strict=True):
            values.setdefault(roles.get(word, word), []).append(float(value))
    if prior is not None and located:
        mask = thresholded(prior, prior.shape)
        values["position prior"] = [overlap(mask, one.mask) for one in located]
    return {word: np.array(numbers) for word, numbers in values.items() if numbers}


def mean_overlaps(located: Sequence[LocatedWords], prior: np.ndarray | None = None) -> dict[str, float]:
    """Return the means of ``overlaps_by_word`` for the scene's three words and the prior, and of the wrong words.

    Over the words that name neither object nor colour (the setting and function words), ``mean_wrong`` is the mean, and
    ``best_wrong`` that of the word which overlaps most in each image. ``count``: number of images.
    """
    by_word = overlaps_by_word(located, prior)
    wrong = [
        [
            one.overlap_of(word)
            for word in one.words
            if word not in (one.scene.things[0].object, one.scene.things[0].colour)
        ]
        for one in located
    ]
    roles = [role for role in ("object", "colour", "setting", "position prior") if role in by_word]
    return {
        "count": len(located),
        **{role.replace(" ", "_"): float(by_word[role].mean()) for role in roles},
        "mean_wrong": float(np.mean([np.mean(overlaps) for overlaps in wrong])),
        "best_wrong": float(np.mean([max(overlaps) for overlaps in wrong])),
    }


def thresholded(map_: np.ndarray, shape: tuple[int, int], threshold: float = THRESHOLD) -> np.ndarray:
    """Resize a map (h, w) bilinearly to ``shape``, and return where it is above the threshold: (H, W) bool."""
    factors = [large / small for large, small in zip(shape, map_.shape, strict=True)]
    large = zoom(map_.astype(np.float64), factors, order=1, mode="nearest", grid_mode=True)
    low, high = map_.min(), map_.max()
    return large > low + threshold * (high - low)


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    """Return the intersection over union of two masks; 0 if both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 0.0
