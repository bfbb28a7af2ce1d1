"""``pixart-nb sample``: images of a configuration. Each file carries the configuration that repeats it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image
from tqdm.auto import tqdm

from pixart_nb.config import NEEDS, ConfigError, InferenceConfig, bundled_path, check_config
from pixart_nb.config.keys import CONTROL_KEYS, ROOTS, lora_name, split_weight
from pixart_nb.core import backend
from pixart_nb.core.backend import device_name, dtype_from_name, ms
from pixart_nb.core.checkpoints.components import LOADERS, T5EncoderModel, component_paths
from pixart_nb.core.checkpoints.load import load_transformer
from pixart_nb.core.errors import WriteError
from pixart_nb.core.io import ensure_writable, write_json
from pixart_nb.core.models.low_precision import inference_dtype_name
from pixart_nb.core.run_plan import QUANTIZED
from pixart_nb.core.sampling.images import (
    check_ratio,
    file_stem,
    read_parameters,
    save_elsewhere,
    to_uint8,
    write_new_image,
)
from pixart_nb.core.sampling.pipeline import PixArtAlphaPipeline, PixArtSigmaPipeline
from pixart_nb.core.sampling.pipeline_base import COMPONENTS
from pixart_nb.core.sampling.planning import (
    TILE,
    architecture_of,
    check_run,
    drawn_size,
    max_sequence_length,
    prompts_of,
    stated_config,
)
from pixart_nb.core.sampling.samplers import image_generators, steps_taken
from pixart_nb.core.sampling.text import per_prompt

_WITH_ROOT = ("vae", "text_encoder", "tokenizer")
#: Models that come with the package. An image may name them.
BUNDLED_MODELS = ("data/tiny-sigma", "data/tiny-sigma-1k")
_SHAPING = """prompt negative_prompt image_height image_width use_resolution_binning seed first_image nrows ncols
    imagegrid sampling_method sampling_steps guidance_scale pag_scale pag_adaptive_scale
    pag_applied_layers dtype t5_max_length t5_load tile_size strength sample_size
    control_edges controlnet_conditioning_scale control_guidance_start control_guidance_end guess_mode
    sd_scale_factor kv_compress kv_compress_sampling kv_compress_scale_factor kv_compress_layer"""
#: Keys that ``like`` takes from an image: what shapes it.
SHAPING_KEYS = tuple(_SHAPING.split())
#: Keys that name weights or images, by a path or a hub id.
WEIGHT_KEYS = ("model", "checkpoint", *ROOTS, "lora", "upscale_from", "image", "mask", "controlnet", "control_image")
#: Arguments of ``T5EncoderModel.from_pretrained`` for a text encoder that is not loaded whole.
_T5_OPTIONS = {"stream": {"stream": True}, "int8": {"load_in_8bit": True}, "4bit": {"load_in_4bit": True}}
#: Seconds between two updates of a progress bar: in a notebook each is a message.
BAR_SECONDS = 0.5


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw: its texts, the index of its prompt, its copy for it, and the number of its random stream."""

    prompt: str
    negative_prompt: str
    index: int
    copy: int
    stream: int


def requests_of(config: InferenceConfig, rank: int = 0, workers: int = 1) -> list[ImageRequest]:
    """Return the images that worker ``rank`` of ``workers`` draws: whole prompts, every ``workers``-th of them."""
    prompts, copies = prompts_of(config), config.nrows * config.ncols
    negatives = per_prompt(config.negative_prompt, len(prompts))
    return [
        ImageRequest(prompts[index], negatives[index], index, copy, config.first_image + index * copies + copy)
        for index in range(rank, len(prompts), workers)
        for copy in range(copies)
    ]


