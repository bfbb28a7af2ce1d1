"""Resumable stages: encode, free, denoise, free, decode in tiles; each continues where it was stopped.

A stage holds its own networks only. Its results are files: the embeddings, the model's prediction at every step, the
decoded rows of tiles. A run that was stopped, however, ends with the same image, bit for bit: the finished steps are
taken again with the stored predictions, which restores any sampler, with its history and its noise, without a pass
through the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_STEPS
from pixart_nb.core.backend import to_numpy
from pixart_nb.core.errors import differences
from pixart_nb.core.io import (
    CheckpointError,
    folder_lock,
    load_metadata,
    load_tensors,
    read_json,
    remove_temporaries,
    save_tensors,
    write_json,
)
from pixart_nb.core.memory import PeakMemory, release
from pixart_nb.core.sampling.images import resize_and_crop, resize_latents, to_images, to_uint8
from pixart_nb.core.sampling.pipeline import PixArtSigmaPipeline
from pixart_nb.core.sampling.samplers import Predict, Prediction, image_generators, steps_taken
from pixart_nb.core.sampling.text import embed, warn_of_lost_words

#: Seconds between two measurements of memory: small networks slow down with more of them.
LOOK_SECONDS = 0.02
RUN, MEASURED, LOCK = "run.json", "stages.json", ".stages.lock"
#: ``load(names)`` returns a pipeline of the components with these names; the others may be None.
Load = Callable[[Sequence[str]], PixArtSigmaPipeline]


# ---- files


class StageFiles:
    """Files of one run: ``run.json`` describes it, ``NAME.safetensors`` hold the results of its stages.

    ``identity`` is everything that the run's numbers depend on, as JSON. Every file carries its fingerprint.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]):
        self.folder = Path(folder)
        self.identity = json.loads(json.dumps(dict(identity)))
        self.fingerprint = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> StageFiles:
        """Return the files of an existing run. Raises ``CheckpointError`` if there is none."""
        path = Path(folder) / RUN
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no run in stages (no {RUN}); draw it there first")
        return cls(folder, read_json(path))

    def claim(self) -> None:
        """Start or continue the run in its folder. Raises ``CheckpointError`` with the differences to another run."""
        path = self.folder / RUN
        if not path.is_file():
            write_json(path, self.identity)
            return
        remove_temporaries(self.folder)
        stored = read_json(path)
        if other := differences(stored, self.identity):
            raise CheckpointError(
                f"{self.folder} belongs to another run ({other}). Give the values it was started with to resume it, or "
                "another folder to start a new one."
            )

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        return self.path(name).is_file()

    def names(self, pattern: str) -> list[str]:
        """Return the names of the parts that match a pattern (``rows-*``), in order."""
        return sorted(path.stem for path in self.folder.glob(f"{pattern}.safetensors"))

    def save(self, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        save_tensors(self.path(name), tensors, {"run": self.fingerprint})

    def load(self, name: str) -> dict[str, np.ndarray]:
        """Read a part. Raises ``CheckpointError`` for a part that is damaged or belongs to another run."""
        path = self.path(name)
        owner = load_metadata(path).get("run")
        if owner != self.fingerprint:
            raise CheckpointError(
                f"{path} belongs to another run ({owner or 'it does not say which'}, this one is {self.fingerprint}); "
                "remove the file to compute it again"
            )
        return load_tensors(path)

    def remove(self, pattern: str) -> None:
        for name in self.names(pattern):
            self.path(name).unlink()

    def measured(self) -> dict[str, dict[str, float]]:
        """Return for each stage ``seconds`` and ``load_seconds`` of all sessions, and the highest ``peak_bytes``."""
        path = self.folder / MEASURED
        return read_json(path) if path.is_file() else {}

    def add_measured(self, stage: str, peak_bytes: int, name: str, seconds: float) -> None:
        """Add a part of a stage to its ``seconds`` or ``load_seconds``."""
        measured = self.measured()
        row = measured.setdefault(stage, {"seconds": 0.0, "load_seconds": 0.0, "peak_bytes": 0})
        row[name] += seconds
        row["peak_bytes"] = max(row["peak_bytes"], peak_bytes)
        write_json(self.folder / MEASURED, measured)


# ---- images


@dataclass(frozen=True)
class StagedImage:
    """One image to draw in stages, in a folder of its own.

    ``drawn``: height and width that the model works at; ``size``: those of the result, which is resized and cropped.
    ``tile``: side in pixels of the decoder's tiles. ``seed``: the seed and the number of the image's random stream.
    ``models``: names and fingerprints of the networks. ``options``: further arguments of ``pipe.sample``.
    ``upscale_from``: folder of a smaller image's run, whose latents replace the initial noise: noise is added to them,
    and the last ``strength`` of the steps are taken.
    """

    folder: Path
    prompt: str
    drawn: tuple[int, int]
    size: tuple[int, int]
    negative_prompt: str = ""
    steps: int = SAMPLING_STEPS
    guidance_scale: float = GUIDANCE_SCALE
    seed: tuple[int, int] = (0, 0)
    max_sequence_length: int = 300
    tile: int = 512
    models: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    upscale_from: Path | None = None
    strength: float = 0.5

    @cached_property
    def files(self) -> StageFiles:
        """State of this image's run."""
        names = ("prompt", "negative_prompt", "drawn", "size", "steps", "guidance_scale", "seed", "tile")
        identity = {name: getattr(self, name) for name in (*names, "max_sequence_length")}
        if self.upscale_from is not None:
            smaller = StageFiles.of(self.upscale_from).fingerprint
            identity |= {"upscale_from": smaller, "strength": self.strength}
        return StageFiles(self.folder, identity | dict(self.models) | dict(self.options))

    def check_source(self) -> None:
        """Raise an error for a smaller image that is not finished, and for a strength outside 0..1."""
        steps_taken(self.steps, self.strength)
        if self.upscale_from is not None and not StageFiles.of(self.upscale_from).has("latents"):
            raise CheckpointError(f"the image in {self.upscale_from} is not finished; finish it before upscaling")

    def source_latents(self) -> np.ndarray | None:
        """Return the latents of the smaller image, resized: (1, C, height / 8, width / 8), or None without one."""
        if self.upscale_from is None:
            return None
        smaller = StageFiles.of(self.upscale_from).load("latents")["latents"]
        return resize_latents(smaller, *(side // 8 for side in self.drawn))

    def pixels(self) -> np.ndarray:
        """Return the finished image, (height, width, 3) uint8."""
        return self.files.load("pixels")["pixels"]


@dataclass(frozen=True)
class StageProgress:
    """Progress of a run: ``done`` of ``total`` parts of a stage of the image with this index."""

    image: int
    stage: str
    done: int
    total: int


def run_stages(images: Sequence[StagedImage], load: Load, lock: str = LOCK) -> Iterator[StageProgress]:
    """Draw images in stages, all of them through one stage, then the next; yields after every part.

    Parts that exist, from this process or an earlier one, are not computed again. ``image.pixels()`` is the result.
    Several images share the lock of the folder that holds theirs, so that their number is not limited by that of open
    files; processes that draw different images of it at once give different names of ``lock``.

    Raises ``CheckpointError`` for a folder or file of another run, ``FolderInUseError`` for a folder in use, and
    ``WriteError`` for a folder that cannot be written.
    """
    for image in images:
        image.check_source()
    with ExitStack() as locks:
        for folder in sorted({image.folder.parent if len(images) > 1 else image.folder for image in images}):
            locks.enter_context(folder_lock(folder, lock))
        for image in images:
            image.files.claim()
        for stage in STAGES:
            waiting = [n for n, image in enumerate(images) if not image.files.has(stage.result)]
            if waiting:
                yield from _run(stage, waiting, images, load)
                release()


# ---- stages


@dataclass(frozen=True)
class _Stage:
    """``work(pipe, image)`` yields (done, total), and has written ``result`` when it ends."""

    name: str
    components: tuple[str, ...]
    result: str
    work: Callable[[PixArtSigmaPipeline, StagedImage], Iterator[tuple[int, int]]]


def _run(stage: _Stage, numbers: list[int], images: Sequence[StagedImage], load: Load) -> Iterator[StageProgress]:
    since = time.perf_counter()
    with PeakMemory(LOOK_SECONDS) as memory:
        pipe, measure = load(stage.components), "load_seconds"
        for number in numbers:
            image = images[number]
            with folder_lock(image.folder, LOCK, wait=True) if len(images) > 1 else nullcontext():
                for done, total in stage.work(pipe, image):
                    image.files.add_measured(stage.name, memory.update(), measure, time.perf_counter() - since)
                    measure = "seconds"
                    yield StageProgress(number, stage.name, done, total)
                    since = time.perf_counter()  # the caller's time is not the stage's


def _encode(pipe: PixArtSigmaPipeline, image: StagedImage) -> Iterator[tuple[int, int]]:
    """Compute the embeddings of the prompt and, with guidance, of the negative prompt, without padding."""
    texts = {"prompt": image.prompt}
    if image.guidance_scale > 1:
        texts["negative"] = image.negative_prompt
    warn_of_lost_words(pipe.tokenizer, list(texts.values()), True)
    tensors = {}
    yield 0, len(texts)
    for done, (name, text) in enumerate(texts.items(), 1):
        embeds, mask = embed(pipe.tokenizer, pipe.text_encoder, [text], True, image.max_sequence_length, trim=True)
        tensors |= {f"{name}_embeds": to_numpy(embeds), f"{name}_mask": mask}
        if done == len(texts):
            image.files.save("embeddings", tensors)
        yield done, len(texts)


def _denoise(pipe: PixArtSigmaPipeline, image: StagedImage) -> Iterator[tuple[int, int]]:
    """Take the steps of ``pipe.sample``, storing every prediction of the model."""
    files = image.files
    texts, source = files.load("embeddings"), image.source_latents()
    computed: list[str] = []  # predictions of this session
    steps = pipe.sample(
        prompt_embeds=texts["prompt_embeds"],
        prompt_attention_mask=texts["prompt_mask"],
        negative_prompt_embeds=texts.get("negative_embeds"),
        negative_prompt_attention_mask=texts.get("negative_mask"),
        num_inference_steps=image.steps,
        guidance_scale=image.guidance_scale,
        height=image.drawn[0],
        width=image.drawn[1],
        generator=image_generators(image.seed[0], [image.seed[1]]),
        wrap_predict=lambda predict: _stored(predict, files, computed),
        image_latents=source,
        strength=image.strength,
        **image.options,
    )
    next(steps)
    kept = len(files.names("prediction-*"))
    schedule = pipe.plan(image.steps, *map(image.options.get, ("timesteps", "sigmas")))
    total = len(schedule if source is None else schedule.last(image.strength))
    yield min(kept, total), total
    for step in steps:
        if computed:
            yield step.index + 1, total
    files.save("latents", {"latents": step.latents.astype(np.float32)})
    files.remove("prediction-*")


def _stored(predict: Predict, files: StageFiles, computed: list[str]) -> Predict:
    """Return ``predict`` with its results stored; stored ones are read instead of computed, others named."""
    number = -1

    def stored(latents: np.ndarray, timestep: float) -> Prediction:
        nonlocal number
        number += 1
        name = f"prediction-{number:04d}"
        if files.has(name):
            tensors = files.load(name)
            return Prediction(tensors["noise"], tensors.get("variance"))
        prediction = predict(latents, timestep)
        files.save(name, {key: part for key, part in prediction._asdict().items() if part is not None})
        computed.append(name)
        return prediction

    return stored


def _decode(pipe: PixArtSigmaPipeline, image: StagedImage) -> Iterator[tuple[int, int]]:
    """Decode the image by rows of tiles, or whole if it is no larger than a tile."""
    files, vae = image.files, pipe.vae
    z = vae.config.from_model(files.load("latents")["latents"])
    if max(image.drawn) > image.tile:
        yield from _decode_rows(vae, z, image)
        parts = (files.load(name)["values"] for name in files.names("rows-*"))
    else:
        yield 0, 1
        parts = [to_numpy(vae.decode(z)[0])]
    files.save("pixels", {"pixels": _finished(parts, image)})
    for name in ("coarse", "rows-*"):
        files.remove(name)
    if max(image.drawn) <= image.tile:
        yield 1, 1


def _finished(parts: Iterable[np.ndarray], image: StagedImage) -> np.ndarray:
    """Convert decoded rows (1, 3, rows, W) to pixels (H, W, 3) uint8, part by part if nothing is resized."""
    if image.drawn != image.size:
        parts = [np.concatenate(list(parts), 2)]
    rows = []
    for part in parts:
        size = part.shape[2:] if image.drawn == image.size else image.size
        rows.append(to_uint8(resize_and_crop(to_images(part), *size))[0])
    return np.concatenate(rows)


def _decode_rows(vae: Any, z: np.ndarray, image: StagedImage) -> Iterator[tuple[int, int]]:
    """Run the coarse part of the decoder, then rows of tiles of the fine part; store all of them."""
    files = image.files
    vae.enable_tiling(image.tile)
    tiles = vae.decode_fine()
    names, count = files.names("rows-*"), tiles.count(z.shape[2])
    if not files.has("coarse"):
        yield 0, count + 1
        coarse = vae.decode_coarse(z)
        norms = {f"norm-{n}": values for n, values in enumerate(tiles.measure(coarse)) if values is not None}
        files.save("coarse", {"coarse": coarse} | norms)
        del coarse
    yield 1 + len(names), count + 1
    stored = files.load("coarse")
    statistics = [stored.get(f"norm-{n}") for n in range(len(tiles.norms))]
    carry = files.load(names[-1])["carry"] if names else None
    for row in tiles.rows(stored["coarse"], statistics, len(names) - 1, carry):
        files.save(f"rows-{row.number:04d}", {"values": row.values, "carry": row.carry})
        yield row.number + 2, count + 1


STAGES = (
    _Stage("encode", ("tokenizer", "text_encoder"), "embeddings", _encode),
    _Stage("denoise", ("transformer", "scheduler"), "latents", _denoise),
    _Stage("decode", ("vae",), "pixels", _decode),
)
