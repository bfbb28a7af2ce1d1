"""Evaluation of a pipeline on scenes that it was never trained on: draws them and reads them back."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table as RichTable
from tqdm.auto import tqdm

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_STEPS
from pixart_nb.config.keys import ModelKeys
from pixart_nb.core.data.labels import read_prompts
from pixart_nb.core.errors import PixArtNBError, WriteError
from pixart_nb.core.io import ensure_writable, folder_lock, write_json
from pixart_nb.core.sampling.generate import contact_sheet
from pixart_nb.core.sampling.images import save_elsewhere, to_uint8, write_image
from pixart_nb.core.sampling.pipeline_base import hidden_progress_bar
from pixart_nb.core.sampling.samplers import image_generators
from pixart_nb.core.sampling.stages import StageFiles
from pixart_nb.core.sampling.text import card_header
from pixart_nb.core.training.validation import psnr, reconstruct
from pixart_nb.pixelart.captions import named_scenes, scene_of, short_caption
from pixart_nb.pixelart.evaluator import SMALLEST, SceneEvaluator, accuracy_of
from pixart_nb.pixelart.objects import OBJECTS
from pixart_nb.pixelart.scenes import Scene, draw
from pixart_nb.pixelart.split import held_out_scenes, training_scene
from pixart_nb.pixelart.textures import texture_ratios

_SHEET_COLUMNS = 12


def draws_scenes(config: ModelKeys) -> bool:
    """Return whether a configuration names a model of drawn scenes, and a size at which the evaluator can read them.

    The card of such a model has a vocabulary. Another ``checkpoint`` in its place may draw anything. Warns of a size
    that is too small.
    """
    card = Path(config.model, "README.md")
    if not config.model or config.checkpoint or not card_header(card).vocabulary:
        return False
    sides = [getattr(config, key, SMALLEST) for key in ("image_height", "image_width")]
    if min(sides) < SMALLEST:
        warnings.warn(
            f"image_height and image_width are {sides[0]} and {sides[1]}: scenes are read from {SMALLEST} pixels on, "
            "so no image is compared with its prompt",
            stacklevel=2,
        )
    return min(sides) >= SMALLEST


def agreement(images: np.ndarray, prompts: Sequence[str], read: bool = True) -> dict[str, float]:
    """Return the shares of images whose object, colour, setting, and everything, are those of their prompts.

    ``images`` is (N, H, W, 3) float in [0, 1] or uint8. Only the canonical captions of scenes can be evaluated
    (``a red mushroom on grass``); other prompts are left out, and without any the result is empty. It is empty too
    for images of less than ``SMALLEST`` pixels, and with ``read=False``, for a model that does not draw scenes.
    """
    if len(images) != len(prompts):
        raise PixArtNBError(f"need as many prompts as images, got {len(prompts)} for {len(images)}")
    scenes = {k: scene for k, prompt in enumerate(prompts) if read and (scene := scene_of(prompt))}
    if not scenes or min(images.shape[1:3]) < SMALLEST:
        return {}
    pixels = images if images.dtype == np.uint8 else to_uint8(images)
    chosen = list(scenes.values())
    return evaluator_of(chosen).accuracy(pixels[list(scenes)], chosen)


def evaluator_of(scenes: Sequence[Scene]) -> SceneEvaluator:
    """Return an evaluator that knows the objects of the bundled model and those of ``scenes``."""
    named = {thing.object for scene in scenes for thing in scene.things}
    return SceneEvaluator((*OBJECTS, *sorted(named - set(OBJECTS))))


def requested_scenes(count: int, things: int = 1, labels: str | os.PathLike[str] | None = None) -> list[Scene]:
    """Return ``count`` held-out scenes of one or two things, or those of the first captions of a label file."""
    if labels and things != 1:
        raise PixArtNBError(f"things is {things}, which is of held-out scenes; the captions of {labels} name their own")
    return named_scenes(read_prompts(labels)[:count]) if labels else held_out_scenes(count, things)


def evaluate_and_write(
    pipe: Any,
    scenes: Sequence[Scene],
    output: str | os.PathLike[str],
    vae: bool = False,
    settings: Mapping[str, Any] | None = None,
    identity: Mapping[str, Any] | None = None,
    **sampling: Any,
) -> tuple[dict[str, Any], Path]:
    """Evaluate a pipeline; write ``images.png`` and ``evaluation.json`` into the folder ``output``.

    Returns the report and its path. If there are earlier ones, both names count up: ``evaluation-2.json``. What cannot
    be written there goes into the system's temporary folder. Until then ``output`` keeps every image, so that the same
    call, with any batch size and more or fewer scenes, continues an interrupted one.

    Args:
        vae: measure the reconstruction of the drawn scenes by the VAE too.
        settings: further entries of the report, such as the name of the model.
        identity: what the images depend on beside ``sampling``, such as the weights; see ``network_identity``.
        sampling: options of ``evaluate_model``.
    """
    folder = ensure_writable(output)
    files = StageFiles(folder, (identity or {}) | {k: v for k, v in sampling.items() if k != "batch_size"})
    files.folder /= f"unfinished-{files.fingerprint}"
    with _unfinished(files):
        report = evaluate_model(pipe, scenes, files=files, **sampling)
        images = report.pop("images")
        if vae:
            kept = {key: sampling[key] for key in ("batch_size", "seed", "height", "width") if key in sampling}
            report["reconstruction_psnr"] = reconstruction_psnr(pipe.vae, scenes, **kept)
        report = {**(settings or {}), **sampling, **report}
        sheet = contact_sheet(images, _SHEET_COLUMNS)
        try:
            path = _write_new(folder, sheet, report)
        except WriteError as error:  # the disk is full: the work is not lost, and the image holds the report
            path = save_elsewhere("images.png", sheet, report, error)
        files.remove("*")
    return report, path


@contextmanager
def _unfinished(files: StageFiles) -> Iterator[None]:
    """Hold the folder of an evaluation, which is removed at the end if it has no images any more."""
    with folder_lock(files.folder):
        files.claim()
        try:
            yield
        finally:
            if not files.names("*"):
                shutil.rmtree(files.folder, ignore_errors=True)


def _write_new(folder: Path, sheet: np.ndarray, report: Mapping[str, Any]) -> Path:
    with folder_lock(folder, ".evaluation.lock", wait=True):
        suffixes = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        names = ((folder / f"images{suffix}.png", folder / f"evaluation{suffix}.json") for suffix in suffixes)
        image, path = next(pair for pair in names if not any(map(Path.exists, pair)))
        write_image(image, sheet, report)
        write_json(path, report)
    return path


def score_table(report: Mapping[str, Any]) -> RichTable:
    """Return the accuracies of a report of ``evaluate_and_write`` as a table for the terminal."""
    table = RichTable("part", "accuracy")
    for part, share in report["accuracy"].items():
        table.add_row(part, f"{share:.1%}")
    return table


def score_summary(report: Mapping[str, Any]) -> str:
    """Return a line about the number of images and the time, and one about the VAE if it was measured."""
    several = "s" * (report["count"] > 1)
    source = f"caption{several} of {report['labels']}" if report.get("labels") else f"held-out scene{several}"
    summary = f"{report['count']} {source}, {report['seconds_per_image']:.2f} s per image"
    ratios = ", ".join(f"{level} px {ratio:.2f}" for level, ratio in report["texture_ratios"].items())
    summary += f"\nDistance of textures from drawings of other scenes, 1 is that of drawings of these: {ratios}"
    if "reconstruction_psnr" in report:
        summary += f"\nVAE reconstruction: {report['reconstruction_psnr']:.2f} dB"
    return summary


def evaluate_model(
    pipe: Any,
    scenes: Sequence[Scene],
    *,
    sampling_steps: int = SAMPLING_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    batch_size: int = 24,
    seed: int = 0,
    height: int = 256,
    width: int = 256,
    negative_prompt: str = "",
    read: bool = True,
    files: StageFiles | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Draw scenes from their short captions and read them back.

    Args:
        pipe: a ``PixArtSigmaPipeline``, or any function with its call.
        scenes: ``held_out_scenes`` gives those that training never shows. Unseen objects among them are candidates
            too when the images are read.
        sampling_steps, guidance_scale: ``num_inference_steps`` and ``guidance_scale`` of the pipeline.
        batch_size: images drawn at once. Each has a random stream of its own, so they do not depend on it.
        height, width: pixels.
        negative_prompt: one for all images.
        read: False leaves the shares and ratios empty, for a model that does not draw scenes.
        files: keep the images, and continue an interrupted run of these settings.
        options: further arguments of the pipeline, such as ``pag_scale``.

    Returns:
        ``count``; ``accuracy``, shares of right ``object``, ``colour``, ``setting`` and ``all`` (see
        ``SceneEvaluator.accuracy``); ``object_accuracy``, the share of images that show each object among those that
        should; ``texture_ratios`` to ``reference_drawings``; ``seconds_per_image``; ``images`` (N, H, W, 3) uint8.
    """
    if read and min(height, width) < SMALLEST:
        raise PixArtNBError(
            f"height and width are {height} and {width}; scenes are read from {SMALLEST} pixels on: choose another size"
        )
    size = {"height": height, "width": width}
    call = {"num_inference_steps": sampling_steps, "guidance_scale": guidance_scale, **size}
    call |= options | ({"negative_prompt": negative_prompt} if negative_prompt else {})
    drawn = _draw(pipe, [short_caption(scene) for scene in scenes], batch_size, seed, files, **call)
    images, seconds = np.stack([image for image, _ in drawn]), float(np.mean([seconds for _, seconds in drawn]))
    result = {"count": len(scenes), "accuracy": {}, "object_accuracy": {}, "texture_ratios": {}}
    if read:
        read_scenes = evaluator_of(scenes).scenes(images, scenes)
        result["accuracy"] = accuracy_of(read_scenes, scenes)
        result["object_accuracy"] = _object_accuracy(read_scenes, scenes)
        result["texture_ratios"] = texture_ratios(images, *reference_drawings(scenes, seed, height, width))
    return {**result, "seconds_per_image": seconds, "images": images}