def sample(config: InferenceConfig) -> list[Path]:
    """Draw every prompt of a configuration, write the images and ``sample.json``, and return the images' paths.

    Under ``msrun`` with ``use_parallel`` each worker draws, writes and returns its share.
    """
    rank, workers = backend.join_workers() if config.use_parallel else (0, 1)
    requests = requests_of(config, rank, workers)
    ensure_writable(config.output_path, needed=3 * config.image_height * config.image_width)
    check_run(config)
    together = config.nrows * config.ncols if config.imagegrid else 1
    paths: list[Path] = []
    if config.stages_path:
        images = draw_in_stages(config, requests)
        for first in range(0, len(requests), together):
            rows = slice(first, first + together)
            paths.append(write_image_of(config, requests[first], [image.pixels() for image in images[rows]]))
    else:
        edited, done = edited_image(config) | control_options(config), []
        pipe = load_pipeline(config)
        steps = steps_taken(config.sampling_steps, edited.get("strength", 1))
        with tqdm(total=len(requests) * steps, desc="draw", unit="step") as bar:
            for first in range(0, len(requests), config.batch_size):
                batch = requests[first : first + config.batch_size]
                images = pipe(
                    [request.prompt for request in batch],
                    negative_prompt=[request.negative_prompt for request in batch],
                    num_inference_steps=config.sampling_steps,
                    guidance_scale=config.guidance_scale,
                    **pag_options(config),
                    **edited,
                    height=config.image_height,
                    width=config.image_width,
                    generator=image_generators(config.seed, [request.stream for request in batch]),
                    use_resolution_binning=config.use_resolution_binning,
                    output_type="np",
                    callback=lambda index, timestep, latents: bar.update(len(latents)),
                )[0]
                done.extend(to_uint8(images))
                while len(done) >= together:
                    paths.append(write_image_of(config, requests[len(paths) * together], done[:together]))
                    done = done[together:]
    if rank == 0:
        names = [path.name for path in paths]
        if workers > 1:
            names = list(dict.fromkeys(file_name(config, request) for request in requests_of(config)))
        computed = {"computed_dtype": inference_dtype_name(config.dtype)}
        summary = computed | {"files": names, "seconds_from_cold_start": seconds_of_this_process()}
        write_json(paths[0].with_name("sample.json"), config.model_dump() | summary)
    return paths


def like(image: str | Path, /, **changes: Any) -> InferenceConfig:
    """Return the configuration that repeats an image which ``sample`` wrote, with changes.

    The image may come from anybody: only ``SHAPING_KEYS`` are taken from it, never a path. Weights that are not those
    of a bundled model must be given among the changes. Raises ``ConfigError``.
    """
    stored, changes = read_parameters(image), {k: v for k, v in changes.items() if v is not None}
    values = {key: stored[key] for key in SHAPING_KEYS if key in stored}
    if stored.get("model") in BUNDLED_MODELS:
        values["model"] = stored["model"]
    values |= {key: changes.pop(key) for key in WEIGHT_KEYS if key in changes}
    weights = {key: stored[key] for key in WEIGHT_KEYS if stored.get(key) and key not in values}
    if weights:
        names = ", ".join(f"{key} {value!r}" for key, value in weights.items())
        raise ConfigError(
            f"{image} was drawn with {names}. Paths are not taken from an image; give "
            f"{' '.join(f'--{key}' for key in weights)}, or an empty value to do without"
        )
    for key, others in NEEDS.items():  # what an image is drawn without, its other keys do not matter
        if not any((values | changes).get(name) for name in others):
            values.pop(key, None)
    return check_config(values, source=str(image), options=changes)


# ---- the pipeline of a configuration


