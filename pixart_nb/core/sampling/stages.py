"""Large pictures in stages: encode, free, denoise, free, decode by tiles; every stage goes on where it was stopped.

A stage holds its own networks only. What it has done lies on the disk: the embeddings, the model's prediction at every
step, the decoded rows of tiles. A run that was stopped, however, ends with the same picture, bit for bit: the steps
that are done are taken again with the predictions that were kept, which brings any solver, with its memory of earlier
steps and its noise, to where it was, and costs no pass through the model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_STEPS
from pixart_nb.core.backend import ms
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.memory import PeakMemory, release
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.aspect_ratio import resize_and_crop
from pixart_nb.core.sampling.conditioning import embed
from pixart_nb.core.sampling.images import enlarged, to_pictures, to_uint8
from pixart_nb.core.sampling.pipeline import PixArtSigmaPipeline
from pixart_nb.core.sampling.randomness import picture_generators
from pixart_nb.core.sampling.stage_files import StageFiles
from pixart_nb.core.sampling.step import Predict, Prediction, steps_taken

#: Seconds between two looks at the memory: more often, and small networks take longer than without them.
LOOK_SECONDS = 0.02
#: ``load(names)`` gives a pipeline of the components with these names; the others may be None.
Load = Callable[[Sequence[str]], PixArtSigmaPipeline]


@dataclass(frozen=True)
class StagedPicture:
    """One picture to draw in stages, in a folder of its own.

    ``drawn``: height and width that the model works at; ``size``: those of the picture, which is scaled and cut to
    them. ``tile``: side in pixels of the tiles that it is decoded by. ``seed``: the seed and the number of the
    picture's random stream. ``models``: what tells the networks, and how they compute, from others (names and
    fingerprints). ``options``: further arguments of ``pipe.sample``.

    ``enlarge``: the folder of a smaller picture's run, whose latents, enlarged, this one begins with in place of noise:
    noise is added to them, and the last ``strength`` of the steps are taken.
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
    enlarge: Path | None = None
    strength: float = 0.5

    @cached_property
    def files(self) -> StageFiles:
        """The state of this picture's run."""
        names = ("prompt", "negative_prompt", "drawn", "size", "steps", "guidance_scale", "seed", "tile")
        own = {name: getattr(self, name) for name in (*names, "max_sequence_length")}
        if self.enlarge is not None:
            own |= {"enlarge": StageFiles.of(self.enlarge).fingerprint, "strength": self.strength}
        return StageFiles(self.folder, own | dict(self.models) | dict(self.options))

    def check_beginning(self) -> None:
        """Refuse to enlarge what is not drawn yet, and a strength that is none."""
        steps_taken(self.steps, self.strength)
        if self.enlarge is not None and not StageFiles.of(self.enlarge).has("latents"):
            raise CheckpointError(f"the picture in {self.enlarge} is not drawn; finish it, then enlarge it")

    def beginning(self) -> np.ndarray | None:
        """The latents of the smaller picture, enlarged: (1, C, height / 8, width / 8); None: begin with noise alone."""
        if self.enlarge is None:
            return None
        smaller = StageFiles.of(self.enlarge).load("latents")["latents"]
        return enlarged(smaller, *(side // 8 for side in self.drawn))

    def pixels(self) -> np.ndarray:
        """The finished picture, (height, width, 3) uint8."""
        return self.files.load("pixels")["pixels"]


@dataclass(frozen=True)
class Progress:
    """How far a run is: ``done`` of ``total`` parts of a stage of the picture with this number.

    ``seconds_left`` of that stage, from the parts done in this session; None before the first.
    """

    picture: int
    stage: str
    done: int
    total: int
    seconds_left: float | None


def run_staged(pictures: Sequence[StagedPicture], load: Load) -> Iterator[Progress]:
    """Draw pictures in stages, all of them through one stage, then the next; yields after every part.

    What is done already, by this process or an earlier one, is not done again. ``picture.pixels()`` is the result.

    Raises:
        CheckpointError: a folder or file is of another run, or in use; the message says what differs.
        DataError: a folder cannot be written.
    """
    with ExitStack() as folders:
        for picture in pictures:
            picture.check_beginning()
            folders.enter_context(picture.files.opened())
        for stage in STAGES:
            waiting = [n for n, picture in enumerate(pictures) if not picture.files.has(stage.result)]
            if waiting:
                yield from _run(stage, waiting, pictures, load)
                release()


@dataclass(frozen=True)
class _Stage:
    """``work(pipe, picture)`` yields (done, total), and has written ``result`` when it ends."""

    name: str
    components: tuple[str, ...]
    result: str
    work: Callable[[PixArtSigmaPipeline, StagedPicture], Iterator[tuple[int, int]]]


def _run(
    stage: _Stage, numbers: list[int], pictures: Sequence[StagedPicture], load: Load
) -> Iterator[Progress]:
    noted = time.perf_counter()
    with PeakMemory(LOOK_SECONDS) as memory:
        pipe, took = load(stage.components), "load_seconds"
        for number in numbers:
            first = None  # parts done, and the time, when work on this picture began
            for done, total in stage.work(pipe, pictures[number]):
                now = time.perf_counter()
                pictures[number].files.add_measured(stage.name, memory.look(), **{took: now - noted})
                first, took = first or (done, now), "seconds"
                fresh = done - first[0]
                left = (now - first[1]) / fresh * (total - done) if fresh else None
                yield Progress(number, stage.name, done, total, left)
                noted = time.perf_counter()  # what is done with the progress is not the stage's work


def _encode(pipe: PixArtSigmaPipeline, picture: StagedPicture) -> Iterator[tuple[int, int]]:
    """Embeddings of the prompt and, with guidance, of the negative one, as long as the texts are."""
    texts = {"prompt": picture.prompt}
    if picture.guidance_scale > 1:
        texts["negative"] = picture.negative_prompt
    tensors = {}
    yield 0, len(texts)
    for done, (name, text) in enumerate(texts.items(), 1):
        embeds, mask = embed(
            pipe.tokenizer, pipe.text_encoder, [text], True, picture.max_sequence_length, trim=True
        )
        tensors |= {f"{name}_embeds": embeds.astype(ms.float32).asnumpy(), f"{name}_mask": mask}
        if done == len(texts):
            picture.files.save("embeddings", tensors)
        yield done, len(texts)


def _denoise(pipe: PixArtSigmaPipeline, picture: StagedPicture) -> Iterator[tuple[int, int]]:
    """The steps of ``pipe.sample``, with every prediction of the model kept."""
    files = picture.files
    texts, start = files.load("embeddings"), picture.beginning()
    steps = pipe.sample(
        prompt_embeds=ms.Tensor(texts["prompt_embeds"]),
        prompt_attention_mask=texts["prompt_mask"],
        negative_prompt_embeds=_tensor(texts.get("negative_embeds")),
        negative_prompt_attention_mask=texts.get("negative_mask"),
        num_inference_steps=picture.steps,
        guidance_scale=picture.guidance_scale,
        height=picture.drawn[0],
        width=picture.drawn[1],
        generator=picture_generators(picture.seed[0], [picture.seed[1]]),
        around_model=lambda predict: _kept(predict, files),
        start=start,
        strength=picture.strength,
        **picture.options,
    )
    next(steps)
    kept = len(list(files.folder.glob("prediction-*.safetensors")))
    plan = pipe.plan(picture.steps, *map(picture.options.get, ("timesteps", "sigmas")))
    total = len(plan if start is None else plan.last(picture.strength))
    yield min(kept, total), total
    for step in steps:
        if step.index >= kept:
            yield step.index + 1, total
    files.save("latents", {"latents": step.latents.astype(np.float32)})
    files.remove("prediction-*")


def _kept(predict: Predict, files: StageFiles) -> Predict:
    """``predict``, each of whose answers is kept; those that are kept already are not computed again."""
    number = -1

    def remembered(latents: np.ndarray, timestep: float) -> Prediction:
        nonlocal number
        number += 1
        name = f"prediction-{number:04d}"
        if files.has(name):
            known = files.load(name)
            return Prediction(known["noise"], known.get("variance"))
        found = predict(latents, timestep)
        files.save(name, {key: part for key, part in found._asdict().items() if part is not None})
        return found

    return remembered


def _tensor(array: np.ndarray | None) -> ms.Tensor | None:
    return None if array is None else ms.Tensor(array)


def _decode(pipe: PixArtSigmaPipeline, picture: StagedPicture) -> Iterator[tuple[int, int]]:
    """The picture by rows of tiles; what is no larger than a tile is decoded whole."""
    files, vae = picture.files, pipe.vae
    z = files.load("latents")["latents"] / np.float32(vae.config.scaling_factor)
    if max(picture.drawn) > picture.tile:
        yield from _decode_rows(vae, z, picture)
        parts = (files.load(name)["values"] for name in _rows_kept(files))
    else:
        yield 0, 1
        parts = [vae.decode(z)[0].astype(ms.float32).asnumpy()]
    files.save("pixels", {"pixels": _finished(parts, picture)})
    for name in ("coarse", "rows-*"):
        files.remove(name)
    if max(picture.drawn) <= picture.tile:
        yield 1, 1


def _finished(parts: Iterable[np.ndarray], picture: StagedPicture) -> np.ndarray:
    """Decoded rows (1, 3, rows, W) as pixels (H, W, 3) uint8; part by part where nothing is to be scaled."""
    if picture.drawn != picture.size:
        parts = [np.concatenate(list(parts), 2)]
    return np.concatenate(
        [to_uint8(resize_and_crop(to_pictures(part), *_size(part, picture)))[0] for part in parts]
    )


def _size(part: np.ndarray, picture: StagedPicture) -> tuple[int, int]:
    """The size that a part of a picture gets: its own, unless the picture is scaled as a whole."""
    return part.shape[2:] if picture.drawn == picture.size else picture.size


def _rows_kept(files: StageFiles) -> list[str]:
    return sorted(path.stem for path in files.folder.glob("rows-*.safetensors"))


def _decode_rows(vae: AutoencoderKL, z: np.ndarray, picture: StagedPicture) -> Iterator[tuple[int, int]]:
    """The coarse part of the decoder, then rows of tiles of the fine part; all of them are kept."""
    files = picture.files
    vae.enable_tiling(picture.tile)
    tiles = vae.decode_fine()
    names, count = _rows_kept(files), tiles.count(z.shape[2])
    if not files.has("coarse"):
        yield 0, count + 1
        coarse = vae.decode_coarse(z)
        measured = enumerate(tiles.measure(coarse))
        files.save(
            "coarse", {"coarse": coarse} | {f"norm-{n}": found for n, found in measured if found is not None}
        )
        del coarse
    yield 1 + len(names), count + 1
    known = files.load("coarse")
    statistics = [known.get(f"norm-{n}") for n in range(len(tiles.norms))]
    carry = files.load(names[-1])["carry"] if names else None
    for row in tiles.rows(known["coarse"], statistics, len(names) - 1, carry):
        files.save(f"rows-{row.number:04d}", {"values": row.values, "carry": row.carry})
        yield row.number + 2, count + 1


STAGES = (
    _Stage("encode", ("tokenizer", "text_encoder"), "embeddings", _encode),
    _Stage("denoise", ("transformer", "scheduler"), "latents", _denoise),
    _Stage("decode", ("vae",), "pixels", _decode),
)