def evaluate_latents(
    pipe: Any, latents: np.ndarray, scenes: Sequence[Scene]
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Decode latents (N, C, h, w) of the first N ``scenes`` one by one, and read them back.

    Returns the shares of right ``object``, ``colour``, ``setting`` and ``all``, and the images (H, W, 3) uint8.
    """
    images = [to_uint8(pipe.decode_latents(row[None]))[0] for row in latents]
    return evaluator_of(scenes).accuracy(images, list(scenes[: len(images)])), images


def draw_prompts(pipe: Any, prompts: Sequence[str], batch_size: int = 24, seed: int = 0, **call: Any) -> np.ndarray:
    """Draw prompts in batches: (N, H, W, 3) uint8. Each image has a random stream of its own.

    ``call``: arguments of the pipeline, such as ``num_inference_steps`` and ``height``.
    """
    return np.stack([image for image, _ in _draw(pipe, prompts, batch_size, seed, None, **call)])


def _draw(
    pipe: Any, prompts: Sequence[str], batch_size: int, seed: int, files: StageFiles | None, **call: Any
) -> list[tuple[np.ndarray, float]]:
    """Return (image, seconds) of each prompt. What ``files`` has is not drawn again, and it keeps what is drawn."""
    if batch_size < 1 or not prompts:
        raise PixArtNBError(
            f"need a batch size of at least 1 and a prompt, got {batch_size} and {len(prompts)} prompts"
        )
    call = {"use_resolution_binning": False, "output_type": "np"} | call
    names = [f"image-{k:05d}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}" for k, prompt in enumerate(prompts)]
    drawn = {k: files.load(name) for k, name in enumerate(names) if files and files.has(name)}
    missing = [k for k in range(len(prompts)) if k not in drawn]
    with hidden_progress_bar(pipe), tqdm(total=len(prompts), initial=len(drawn), desc="draw", unit="image") as bar:
        for first in range(0, len(missing), batch_size):
            batch, started = missing[first : first + batch_size], time.perf_counter()
            try:
                images = pipe([prompts[k] for k in batch], generator=image_generators(seed, batch), **call)[0]
            except KeyboardInterrupt:
                message = f"{len(drawn)} of {len(prompts)} images are kept; the same command continues from there"
                raise KeyboardInterrupt(*([message] if files else [])) from None
            seconds = np.float64((time.perf_counter() - started) / len(batch))
            for k, image in zip(batch, to_uint8(images), strict=True):
                drawn[k] = {"image": image, "seconds": seconds}
                files = _kept(files, names[k], drawn[k])
            bar.update(len(batch))
    return [(drawn[k]["image"], float(drawn[k]["seconds"])) for k in range(len(prompts))]


def _kept(files: StageFiles | None, name: str, image: Mapping[str, np.ndarray]) -> StageFiles | None:
    """Save an image; returns the files for the next one, or None if they cannot be written."""
    try:
        if files:
            files.save(name, image)
    except WriteError as error:
        warnings.warn(f"images are no longer kept: an interrupted evaluation starts again. {error}", stacklevel=2)
        return None
    return files


def _object_accuracy(read: Sequence[Scene], scenes: Sequence[Scene]) -> dict[str, float]:
    """Return by object the share of the scenes with it in which it was read."""
    right: dict[str, list[bool]] = {}
    for result, scene in zip(read, scenes, strict=True):
        shown = {thing.object for thing in result.things}
        for thing in scene.things:
            right.setdefault(thing.object, []).append(thing.object in shown)
    return {name: float(np.mean(hits)) for name, hits in sorted(right.items())}


def drawn_images(scenes: Sequence[Scene], seed: int, height: int, width: int) -> np.ndarray:
    """Draw scenes: (N, height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    return np.stack([draw(scene, rng, height, width) for scene in scenes])


def reference_drawings(scenes: Sequence[Scene], seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw training scenes of as many things as each of ``scenes``, and ``scenes`` themselves.

    The last two arguments of ``texture_ratios``: generated images and drawings of the same scenes are both compared
    with drawings of others, as Karras et al. compare with training images.
    """
    rng = np.random.default_rng((seed, 21))
    # a share of pairs of 0 draws one thing, of 1 two
    others = [training_scene(rng, pair_share=len(scene.things) - 1) for scene in scenes]
    return drawn_images(others, seed + 1, height, width), drawn_images(scenes, seed, height, width)


def reconstruction_psnr(
    vae: Any, scenes: Sequence[Scene], *, batch_size: int = 24, seed: int = 0, height: int = 256, width: int = 256
) -> float:
    """Return the mean PSNR in dB of drawn scenes after encoding and decoding them."""
    images = drawn_images(scenes, seed, height, width)
    values: list[float] = []
    for first in tqdm(range(0, len(images), batch_size), desc="reconstruct", unit="batch"):
        batch = images[first : first + batch_size]
        values += [psnr(*pair) for pair in zip(batch, reconstruct(vae, batch), strict=True)]
    return float(np.mean(values))
