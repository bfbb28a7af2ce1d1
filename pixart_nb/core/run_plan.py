"""Plan of a run by stage: memory, MACs and estimated time, before anything is loaded."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pixart_nb.config import SAMPLING_STEPS
from pixart_nb.core import backend, cost
from pixart_nb.core.backend import ms
from pixart_nb.core.cost import parameters
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.fast import decodes_by_rows, denoiser
from pixart_nb.core.fast.cpu_operators import score_bytes
from pixart_nb.core.memory import in_use
from pixart_nb.core.models.ascend_operators import flash_supports, padded_size
from pixart_nb.core.models.attention import chunk_shape
from pixart_nb.core.models.low_precision import inference_dtype_name
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.tiling import sample_windows, tile_starts
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae import COARSE_CHANNELS, COARSE_TILE
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.sampling.samplers import steps_taken

STAGES = ("encode", "denoise", "decode")
#: Bytes of a value.
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
#: Bytes of a quantized weight of T5.
QUANTIZED = {"int8": 1.0, "4bit": 0.5625}
#: Values alive at the worst moment, measured on the real networks: per channel of a token of the transformer, of a
#: pixel in the fine part of the decoder, and of a latent cell in its coarse part; bytes per attention score.
TOKEN, PIXEL, CELL, SCORE = 9.5, 6.5, 8.0, 2.0
#: The same per channel of a token where ``fast.cpu`` computes, by the dtype of its products.
CPU_TOKEN = {"fp32": 7.0, "fp16": 5.3, "bf16": 5.3}
#: Values that a ControlNet adds per channel of a token, and those per channel of a pixel in the encoder's fine part.
CONTROL_TOKEN, ENCODED_PIXEL = 2.0, 8.0
#: Bytes of Python and MindSpore while a network computes, and before anything is computed.
PROCESS, IDLE = 0.22e9, 0.165e9
#: Changes that make a run smaller, as fields of ``RunSettings`` and as options of ``pixart-nb sample``, mildest first.
SMALLER: tuple[tuple[dict[str, Any], str], ...] = (
    ({"batch": 1}, "--batch_size 1"),
    ({"tile": 512}, "--tile_size 512"),
    ({"t5_load": "stream"}, "--t5_load stream"),
    ({"sequential": True}, "--stages_path FOLDER"),
    ({"dtype": "fp16"}, "--dtype fp16"),
)
#: Ratio of the drawn to the trained side beyond which a checkpoint is expected to fail.
FAR = 1.5
#: Side in pixels of the largest image whose denoising step and decoded tile are timed for an estimate.
TIMED_SIDE = 256


class DoesNotFitError(PixArtNBError):
    """A run needs more memory than is available; the message names options that would make it fit."""


@dataclass(frozen=True)
class Networks:
    """Configurations of the three networks of a pipeline. ``copy_blocks_num`` of the transformer adds a ControlNet."""

    transformer: PixArtConfig
    text_encoder: T5Config
    vae: VAEConfig

    def parameters(self) -> dict[str, int]:
        """Return the number of parameters of each network."""
        counts = {name: parameters(config) for name, config in vars(self).items()}
        if self.transformer.copy_blocks_num:
            base = parameters(replace(self.transformer, copy_blocks_num=0))
            counts |= {"transformer": base, "controlnet": counts["transformer"] - base}
        return counts


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run that decide its memory and time.

    Attributes:
        height, width: Size in pixels that the model draws at.
        batch: Images that are drawn at once.
        guided: Classifier-free guidance is on.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        t5_load: ``whole``, ``stream`` (one layer at a time), ``int8`` or ``4bit``.
        tile: Side of the tiles to decode by, in pixels; 0 decodes the whole image.
        sequential: One network is in memory at a time (resumable stages).
        caption_tokens, negative_tokens: Tokens of the prompt and of the negative prompt (1 if it is empty).
        perturbed: Blocks whose self-attention is perturbed in a second pass (perturbed-attention guidance).
        controlled_steps: Steps in which the ControlNet acts, if there is one; None for all.
        guess_mode: It acts on rows with a prompt alone, in a pass of their own.
        images: Images that the VAE encodes first: the condition of the ControlNet, or the image to begin with.
    """

    height: int
    width: int
    batch: int = 1
    steps: int = SAMPLING_STEPS
    guided: bool = True
    dtype: str = "fp32"
    t5_load: str = "whole"
    tile: int = 0
    sequential: bool = False
    caption_tokens: int = 30
    negative_tokens: int = 1
    perturbed: tuple[int, ...] = ()
    controlled_steps: int | None = None
    guess_mode: bool = False
    images: int = 0

    @property
    def rows(self) -> int:
        """Rows of the transformer's batch: two per image with guidance."""
        return self.batch * (2 if self.guided else 1)

    @property
    def row_captions(self) -> list[int]:
        """Caption tokens of each row."""
        return [self.negative_tokens] * (self.rows - self.batch) + [self.caption_tokens] * self.batch

    @property
    def passes(self) -> list[tuple[list[int], tuple[int, ...], bool]]:
        """Passes of the transformer in a step.

        Caption tokens of each row, blocks with perturbed attention, and whether a ControlNet acts, if there is one.
        """
        prompts = [self.caption_tokens] * self.batch
        if self.guess_mode and self.guided:
            return [([self.negative_tokens] * self.batch, (), False), (prompts, (), True)]
        return [(self.row_captions, (), True), *([(prompts, self.perturbed, True)] if self.perturbed else [])]

    @property
    def texts(self) -> list[int]:
        """Tokens of each text that is encoded: a prompt per image and one negative prompt."""
        return [self.caption_tokens] * self.batch + [self.negative_tokens] * self.guided

    def grid(self, config: PixArtConfig) -> tuple[int, int]:
        """Tokens of one image, (height, width)."""
        unit = 8 * config.patch_size
        return self.height // unit, self.width // unit

    def tokens(self, config: PixArtConfig) -> int:
        """Tokens of one image."""
        return int(np.prod(self.grid(config)))


