"""``pixart-nb sample``: a configuration becomes pictures, each of which carries the configuration that repeats it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pixart_nb.config import ConfigError, InferenceConfig, changed_config, check_config
from pixart_nb.core.io import write_json
from pixart_nb.core.sampling.image_files import read_parameters, write_picture
from pixart_nb.core.sampling.randomness import picture_generators

COMPONENTS = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")
_WITH_ROOT = ("vae", "text_encoder", "tokenizer")
#: Pixels a side of the tiles that runs in stages decode by, unless told.
TILE = 512
#: How T5 is loaded where not whole: arguments of ``T5EncoderModel.from_pretrained``.
_LITTLE_T5 = {"stream": {"stream": True}, "int8": {"load_in_8bit": True}}


@dataclass(frozen=True)
class Picture:
    """One picture to draw: the number of its prompt, its number for that prompt, and that of its random stream."""

    prompt: int
    copy: int
    stream: int


def prompts_of(config: InferenceConfig) -> list[str]:
    """The prompts of a configuration, or the lines of its ``prompt_path`` that are not blank."""
    if not config.prompt_path:
        return list(config.prompt)
    try:
        lines = Path(config.prompt_path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt_path {config.prompt_path}: cannot be read as text ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"prompt_path {config.prompt_path} holds no prompt; expected one on each line")
    return prompts


def negative_prompts_of(config: InferenceConfig, count: int) -> list[str]:
    """Return the negative prompt of each of ``count`` prompts."""
    negatives = config.negative_prompt
    if isinstance(negatives, str):
        return [negatives] * count
    if len(negatives) != count:
        raise ConfigError(
            f"{len(negatives)} negative prompts for {count} prompts; expected one, or one for each"
        )
    return negatives


def pictures_of(config: InferenceConfig, prompts: int, rank: int = 0, workers: int = 1) -> list[Picture]:
    """What worker ``rank`` of ``workers`` draws: whole prompts, every ``workers``-th of them."""
    copies = config.nrows * config.ncols
    return [
        Picture(prompt, copy, config.first_image + prompt * copies + copy)
        for prompt in range(rank, prompts, workers)
        for copy in range(copies)
    ]


def sample(config: InferenceConfig) -> list[Path]:
    """Draw every prompt of a configuration and write the pictures and ``sample.json``; the paths of the pictures.

    Under ``msrun`` with ``use_parallel`` each worker draws and writes its share; the answer is this worker's.
    """
    from pixart_nb.core.backend import join_workers
    from pixart_nb.core.planning.report import check_memory

    rank, workers = join_workers() if config.use_parallel else (0, 1)
    prompts = prompts_of(config)
    wanted = pictures_of(config, len(prompts), rank, workers)
    check_memory(config)
    if config.stages_path:
        from pixart_nb.core.sampling.generate_stages import draw_staged

        drawn = draw_staged(config, prompts, wanted)
    else:
        drawn = draw(load_pipeline(config), config, prompts, wanted)
    paths = []
    for pictures, images in drawn:
        paths += write_pictures(config, prompts, pictures, images)
    if rank == 0:
        everything = pictures_of(config, len(prompts))
        names = list(dict.fromkeys(file_name(config, prompts, picture) for picture in everything))
        told = {"files": names, "seconds_from_cold_start": seconds_of_this_process()}
        write_json(Path(config.output_path) / "sample.json", config.model_dump() | told)
    return paths


def like(picture: str | Path, **changes: Any) -> InferenceConfig:
    """The configuration that repeats a picture which ``sample`` wrote, with changes."""
    return changed_config(check_config(read_parameters(picture), source=str(picture)), **changes)


def load_pipeline(config: InferenceConfig, only: Sequence[str] = COMPONENTS) -> Any:
    """The pipeline of a configuration, or ``only`` these components of it.

    It comes from ``model``, with those parts replaced that are given one by one.
    """
    from pixart_nb import PixArtAlphaPipeline, PixArtSigmaPipeline
    from pixart_nb.core.backend import dtype_from_name

    dtype = dtype_from_name(config.dtype)
    kind = PixArtAlphaPipeline if config.t5_max_length == 120 else PixArtSigmaPipeline
    parts = dict.fromkeys(name for name in COMPONENTS if name not in only) | _parts(config, dtype, only)
    if not config.model:
        parts["scheduler"] = config.sampling_method  # over the published noise schedule
    pipe = kind.from_pretrained(config.model, mindspore_dtype=dtype, **parts)
    if "scheduler" in only:
        pipe.scheduler = config.sampling_method
    if config.sd_scale_factor and pipe.vae:
        pipe.vae.config = replace(pipe.vae.config, scaling_factor=config.sd_scale_factor)
    if config.tile_size and pipe.vae:
        pipe.vae.enable_tiling(config.tile_size)
    return pipe


def _parts(config: InferenceConfig, dtype: Any, only: Sequence[str]) -> dict[str, Any]:
    """The components, of those asked for, that are given one by one, or loaded in a way of their own."""
    from pixart_nb.core.checkpoints.components import LOADERS
    from pixart_nb.core.checkpoints.load import load_transformer
    from pixart_nb.core.checkpoints.text_encoder import T5EncoderModel
    from pixart_nb.core.models.transformer import PixArtConfig

    parts = {}
    if config.checkpoint and "transformer" in only:
        architecture = PixArtConfig(**architecture_of(config))
        parts["transformer"] = load_transformer(config.checkpoint, architecture, dtype)
    roots = {name: getattr(config, f"{name}_root") for name in _WITH_ROOT if name in only}
    little = _LITTLE_T5.get(config.t5_load)
    if little and "text_encoder" in roots:
        root = roots.pop("text_encoder")
        parts["text_encoder"] = T5EncoderModel.from_pretrained(
            root or config.model, "" if root else "text_encoder", mindspore_dtype=dtype, **little
        )
    return parts | {name: LOADERS[name](Path(root), dtype) for name, root in roots.items() if root}


def architecture_of(config: InferenceConfig) -> dict[str, Any]:
    """What the configuration says of the transformer; the checkpoint itself shows the rest."""
    from pixart_nb.core.checkpoints.configuration import FAMILIES, positions_of

    said: dict[str, Any] = {"model_max_length": config.t5_max_length}
    if config.sample_size:
        said |= positions_of(config.sample_size, FAMILIES.get(config.t5_max_length, ""))
    if config.kv_compress:
        said["kv_compress_config"] = {
            "sampling": config.kv_compress_sampling,
            "scale_factor": config.kv_compress_scale_factor,
            "kv_compress_layer": config.kv_compress_layer,
        }
    return said


def draw(pipe: Any, config: InferenceConfig, prompts: Sequence[str], wanted: Sequence[Picture]):
    """Yield (pictures, images (N, H, W, 3) uint8) of whole prompts, drawn ``batch_size`` at a time."""
    from tqdm import tqdm

    from pixart_nb.core.sampling.images import to_uint8

    copies, size = config.nrows * config.ncols, config.batch_size
    negatives = negative_prompts_of(config, len(prompts))
    done: list[tuple[Picture, np.ndarray]] = []
    with tqdm(total=len(wanted) * config.sampling_steps, desc="draw", unit="step") as bar:
        for first in range(0, len(wanted), size):
            batch = wanted[first : first + size]
            count = len(batch)
            images = pipe(
                [prompts[picture.prompt] for picture in batch],
                negative_prompt=[negatives[picture.prompt] for picture in batch],
                num_inference_steps=config.sampling_steps,
                guidance_scale=config.guidance_scale,
                height=config.image_height,
                width=config.image_width,
                generator=picture_generators(config.seed, [picture.stream for picture in batch]),
                use_resolution_binning=config.use_resolution_binning,
                output_type="np",
                callback=lambda *_, count=count: bar.update(count),
            )[0]
            done += zip(batch, to_uint8(images), strict=True)
            whole = len(done) // copies * copies
            if whole:
                yield [picture for picture, _ in done[:whole]], np.stack([image for _, image in done[:whole]])
                done = done[whole:]


def write_pictures(
    config: InferenceConfig, prompts: Sequence[str], pictures: Sequence[Picture], images: np.ndarray
) -> list[Path]:
    """Write the pictures of whole prompts one by one, or with ``imagegrid`` as one grid for each prompt."""
    copies = config.nrows * config.ncols if config.imagegrid else 1
    paths = []
    for start in range(0, len(pictures), copies):
        picture = pictures[start]
        pixels = (
            contact_sheet(images[start : start + copies], config.ncols) if config.imagegrid else images[start]
        )
        path = Path(config.output_path) / file_name(config, prompts, picture)
        write_picture(path, pixels, parameters(config, prompts[picture.prompt], picture))
        paths.append(path)
    return paths


def parameters(config: InferenceConfig, prompt: str, picture: Picture) -> dict[str, Any]:
    """The configuration that draws one picture, or one grid, again."""
    alone = {"prompt": [prompt], "prompt_path": "", "first_image": picture.stream, "use_parallel": False}
    grid = {} if config.imagegrid else {"nrows": 1, "ncols": 1}
    # stages draw what the pipeline draws by tiles, so the picture can be repeated without their folder, unless it
    # begins with another one's
    tiles = {"tile_size": config.tile_size or TILE} if config.stages_path else {}
    tiles |= {} if config.upscale_from else {"stages_path": ""}
    return config.model_dump() | alone | grid | tiles


def file_name(config: InferenceConfig, prompts: Sequence[str], picture: Picture) -> str:
    """``003_a-red-cup.png``, with the number of the copy where a prompt has several files."""
    words = re.sub(r"[^a-z0-9]+", "-", prompts[picture.prompt].lower()).strip("-")[:60]
    several = config.nrows * config.ncols > 1 and not config.imagegrid
    return f"{picture.prompt:03d}_{words}{f'_{picture.copy:02d}' if several else ''}.png"


def contact_sheet(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 edge to edge in rows, in order; the places that stay free are white."""
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, 3), 255, dtype=np.uint8)
    sheet[:count] = pictures
    sheet = sheet.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return sheet.reshape(rows * height, columns * width, 3)


def seconds_of_this_process() -> float:
    """Seconds since the operating system started this process: imports and loading included."""
    return round(time.time() - psutil.Process().create_time(), 2)