def load_pipeline(config: InferenceConfig, only: Sequence[str] = COMPONENTS) -> Any:
    """Load the pipeline of a configuration, or ``only`` these components of it.

    It is that of ``model``, with the components replaced that are given one by one.
    """
    dtype = dtype_from_name(config.dtype)
    cls = PixArtAlphaPipeline if max_sequence_length(config) == 120 else PixArtSigmaPipeline
    if config.image:
        from pixart_nb.core.sampling import editing

        cls = editing.PixArtSigmaInpaintPipeline if config.mask else editing.PixArtSigmaImg2ImgPipeline
    parts = dict.fromkeys(name for name in COMPONENTS if name not in only) | _parts(config, dtype, only)
    with_control = config.controlnet and "transformer" in only
    if with_control:
        from pixart_nb.core.checkpoints.controlnet import holds_base_model, load_controlnet
        from pixart_nb.core.sampling.controlnet import PixArtSigmaControlNetPipeline

        if holds_base_model(config.controlnet):
            parts["transformer"] = None
    if not config.model:
        parts["scheduler"] = config.sampling_method  # over the published noise schedule
    pipe = cls.from_pretrained(config.model, mindspore_dtype=dtype, **parts)
    if with_control:
        controlnet = load_controlnet(config.controlnet, None, dtype, pipe.transformer)
        pipe = PixArtSigmaControlNetPipeline.from_pipe(pipe, controlnet=controlnet)
    pipe.max_sequence_length = max_sequence_length(config)
    pipe.set_progress_bar_config(disable=True)
    if "scheduler" in only:
        _set_scheduler(pipe, config)
    if config.pag_scale and pipe.transformer:
        pipe.set_pag_applied_layers(config.pag_applied_layers)
    if config.lora and pipe.transformer:
        _apply_loras(pipe, config.lora)
    if config.sd_scale_factor and pipe.vae:
        pipe.vae.config = replace(pipe.vae.config, scaling_factor=config.sd_scale_factor)
    if config.tile_size and pipe.vae:
        pipe.vae.enable_tiling(config.tile_size)
    return pipe


def _set_scheduler(pipe: Any, config: InferenceConfig) -> None:
    """Use ``sampling_method`` if it is given, and say so where it replaces a scheduler of another class."""
    if not _chosen_method(config) and pipe.scheduler is not None:
        return
    own = type(pipe.scheduler).__name__
    pipe.scheduler = config.sampling_method
    if config.model and type(pipe.scheduler).__name__ != own:
        print(f"sampling_method {config.sampling_method} replaces {own} of {config.model}", file=sys.stderr)


def _opened(key: str, path: str, mode: str) -> Image.Image:
    """Read the image file of a key as a training does, or a mask (mode L), whose transparent parts are black."""
    from pixart_nb.core.data.images import ImageError, load_image  # needed only with an image

    try:
        return Image.fromarray(load_image(path, "black" if mode == "L" else "white")).convert(mode)
    except ImageError as error:
        raise ConfigError(f"{key} cannot be read as an image: {error}") from error


def edited_image(config: InferenceConfig) -> dict[str, Any]:
    """Return the arguments of image-to-image or inpainting, if there is an image."""
    if not config.image:
        return {}
    images = {"image": _opened("image", config.image, "RGB")}
    if config.mask:
        images["mask_image"] = _opened("mask", config.mask, "L")
    check_ratio(config.image, images["image"].size[::-1], config.image_height, config.image_width, 0.03)
    return images | {"strength": config.strength}


def control_options(config: InferenceConfig) -> dict[str, Any]:
    """Return the arguments of a ControlNet, if there is one."""
    if not config.controlnet:
        return {}
    image = _opened("control_image", config.control_image, "RGB")
    check_ratio(config.control_image, image.size[::-1], config.image_height, config.image_width, 0.03)
    if config.control_edges:
        from pixart_nb.core.checkpoints.controlnet import edge_options
        from pixart_nb.core.data.control import edges
        from pixart_nb.core.data.images import fit

        pixels = fit(np.asarray(image), config.image_height, config.image_width)
        image = edges(pixels, edge_options(config.controlnet))
    return {"image": image} | {name: getattr(config, name) for name in CONTROL_KEYS}