@dataclass(frozen=True)
class StagePlan:
    """Memory in bytes, MACs and estimated seconds (None if nothing was measured) of one stage."""

    name: str
    weights: float
    activations: float
    macs: int
    seconds: float | None = None


@dataclass(frozen=True)
class RunPlan:
    """Plan of a run. ``process``: bytes of Python and MindSpore; ``step_macs``: MACs of one step by part."""

    networks: Networks
    run: RunSettings
    stages: tuple[StagePlan, ...]
    process: float
    step_macs: dict[str, int]

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        if self.run.sequential:
            return max(self.held())
        return self.process + sum(s.weights for s in self.stages) + max(s.activations for s in self.stages)

    def held(self, kept: float = 0.0) -> list[float]:
        """Return the bytes held in each stage of one process that frees a network after its stage.

        MindSpore keeps the activation memory of earlier stages; ``kept`` is that of earlier runs.
        """
        most = itertools.accumulate((stage.activations for stage in self.stages), max, initial=kept)
        return [self.process + s.weights + kept for s, kept in zip(self.stages, list(most)[1:], strict=True)]

    @property
    def seconds_per_step(self) -> float | None:
        """Estimated seconds of one denoising step."""
        seconds = self.stages[STAGES.index("denoise")].seconds
        return None if seconds is None else seconds / self.run.steps

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "run": vars(self.run),
            "parameters": self.networks.parameters(),
            "stages": [vars(stage) for stage in self.stages],
            "peak_bytes": self.peak,
            "macs_per_step": self.step_macs,
            "seconds_per_step": self.seconds_per_step,
        }


@dataclass(frozen=True)
class Speed:
    """Measured speed: seconds per MAC of a denoising step, and per pixel of a decoded tile."""

    dtype: str
    seconds_per_mac: float
    seconds_per_pixel: float


