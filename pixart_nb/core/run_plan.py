"""Plan of a run by stage: memory, MACs and estimated time, before anything is loaded."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.cost import (
    caption_macs,
    decode_macs,
    empty_network,
    encode_macs,
    key_count,
    parameters,
    step_macs,
    with_compression,
)
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.tiling import tile_starts
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.run_memory import (
    DEFAULT_MEMORY,
    ActivationMemory,
    Networks,
    RunSettings,
    activation_bytes,
    weight_bytes,
)
from pixart_nb.core.sampling.samplers import steps_taken

STAGES = ("encode", "denoise", "decode")
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
        sizes = []
        for stage in self.stages:
            kept = max(kept, stage.activations)
            sizes.append(self.process + stage.weights + kept)
        return sizes

    @property
    def seconds_per_step(self) -> float | None:
        """Estimated seconds of one denoising step."""
        seconds = self.stages[STAGES.index("denoise")].seconds
        return None if seconds is None else seconds / self.run.steps

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "run": vars(self.run),
            "parameters": {name: parameters(config) for name, config in vars(self.networks).items()},
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


def plan_run(
    networks: Networks, run: RunSettings, speed: Speed | None = None, memory: ActivationMemory = DEFAULT_MEMORY
) -> RunPlan:
    """Plan a run. With ``speed``, measured in the same dtype, denoise and decode have estimated seconds."""
    if speed is not None and speed.dtype != run.dtype:
        raise PixArtNBError(f"speed was measured in {speed.dtype}, the run is in {run.dtype}; measure it again")
    per_step = step_macs(networks.transformer, run.height, run.width, run.row_captions)
    weights, activations = weight_bytes(networks, run), activation_bytes(networks, run, memory)
    captions = sum(caption_macs(networks.transformer, count) for count in run.texts)
    macs = {
        "encode": sum(encode_macs(networks.text_encoder, count) for count in run.texts),
        "denoise": run.steps * sum(per_step.values()) + captions,
        "decode": run.batch * sum(decode_macs(networks.vae, run.height, run.width).values()),
    }
    seconds: dict[str, float | None] = dict.fromkeys(STAGES)
    if speed is not None:
        seconds["denoise"] = run.steps * sum(per_step.values()) * speed.seconds_per_mac
        seconds["decode"] = run.batch * _decoded_pixels(run) * speed.seconds_per_pixel
    stages = (StagePlan(name, weights[name], activations[name], macs[name], seconds[name]) for name in STAGES)
    return RunPlan(networks, run, tuple(stages), memory.process, per_step)


def plan_upscaling(
    networks: Networks,
    run: RunSettings,
    sizes: Sequence[Any],
    speed: Speed | None = None,
    memory: ActivationMemory = DEFAULT_MEMORY,
) -> list[RunPlan]:
    """Plan every size of a progressive upscaling (``core.sampling.upscaling``), drawn in stages.

    Args:
        sizes: Objects with ``height``, ``width``, ``strength`` and ``ratio`` (compression of all layers).
    """
    plans = []
    for size in sizes:
        layers = range(networks.transformer.depth)
        net = with_compression(networks.transformer, layers, size.ratio, "mean")
        settings = replace(
            run,
            height=size.height,
            width=size.width,
            batch=1,
            steps=steps_taken(run.steps, size.strength),
            sequential=True,
        )
        plans.append(plan_run(replace(networks, transformer=net), settings, speed, memory))
    return plans


# ---- time


def measure_speed(networks: Networks, run: RunSettings) -> Speed:
    """Time one guided denoising step and one decoded tile of at most ``TIMED_SIDE`` pixels, with zero weights."""
    side = 8 * networks.transformer.patch_size * max(1, TIMED_SIDE // (8 * networks.transformer.patch_size))
    height, width = min(run.height, side), min(run.width, side)
    small = replace(run, height=height, width=width, batch=1)
    config = replace(networks.transformer, kv_compress_config=None)
    net = _zero_network(config, run.dtype)
    factor = 2 ** (len(networks.vae.block_out_channels) - 1)
    latents = np.zeros((small.rows, config.in_channels, height // factor, width // factor), np.float32)
    caption = ms.Tensor(np.zeros((small.rows, run.caption_tokens, config.caption_channels), np.float32))
    timestep = np.full(small.rows, 500.0, np.float32)
    step = _seconds(lambda: net(ms.Tensor(latents), ms.Tensor(timestep), caption).asnumpy())
    macs = sum(step_macs(config, height, width, [run.caption_tokens] * small.rows).values())
    vae = _zero_network(networks.vae, run.dtype)
    tile = _seconds(lambda: vae.decode(ms.Tensor(latents[:1]))[0].asnumpy())
    return Speed(run.dtype, step / macs, tile / (height * width))


def _zero_network(config: PixArtConfig | VAEConfig, dtype: str) -> Any:
    net = empty_network(config)
    for parameter in net.get_parameters():
        parameter.set_dtype(backend.supported_dtype(backend.dtype_from_name(dtype)))
        parameter.init_data()
    return net.set_train(False)


def _seconds(function: Any) -> float:
    function()  # the first call prepares the operators
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _decoded_pixels(run: RunSettings) -> int:
    """Return the pixels of all tiles of an image; tiles overlap by a quarter."""
    if not run.tile:
        return run.height * run.width
    rows, columns = (len(tile_starts(side, run.tile, run.tile // 4)) for side in (run.height, run.width))
    return rows * columns * min(run.tile, run.height) * min(run.tile, run.width)


# ---- fitting


def check_fits(plan: RunPlan, limit: float) -> None:
    """Refuse a run that needs more than ``limit`` bytes.

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
    for options, smaller in smaller_runs(plan):
        if smaller.peak <= limit:
            raise DoesNotFitError(f"{message}. With {' '.join(options)} it needs {smaller.peak / 1e9:.1f} GB.")
    options, least = min(smaller_runs(plan), key=lambda pair: pair[1].peak)
    raise DoesNotFitError(
        f"{message}. The least that it can take is {least.peak / 1e9:.1f} GB"
        f"{', with ' + ' '.join(options) if options else ''}: choose a smaller size, or a machine with more memory."
    )


