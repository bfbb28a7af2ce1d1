"""How well a pipeline draws what it is told, judged on scenes it was never trained on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_STEPS
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.images import to_uint8
from pixart_nb.core.sampling.randomness import picture_generators
from pixart_nb.core.training.validation import psnr, reconstruct
from pixart_nb.pixelart.captions import short_caption
from pixart_nb.pixelart.evaluator import SpriteEvaluator
from pixart_nb.pixelart.scenes import OBJECTS, Scene, all_scenes, draw, split_scenes


def held_out_scenes(count: int) -> list[Scene]:
    """``count`` scenes that training never shows, spread evenly over all of them.

    Raises:
        ValueError: ``count`` is not between 1 and the number of held-out scenes.
    """
    scenes = split_scenes()[1]
    if not 1 <= count <= len(scenes):
        raise PixArtNBError(f"count must be between 1 and {len(scenes)}, got {count}")
    return [scenes[k * len(scenes) // count] for k in range(count)]


def agreement(images: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """Shares of pictures whose object, colour, setting, and all three, are those of their prompts.

    ``images`` is (N, H, W, 3) float in [0, 1] or uint8. Only the canonical captions of scenes can be judged
    (``a red mushroom on grass``); other prompts are left out, and without any the answer is empty.
    """
    if len(images) != len(prompts):
        raise PixArtNBError(f"need as many prompts as pictures, got {len(prompts)} for {len(images)}")
    rows = [k for k, prompt in enumerate(prompts) if prompt in _scenes_by_caption()]
    if not rows:
        return {}
    pictures = images if images.dtype == np.uint8 else to_uint8(images)
    return SpriteEvaluator().accuracy(pictures[rows], [_scenes_by_caption()[prompts[k]] for k in rows])


@lru_cache(maxsize=1)
def _scenes_by_caption() -> dict[str, Scene]:
    return {short_caption(scene): scene for scene in all_scenes()}


def evaluate_model(
    pipe: Any,
    scenes: Sequence[Scene],
    *,
    steps: int = SAMPLING_STEPS,
    guidance: float = GUIDANCE_SCALE,
    batch_size: int = 24,
    seed: int = 0,
    height: int = 128,
    width: int = 128,
) -> dict[str, Any]:
    """Draw the scenes from their short captions and read them back.

    Args:
        pipe: a ``PixArtSigmaPipeline``, or anything that is called as one.
        scenes: what to draw; ``held_out_scenes`` gives those that training never shows. Unseen objects among them
            are candidates too when the pictures are read.
        steps, guidance: as ``num_inference_steps`` and ``guidance_scale`` of the pipeline.
        batch_size: pictures drawn at once. Each has a random stream of its own, so they do not depend on it.
        height, width: image pixels.

    Returns:
        ``count``; ``accuracy``, shares of right ``object``, ``colour``, ``setting`` and ``all``; ``object_accuracy``,
        the share of right objects among the pictures of each; ``seconds_per_picture``; ``pictures`` (N, H, W, 3) uint8.
    """
    started = time.perf_counter()
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}
    pictures = _draw_all(pipe, [short_caption(scene) for scene in scenes], batch_size, seed, call)
    seconds = (time.perf_counter() - started) / len(scenes)
    evaluator = SpriteEvaluator(OBJECTS + tuple(sorted({scene.object for scene in scenes} - set(OBJECTS))))
    return {
        "count": len(scenes),
        "accuracy": evaluator.accuracy(pictures, scenes),
        "object_accuracy": _object_accuracy(evaluator, pictures, scenes),
        "seconds_per_picture": seconds,
        "pictures": pictures,
    }


def judge(
    pipe: Any, latents: np.ndarray, scenes: Sequence[Scene]
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Decode latents (n, C, h, w) of the first n ``scenes``, one by one, and read them back.

    -> shares of right ``object``, ``colour``, ``setting`` and ``all``, and the pictures (H, W, 3) uint8.
    """
    pictures = [to_uint8(pipe.decode_latents(row[None]))[0] for row in latents]
    return SpriteEvaluator().accuracy(pictures, list(scenes[: len(pictures)])), pictures


def _draw_all(pipe: Any, prompts: list[str], batch_size: int, seed: int, call: dict[str, Any]) -> np.ndarray:
    if batch_size < 1 or not prompts:
        raise PixArtNBError(
            f"need a batch size of at least 1 and a prompt, got {batch_size} and {len(prompts)} prompts"
        )
    drawn = []
    with tqdm(total=len(prompts), desc="draw", unit="picture") as bar:
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first : first + batch_size]
            rngs = picture_generators(seed, range(first, first + len(batch)))
            images = pipe(batch, generator=rngs, use_resolution_binning=False, output_type="np", **call)[0]
            drawn.append(to_uint8(images))
            bar.update(len(batch))
    return np.concatenate(drawn)


def _object_accuracy(
    evaluator: SpriteEvaluator, pictures: np.ndarray, scenes: Sequence[Scene]
) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for verdict, scene in zip(evaluator.evaluate_many(pictures), scenes, strict=True):
        right.setdefault(scene.object, []).append(verdict.object == scene.object)
    return {name: float(np.mean(hits)) for name, hits in sorted(right.items())}


def reconstruction_psnr(
    vae: Any,
    scenes: Sequence[Scene],
    *,
    batch_size: int = 24,
    seed: int = 0,
    height: int = 128,
    width: int = 128,
) -> float:
    """Mean over drawn scenes of the decibels that are left after encoding and decoding them."""
    rng = np.random.default_rng(seed)
    pictures = np.stack([draw(scene, rng, height, width) for scene in scenes])
    values: list[float] = []
    for first in tqdm(range(0, len(pictures), batch_size), desc="reconstruct", unit="batch"):
        batch = pictures[first : first + batch_size]
        values += [psnr(*pair) for pair in zip(batch, reconstruct(vae, batch), strict=True)]
    return float(np.mean(values))