def pag_options(config: InferenceConfig) -> dict[str, float]:
    """Return the arguments of perturbed-attention guidance, if it is on."""
    names = ("pag_scale", "pag_adaptive_scale") if config.pag_scale else ()
    return {name: getattr(config, name) for name in names}


def _chosen_method(config: InferenceConfig) -> str:
    """Return ``sampling_method`` if it is given; empty leaves the model's own scheduler."""
    return config.sampling_method if "sampling_method" in config.model_fields_set else ""


def _apply_loras(pipe: Any, files: Sequence[str]) -> None:
    """Load LoRA files, given as PATH or PATH:WEIGHT, and activate all of them."""
    weights = {}
    for number, (path, weight) in enumerate(map(split_weight, files)):
        pipe.load_lora_weights(path, adapter_name=lora_name(number))
        weights[lora_name(number)] = weight
    pipe.set_adapters(list(weights), list(weights.values()))


def _parts(config: InferenceConfig, dtype: Any, only: Sequence[str]) -> dict[str, Any]:
    """Load the components, of those asked for, that are given one by one or need options of their own."""
    parts = {}
    if config.checkpoint and "transformer" in only:
        size = config.sample_size or None
        parts["transformer"] = load_transformer(config.checkpoint, stated_config(config), dtype, sample_size=size)
    roots = {name: getattr(config, f"{name}_root") for name in _WITH_ROOT if name in only}
    options = _T5_OPTIONS.get(config.t5_load)
    if options and "text_encoder" in roots:
        root = roots.pop("text_encoder")
        parts["text_encoder"] = T5EncoderModel.from_pretrained(
            root or config.model, "" if root else "text_encoder", mindspore_dtype=dtype, **options
        )
    return parts | {name: LOADERS[name](Path(root), dtype) for name, root in roots.items() if root}


# ---- resumable stages


def draw_in_stages(config: InferenceConfig, requests: Sequence[ImageRequest]) -> list[Any]:
    """Draw all images through all resumable stages; return a finished ``StagedImage`` for each."""
    sizes = drawn_size(config), (config.image_height, config.image_width)
    identity, images = network_identity(config), []
    for request in requests:
        name = f"{request.stream:03d}"
        source = Path(config.upscale_from) / name if config.upscale_from else None
        folder = Path(config.stages_path) / name
        images.append(staged_image(config, request, folder, sizes, identity, source, config.strength))
    lock = f".stages-{requests[0].index}.lock" if requests else ""  # each worker of msrun has its own
    show_progress(images, lambda names: load_pipeline(config, names), lock)
    return images


def staged_image(
    config: InferenceConfig,
    request: ImageRequest,
    folder: Path,
    sizes: tuple[tuple[int, int], tuple[int, int]],
    models: Mapping[str, str],
    upscale_from: Path | None,
    strength: float,
) -> Any:
    """Return the ``StagedImage`` of a request; ``sizes`` are those that the model works at and that of the result."""
    from pixart_nb.core.sampling.stages import StagedImage

    return StagedImage(
        folder,
        request.prompt,
        *sizes,
        negative_prompt=request.negative_prompt,
        steps=config.sampling_steps,
        guidance_scale=config.guidance_scale,
        seed=(config.seed, request.stream),
        max_sequence_length=max_sequence_length(config),
        tile=config.tile_size or TILE,
        models=models,
        options=pag_options(config),
        upscale_from=upscale_from,
        strength=strength,
    )


def show_progress(images: Sequence[Any], load: Callable[[Sequence[str]], Any], lock: str = "") -> None:
    """Draw ``StagedImage``s, with a progress bar for every stage of every image."""
    from pixart_nb.core.sampling.stages import LOCK, run_stages

    bar, shown = None, None
    for part in run_stages(images, load, lock or LOCK):
        if (part.stage, part.image) != shown:
            shown = (part.stage, part.image)
            if bar is not None:
                bar.close()
            name = f"{part.stage} {part.image + 1}"
            bar = tqdm(total=part.total, initial=part.done, desc=name, mininterval=BAR_SECONDS)
        bar.update(part.done - bar.n)
    if bar is not None:
        bar.close()