def smaller_runs(plan: RunPlan) -> Iterator[tuple[tuple[str, ...], RunPlan]]:
    """Yield (options, plan) for every set of options that make the run smaller, fewest options first."""
    run, memory = plan.run, replace(DEFAULT_MEMORY, process=plan.process)
    for count in range(len(SMALLER) + 1):
        for choice in itertools.combinations(SMALLER, count):
            changes = {name: value for change, _ in choice for name, value in change.items()}
            if all(getattr(run, name) != value for name, value in changes.items()):
                smaller = plan_run(plan.networks, replace(run, **changes), memory=memory)
                yield tuple(option for _, option in choice), smaller


def size_warnings(config: PixArtConfig, run: RunSettings) -> list[str]:
    """Return sentences about a checkpoint that is used far from its training size or with an unusual position scale."""
    trained, drawn = 8 * config.input_size, (run.height * run.width) ** 0.5
    sentences = []
    if not 1 / FAR <= drawn / trained <= FAR:
        side, scale = round(drawn / 8), config.pe_interpolation * drawn / trained
        sentences.append(
            f"The checkpoint was trained at {trained}x{trained} (pe_interpolation {config.pe_interpolation:g}) and is "
            f"used at {run.height}x{run.width}: expect repeated, broken or blurred shapes. Use its own size, or "
            f"finetune it at this one (sample_size {side}, pe_interpolation {scale:.3g})."
        )
    usual = config.input_size / 64
    if config.input_size in (64, 128, 256, 512) and config.pe_interpolation != usual:
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
    """
    config = networks.transformer
    layers = layers or config.kv_layers or range(config.depth // 2, config.depth)
    rows = []
    for size, ratio, dtype in itertools.product(sizes, ratios, speeds):
        settings = replace(run, height=size, width=size, dtype=dtype)
        key_count(settings.grid(config), ratio)
        compressed = with_compression(config, layers, ratio, config.kv_operator or "conv")
        plan = plan_run(replace(networks, transformer=compressed), settings, speeds[dtype])
        memory = {f"{stage.name} GB": (stage.weights + stage.activations) / 1e9 for stage in plan.stages}
        rows.append(
            {"size": size, "ratio": ratio, "dtype": dtype, "tokens": settings.tokens(config)}
            | {"tera MACs per step": sum(plan.step_macs.values()) / 1e12}
            | memory
            | {"peak GB": plan.peak / 1e9, "estimated seconds per step": plan.seconds_per_step}
        )
    return rows