def plan_run(networks: Networks, run: RunSettings, speed: Speed | None = None, process: float = PROCESS) -> RunPlan:
    """Plan a run. With ``speed``, measured in the same dtype, denoise and decode have estimated seconds."""
    if speed is not None and speed.dtype != run.dtype:
        raise PixArtNBError(f"speed was measured in {speed.dtype}, the run is in {run.dtype}; measure it again")
    weights, activations = weight_bytes(networks, run), activation_bytes(networks, run)
    per_step = _step_macs(networks.transformer, run)
    steps = run.steps * sum(per_step.values())
    if networks.transformer.copy_blocks_num and run.controlled_steps is not None:
        without = sum(_step_macs(networks.transformer, run, control=False).values())
        steps -= (run.steps - run.controlled_steps) * (sum(per_step.values()) - without)
    images = run.images * cost.encode_image_macs(networks.vae, run.height, run.width)
    macs = {
        "encode": sum(cost.encode_macs(networks.text_encoder, count) for count in run.texts) + images,
        "denoise": steps + _caption_macs(networks.transformer, run),
        "decode": run.batch * sum(cost.decode_macs(networks.vae, run.height, run.width).values()),
    }
    seconds = {}
    if speed is not None:
        seconds["denoise"] = steps * speed.seconds_per_mac
        seconds["decode"] = run.batch * _decoded_pixels(run) * speed.seconds_per_pixel
    stages = (StagePlan(name, weights[name], activations[name], macs[name], seconds.get(name)) for name in STAGES)
    return RunPlan(networks, run, tuple(stages), process, per_step)


def _step_macs(config: PixArtConfig, run: RunSettings, control: bool = True) -> dict[str, int]:
    """Return the MACs of all passes of one step, by part."""
    total = Counter()
    for captions, identity, controlled in run.passes:
        total.update(cost.step_macs(config, run.height, run.width, captions, identity, control and controlled))
    return dict(total)


def _caption_macs(config: PixArtConfig, run: RunSettings) -> int:
    """Return the MACs of preparing the captions for every pass, and the condition of a ControlNet."""
    second = [run.caption_tokens] * run.batch if run.perturbed else []
    captions = sum(cost.caption_macs(config, count) for count in run.texts + second)
    condition = cost.condition_macs(config, run.height, run.width) if config.copy_blocks_num else 0
    return captions + run.batch * condition


@dataclass(frozen=True)
class UpscaledConfig(PixArtConfig):
    """A transformer whose layers compress by ``further`` besides their own ratio (``upscaling.compress_keys``)."""

    further: int = 1

    def layer_ratio(self, layer: int) -> int:
        """Compression ratio of one layer."""
        return self.further * super().layer_ratio(layer)

    def layer_operator(self, layer: int) -> str:
        """Compression operator of one layer."""
        return self.kv_operator if super().layer_ratio(layer) > 1 else "mean"


def plan_upscaling(
    networks: Networks, run: RunSettings, sizes: Sequence[Any], speed: Speed | None = None, process: float = PROCESS
) -> list[RunPlan]:
    """Plan every size of a progressive upscaling (``core.sampling.upscaling``), drawn in stages.

    Args:
        sizes: Objects with ``height``, ``width``, ``strength`` and ``ratio`` (compression of all layers, besides the
            model's own).
    """
    config, run = networks.transformer, replace(run, batch=1, sequential=True)
    plans = []
    for size in sizes:
        compressed = UpscaledConfig(**config.to_dict(), further=size.ratio) if size.ratio > 1 else config
        steps = steps_taken(run.steps, size.strength)
        settings = replace(run, height=size.height, width=size.width, steps=steps)
        plans.append(plan_run(replace(networks, transformer=compressed), settings, speed, process))
    return plans


# ---- memory


def process_memory() -> float:
    """Return the bytes of this process without networks: a notebook holds more than Python and MindSpore alone.

    On Ascend they are in the memory of the host, which is not planned.
    """
    return 0.0 if backend.on_ascend() else PROCESS + max(in_use() - IDLE, 0.0)


