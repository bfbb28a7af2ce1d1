"""Do attention maps show where things are? Word maps against the objects that the evaluator finds in the pictures."""

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
from pixart_nb.core.sampling.randomness import picture_generators
from pixart_nb.pixelart.captions import short_caption
from pixart_nb.pixelart.evaluator import SpriteEvaluator
from pixart_nb.pixelart.scenes import Scene

#: A map's threshold lies this far between its least and its greatest value.
THRESHOLD = 0.5


@dataclass(frozen=True)
class Located:
    """A picture, (H, W, 3) uint8, where the evaluator sees its object, (H, W) bool, and the words of its prompt.

    ``maps`` (words, h, w) are the words' maps in tokens, ``overlaps`` (words,) the overlap (IoU, 0..1) of each map,
    thresholded, with the object.
    """

    scene: Scene
    picture: np.ndarray
    mask: np.ndarray
    words: tuple[str, ...]
    maps: np.ndarray
    overlaps: np.ndarray

    def overlap_of(self, word: str) -> float:
        """Overlap of a word of the prompt with the object."""
        return float(self.overlaps[self.words.index(word)])


def locate_words(
    pipe: Any,
    scenes: Sequence[Scene],
    *,
    steps: int = SAMPLING_STEPS,
    guidance: float = GUIDANCE_SCALE,
    batch_size: int = 12,
    seed: int = 0,
    height: int = 128,
    width: int = 128,
    layers: Layers = None,
    kept_steps: Numbers = None,
    threshold: float = THRESHOLD,
) -> list[Located]:
    """Draw scenes from their short captions, and compare where words are attended from with where the object is.

    Args:
        pipe: a pipeline of a model of this project's pixel art, such as data/tiny-sigma.
        scenes: ``held_out_scenes(count)`` gives those that training never shows.
        steps, guidance, seed, height, width: of the sampling; each picture has a random stream of its own.
        batch_size: pictures drawn and traced at once.
        layers, kept_steps: whose maps are averaged; None is all.
        threshold: see ``THRESHOLD``.
    """
    if batch_size < 1 or not scenes:
        raise PixArtNBError(
            f"need a batch size of at least 1 and a scene, got {batch_size} and {len(scenes)} scenes"
        )
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
    found: list[Located] = []
    with tqdm(total=len(scenes), desc="locate", unit="picture") as bar:
        for first in range(0, len(scenes), batch_size):
            batch = scenes[first : first + batch_size]
            rngs = picture_generators(seed, range(first, first + len(batch)))
            prompts = [short_caption(scene) for scene in batch]
            with trace(pipe, layers, attention="cross", steps=kept_steps, announce=None) as t:
                images = pipe(
                    prompts, generator=rngs, use_resolution_binning=False, output_type="np", **call
                )[0]
            pictures = to_uint8(images)
            verdicts = SpriteEvaluator().evaluate_many(pictures)
            for row, (scene, verdict) in enumerate(zip(batch, verdicts, strict=True)):
                found.append(_located(t, row, scene, pictures[row], verdict.mask, threshold))
            bar.update(len(batch))
    return found


def _located(
    t: Trace, row: int, scene: Scene, picture: np.ndarray, mask: np.ndarray, threshold: float
) -> Located:
    maps = t.word_maps(row=row)
    overlaps = np.array([overlap(thresholded(part, mask.shape, threshold), mask) for part in maps])
    return Located(scene, picture, mask, tuple(t.words(row)), maps, overlaps)


def mean_overlaps(found: Sequence[Located]) -> dict[str, float]:
    """Mean overlaps with the object of the ``object``'s noun, its ``colour``, and the ``setting``'s word (a wrong one).

    Of the words that name neither object nor colour, the setting and words without content, ``mean_wrong`` is the
    mean, and ``best_wrong`` that of the word which overlaps most in each picture, chosen afterwards. ``count`` of
    pictures.
    """
    roles = {
        role: np.mean([one.overlap_of(getattr(one.scene, role)) for one in found])
        for role in ("object", "colour", "setting")
    }
    wrong = [
        [one.overlap_of(word) for word in one.words if word not in (one.scene.object, one.scene.colour)]
        for one in found
    ]
    return {
        "count": len(found),
        **{k: float(v) for k, v in roles.items()},
        "mean_wrong": float(np.mean([np.mean(overlaps) for overlaps in wrong])),
        "best_wrong": float(np.mean([max(overlaps) for overlaps in wrong])),
    }


def thresholded(map_: np.ndarray, shape: tuple[int, int], threshold: float = THRESHOLD) -> np.ndarray:
    """A map (h, w) enlarged bilinearly to ``shape``, where it is above the threshold: (H, W) bool."""
    factors = [large / small for large, small in zip(shape, map_.shape, strict=True)]
    large = zoom(map_.astype(np.float64), factors, order=1, mode="nearest", grid_mode=True)
    low, high = map_.min(), map_.max()
    return large > low + threshold * (high - low)


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two masks; 0 if both are empty."""
    union = np.count_nonzero(found | truth)
    return np.count_nonzero(found & truth) / union if union else 0.0