def network_identity(config: InferenceConfig) -> dict[str, Any]:
    """Return what else the numbers of an image depend on: fingerprints of the networks, and how they compute."""
    from pixart_nb.core.data.features import fingerprint
    from pixart_nb.core.lora.files import lora_path

    roots = {name: getattr(config, f"{name}_root") for name in _WITH_ROOT}
    paths = {name: Path(root) for name, root in (roots | {"transformer": config.checkpoint}).items() if root}
    if config.model:
        paths |= component_paths(config.model, [name for name in COMPONENTS if name not in paths])
    return {name: fingerprint(path) for name, path in paths.items()} | {
        "sampling_method": _chosen_method(config),
        **{f"lora {text}": fingerprint(lora_path(split_weight(text)[0])) for text in config.lora},
        **({"pag_applied_layers": ", ".join(config.pag_applied_layers)} if config.pag_scale else {}),
        **({"architecture": architecture_of(config)} if config.checkpoint else {}),
        "dtype": inference_dtype_name(config.dtype),
        "sd_scale_factor": str(config.sd_scale_factor),
        "t5_quantized": config.t5_load if config.t5_load in QUANTIZED else "",
        "device": device_name(),
        "mindspore": ms.__version__,
    }


# ---- files


def write_image_of(config: InferenceConfig, request: ImageRequest, images: Sequence[np.ndarray]) -> Path:
    """Write the image of a request, or the grid of all ``images`` (H, W, 3) uint8 of its prompt; return the path."""
    pixels = contact_sheet(np.stack(images), config.ncols) if config.imagegrid else images[0]
    path = Path(config.output_path) / file_name(config, request)
    values = parameters(config, request)
    try:
        return write_new_image(path, pixels, values, config.overwrite)
    except WriteError as error:  # the disk is full: the work is not lost
        return save_elsewhere(path.name, pixels, values, error)


def parameters(config: InferenceConfig, request: ImageRequest) -> dict[str, Any]:
    """Return the configuration that draws one image, or one grid, again."""
    values = config.model_dump() | {
        "prompt": [request.prompt],
        "negative_prompt": request.negative_prompt,
        "prompt_path": "",
        "first_image": request.stream,
        "use_parallel": False,
        "overwrite": False,
        "computed_dtype": inference_dtype_name(config.dtype),
    }
    if config.model and Path(config.model) in [bundled_path(model) for model in BUNDLED_MODELS]:
        values["model"] = next(model for model in BUNDLED_MODELS if bundled_path(model) == Path(config.model))
    if not config.imagegrid:
        values |= {"nrows": 1, "ncols": 1}
    if config.stages_path:
        # stages draw what the pipeline draws by tiles, so the image can be repeated without their folder
        values["tile_size"] = config.tile_size or TILE
    if not config.upscale_from:  # else it starts from the image of another folder
        values["stages_path"] = ""
    if not _chosen_method(config):
        del values["sampling_method"]
    return values


def file_name(config: InferenceConfig, request: ImageRequest) -> str:
    """Return ``003_a-red-cup.png``, with the number of the copy where a prompt has several files."""
    several = config.nrows * config.ncols > 1 and not config.imagegrid
    return f"{request.index:03d}_{file_stem(request.prompt)}{f'_{request.copy:02d}' if several else ''}.png"


def contact_sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Arrange images (N, H, W, 3) uint8 edge to edge in rows; cells that stay free are white."""
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, 3), 255, dtype=np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return sheet.reshape(rows * height, columns * width, 3)


def seconds_of_this_process() -> float:
    """Return the seconds since the operating system started this process: imports and loading included."""
    return round(time.time() - psutil.Process().create_time(), 2)