def weight_bytes(networks: Networks, run: RunSettings) -> dict[str, float]:
    """Return the bytes of the weights of each stage."""
    size, config = BYTES[run.dtype], networks.transformer
    copies = 0  # weights that the path of the device keeps a second time, for each pass
    if backend.on_ascend():
        copies = sum(
            _padded_elements(config, len(identity)) for _, identity, _ in run.passes if _uses_flash(config, run)
        )
    return {
        "encode": _text_encoder_bytes(networks.text_encoder, run),
        "denoise": size * (parameters(config) + copies),
        "decode": (size if backend.on_ascend() and not networks.vae.force_upcast else 4) * parameters(networks.vae),
    }


def _uses_flash(config: PixArtConfig, run: RunSettings) -> bool:
    dtype = backend.dtype_from_name(run.dtype)
    return backend.on_ascend() and flash_supports(config.hidden_size // config.num_heads, dtype)


def _padded_elements(config: PixArtConfig, identity: int) -> int:
    """Return the elements of the copies of attention weights with padded heads, for flash attention.

    ``identity`` blocks have neither queries nor keys of their self-attention.
    """
    head_size = config.hidden_size // config.num_heads
    padded, count = padded_size(head_size), 6 * (config.depth + config.copy_blocks_num) - 2 * identity
    return 0 if padded == head_size else count * config.hidden_size * config.num_heads * padded


def _text_encoder_bytes(config: T5Config, run: RunSettings) -> float:
    size, whole = BYTES[run.dtype], parameters(config)
    layers = whole - parameters(replace(config, num_layers=0))
    if run.t5_load == "stream":  # one layer, and half of the one that is being read
        return size * 1.5 * layers / config.num_layers
    if run.t5_load in QUANTIZED:
        return size * (whole - layers) + QUANTIZED[run.t5_load] * layers
    return size * whole


def activation_bytes(networks: Networks, run: RunSettings) -> dict[str, float]:
    """Return the bytes of the activations of each stage at its worst moment."""
    config, text, tokens = networks.transformer, networks.text_encoder, run.tokens(networks.transformer)
    # the largest weight of T5 is upcast for its product, but for bfloat16 on a CPU
    in_half = run.dtype != "fp32" and backend.on_ascend()
    upcast = text.d_model * text.d_ff if in_half or run.t5_load in QUANTIZED else 0
    values = run.batch * run.caption_tokens * (4 * text.d_model + 6 * text.d_ff)
    keys = max(tokens // config.layer_ratio(layer) ** 2 for layer in range(config.depth))
    if backend.on_ascend():
        heads, queries = chunk_shape(run.rows * config.num_heads, tokens, max(1, keys))
        scores = 0.0 if _uses_flash(config, run) else SCORE * 4 * heads * queries * keys
        token = BYTES[run.dtype] * TOKEN
    else:
        scores, token = score_bytes(tokens, keys), 4.0 * CPU_TOKEN[run.dtype]
    if config.copy_blocks_num:
        token += (BYTES[run.dtype] if backend.on_ascend() else 4.0) * CONTROL_TOKEN
    channels = networks.vae.block_out_channels
    fine = PIXEL * max(channels[:2])
    if not run.tile and decodes_by_rows(networks.vae, run.height, run.width):  # one image at a time
        fine = (2.0 * channels[0] + max(channels[:2])) / run.batch
    return {
        "encode": max(4.0 * (values + upcast), _vae_bytes(networks.vae, run, run.images, ENCODED_PIXEL * channels[0])),
        "denoise": token * max(len(rows) for rows, *_ in run.passes) * tokens * config.hidden_size + scores,
        "decode": _vae_bytes(networks.vae, run, run.batch, fine),
    }


def _vae_bytes(config: VAEConfig, run: RunSettings, images: int, fine: float) -> float:
    """Return the bytes of the worse part of the autoencoder, whole or by tiles, whose statistics need several at once.

    ``fine`` is the number of values of a pixel in its fine part.
    """
    if not images:
        return 0.0
    factor = 2 ** (len(config.block_out_channels) - 1)
    half = backend.on_ascend() and not config.force_upcast  # the CPU convolves half precision in fp32
    size = BYTES[run.dtype] if half else 4
    height, width, tile = run.height // factor, run.width // factor, run.tile // factor
    cells = (1 if run.tile else images) * height * width
    pixels = cells * factor**2
    coarse_output = 4.0 * cells * config.block_out_channels[-1]
    image = 4.0 * images * run.height * run.width * config.out_channels
    if run.tile and max(height, width) > tile:
        pixels = _cells_at_once(height, width, tile, factor)
        if max(height, width) > COARSE_TILE:
            cells = _cells_at_once(height, width, COARSE_TILE, 1, COARSE_CHANNELS)
    coarse = size * CELL * cells * config.block_out_channels[-1]
    return max(coarse, size * fine * pixels + image) + coarse_output


def _cells_at_once(height: int, width: int, tile: int, fine: int, channels: int = 1) -> int:
    """Return the cells of the finer side that are computed together: a tile, or the windows of shared statistics."""
    side, count = sample_windows(tile, fine, channels)
    windows = len(tile_starts(height, side, side // 4)) * len(tile_starts(width, side, side // 4))
    sampled = min(side, height) * min(side, width) * min(windows, count)
    return fine**2 * max(sampled, min(tile, height) * min(tile, width))


# ---- time


def measure_speed(networks: Networks, run: RunSettings) -> Speed:
    """Time one guided denoising step and one decoded tile of at most ``TIMED_SIDE`` pixels, with zero weights."""
    config = replace(networks.transformer, kv_compress_config=None, copy_blocks_num=0)
    unit = 8 * config.patch_size
    side = max(unit, TIMED_SIDE // unit * unit)
    height, width = min(run.height, side), min(run.width, side)
    rows = replace(run, batch=1).rows
    net, vae = (_zero_network(network, run.dtype) for network in (config, networks.vae))
    factor = 2 ** (len(networks.vae.block_out_channels) - 1)
    latents = ms.Tensor(np.zeros((rows, config.in_channels, height // factor, width // factor), np.float32))
    caption = ms.Tensor(np.zeros((rows, run.caption_tokens, config.caption_channels), np.float32))
    denoise = denoiser(net, caption, None)
    step = cost.best_seconds(lambda: denoise(latents, 500.0), 1)
    macs = sum(cost.step_macs(config, height, width, [run.caption_tokens] * rows).values())
    tile = cost.best_seconds(lambda: vae.decode(latents[:1])[0], 1)
    return Speed(run.dtype, step / macs, tile / (height * width))


def _zero_network(config: PixArtConfig | VAEConfig, dtype: str) -> Any:
    net = cost.empty_network(config, backend.dtype_from_name(dtype))
    for parameter in net.get_parameters():
        parameter.init_data()
    return net.set_train(False)


def _decoded_pixels(run: RunSettings) -> int:
    """Return the pixels of all tiles of an image; tiles overlap by a quarter."""
    if not run.tile:
        return run.height * run.width
    rows, columns = (len(tile_starts(side, run.tile, run.tile // 4)) for side in (run.height, run.width))
    return rows * columns * min(run.tile, run.height) * min(run.tile, run.width)


# ---- fitting


def check_fits(plan: RunPlan, limit: float, keys: Container[str] | None = None) -> None:
    """Refuse a run that needs more than ``limit`` bytes.

    ``keys``: configuration keys that the user can set, and the message may name; None for all.

    Raises:
        DoesNotFitError: names the fewest options that make the run fit, or the least memory that it can take.
    """
    if plan.peak <= limit:
        return
    largest = max(plan.stages, key=lambda stage: stage.weights + stage.activations)
    message = (
        f"this run needs {plan.peak / 1e9:.1f} GB of memory, most of it for the stage {largest.name!r}, and "
        f"{limit / 1e9:.1f} GB are available"
    )
    runs = list(smaller_runs(plan, keys))
    for options, smaller in runs:
        if smaller.peak <= limit:
            raise DoesNotFitError(f"{message}. With {' '.join(options)} it needs {smaller.peak / 1e9:.1f} GB.")
    options, least = min(runs, key=lambda pair: pair[1].peak)
    raise DoesNotFitError(
        f"{message}. The least that it can take is {least.peak / 1e9:.1f} GB"
        f"{', with ' + ' '.join(options) if options else ''}: choose a smaller size, or a machine with more memory."
    )


def smaller_runs(plan: RunPlan, keys: Container[str] | None = None) -> Iterator[tuple[tuple[str, ...], RunPlan]]:
    """Yield (options, plan) for every set of options that make the run smaller, fewest options first.

    ``keys``: configuration keys that may change; None for all.
    """
    run = plan.run
    options = [option for option in SMALLER if keys is None or option[1].split()[0].removeprefix("--") in keys]
    options = [option for option in options if "sequential" not in option[0] or not run.images]  # which have no stages
    for count in range(len(options) + 1):
        for choice in itertools.combinations(options, count):
            changes = {name: value for change, _ in choice for name, value in change.items()}
            if "dtype" in changes:
                changes["dtype"] = inference_dtype_name(changes["dtype"])
            if all(getattr(run, name) != value for name, value in changes.items()):
                smaller = plan_run(plan.networks, replace(run, **changes), process=plan.process)
                yield tuple(option for _, option in choice), smaller


def size_warnings(config: PixArtConfig, run: RunSettings, trained_sizes: Sequence[int] = ()) -> list[str]:
    """Return sentences about a checkpoint that is used far from its training size or with an unusual position scale.

    ``trained_sizes``: sides in pixels of all images of its training, if they are known; else its ``input_size`` says.
    """
    drawn = (run.height * run.width) ** 0.5
    own = 8 * config.input_size
    trained = min(trained_sizes or [own], key=lambda side: abs(math.log(drawn / side)))
    sentences = []
    if not 1 / FAR <= drawn / trained <= FAR:
        unit = math.lcm(2, config.patch_size)  # a training needs an even number of latent cells, in whole patches
        side = unit * -(-round(drawn / 8) // unit)
        scale = config.pe_interpolation * side / config.input_size
        sentences.append(
            f"The checkpoint was trained at {trained}x{trained} and is used at {run.height}x{run.width}: "
            "expect repeated, broken or blurred shapes. Use its own size, or "
            f"finetune it at this one (sample_size {side}, pe_interpolation {scale:.3g})."
        )
    usual = config.input_size / 64
    published = config.hidden_size == PixArtConfig().hidden_size and config.input_size in (64, 128, 256, 512)
    if published and config.pe_interpolation != usual:
        sentences.append(
            f"pe_interpolation is {config.pe_interpolation:g} for latents of {config.input_size}; the published models "
            f"have size / 512, which is {usual:g}. A wrong value spoils every image."
        )
    return sentences


def overview(
    networks: Networks,
    run: RunSettings,
    sizes: Sequence[int],
    ratios: Sequence[int],
    speeds: Mapping[str, Speed | None],
    layers: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Return table rows for square sizes in pixels, compression ratios and dtypes (the keys of ``speeds``).

    Args:
        layers: Compressed layers; by default those of the configuration, or the deep half.

    Rows have estimated seconds only if the speed of a dtype was measured.
    """
    config = networks.transformer
    layers = layers or config.kv_layers or range(config.depth // 2, config.depth)
    rows, timed = [], any(speed is not None for speed in speeds.values())
    for size, ratio, dtype in itertools.product(sizes, ratios, speeds):
        settings = replace(run, height=size, width=size, dtype=dtype)
        cost.key_count(settings.grid(config), ratio)
        compressed = cost.with_compression(config, layers, ratio, config.kv_operator or "conv")
        plan = plan_run(replace(networks, transformer=compressed), settings, speeds[dtype])
        memory = {f"{stage.name} GB": (stage.weights + stage.activations) / 1e9 for stage in plan.stages}
        rows.append(
            {"size": size, "ratio": ratio, "dtype": dtype, "tokens": settings.tokens(config)}
            | {"tera MACs per step": sum(plan.step_macs.values()) / 1e12}
            | memory
            | {"peak GB": plan.peak / 1e9}
            | ({"estimated seconds per step": plan.seconds_per_step} if timed else {})
        )
    return rows
