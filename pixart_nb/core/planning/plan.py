"""The plan of a run: what each stage takes, whether it fits, and what would make it fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pixart_nb.core.cost import keys_of, with_compression
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.planning.calibration import Calibration
from pixart_nb.core.planning.counts import (
    caption_products,
    decode_products,
    encode_products,
    parameters,
    step_products,
)
from pixart_nb.core.planning.memory import (
    LIVE,
    STAGES,
    Live,
    Networks,
    Run,
    activations,
    weights,
)
from pixart_nb.core.planning.times import stage_seconds
from pixart_nb.core.sampling.samplers import steps_taken
from pixart_nb.core.sampling.upscaling import UpscaleSize

#: Changes that make a run smaller, as fields of ``Run`` and as options of ``pixart-nb sample``, the mildest first.
SMALLER: tuple[tuple[dict[str, Any], str], ...] = (
    ({"batch": 1}, "--batch-size 1"),
    ({"tile": 512}, "--tile-size 512"),
    ({"t5_load": "stream"}, "--t5-load stream"),
    ({"staged": True}, "--stages_path FOLDER"),
    ({"dtype": "fp16"}, "--dtype fp16"),
)
#: Sides further than this factor from those that a checkpoint was trained at are warned of.
FAR = 1.5


class DoesNotFitError(PixArtNBError):
    """A run that takes more memory than there is; the message says what would make it fit."""


@dataclass(frozen=True)
class StagePlan:
    """A stage of a run: bytes of weights and activations, multiply-adds of it all, seconds if calibrated.

    ``first_seconds``: how much of them the first call takes beyond what others take.
    """

    name: str
    weights: float
    activations: float
    multiply_adds: int
    seconds: float | None
    first_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    ``process``: bytes of Python and MindSpore alone; ``products``: multiply-adds of one step of the batch, by part.
    """

    networks: Networks
    run: Run
    stages: tuple[StagePlan, ...]
    process: float
    products: dict[str, int]

    @property
    def peak(self) -> float:
        """Bytes at the worst moment."""
        if self.run.staged:
            return max(self.held())
        return self.process + sum(s.weights for s in self.stages) + max(s.activations for s in self.stages)

    def held(self, kept: float = 0.0) -> list[float]:
        """Bytes in each stage, if they follow one another in one process.

        Weights are given back after a stage; the memory that it computed in MindSpore keeps for the next. ``kept``:
        bytes of it from before.
        """
        found = []
        for stage in self.stages:
            kept = max(kept, stage.activations)
            found.append(self.process + stage.weights + kept)
        return found

    @property
    def seconds(self) -> float | None:
        """Of all stages, without loading; None if it was not calibrated."""
        times = [stage.seconds for stage in self.stages]
        return None if None in times else sum(times)

    @property
    def seconds_per_step(self) -> float | None:
        """Of one step of the batch."""
        denoise = self.stages[STAGES.index("denoise")]
        return denoise.seconds and (denoise.seconds - denoise.first_seconds) / self.run.steps

    def rows(self) -> list[dict[str, Any]]:
        """The stages as rows of a table."""
        return [
            {
                "stage": stage.name,
                "weights GB": stage.weights / 1e9,
                "working GB": stage.activations / 1e9,
                "tera multiply-adds": stage.multiply_adds / 1e12,
                "seconds": stage.seconds,
            }
            for stage in self.stages
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON holds it."""
        return {
            "run": vars(self.run),
            "parameters": {name: parameters(config) for name, config in vars(self.networks).items()},
            "stages": [vars(stage) for stage in self.stages],
            "peak_bytes": self.peak,
            "multiply_adds_of_a_step": self.products,
            "seconds": self.seconds,
            "seconds_per_step": self.seconds_per_step,
        }


def plan(
    networks: Networks,
    run: Run,
    calibration: Calibration | None = None,
    live: Live = LIVE,
    fresh: bool = True,
) -> Plan:
    """What a run takes; seconds only with a calibration, which must be of the run's dtype.

    ``fresh``: in a process that has not drawn yet, where every stage's first call takes longer.
    """
    if calibration is not None and calibration.dtype != run.dtype:
        raise PixArtNBError(
            f"a calibration in {calibration.dtype} for a run in {run.dtype}; make one in {run.dtype}"
        )
    held, working = weights(networks, run), activations(networks, run, live)
    products = step_products(networks.transformer, run.height, run.width, run.captions)
    done = _multiply_adds(networks, run, products)
    times = (
        stage_seconds(networks, run, calibration, fresh)
        if calibration
        else dict.fromkeys(STAGES, (None, None))
    )
    stages = tuple(StagePlan(name, held[name], working[name], done[name], *times[name]) for name in STAGES)
    return Plan(networks, run, stages, live.process, products)


def _multiply_adds(networks: Networks, run: Run, products: Mapping[str, int]) -> dict[str, int]:
    texts = run.texts()
    captions = sum(caption_products(networks.transformer, count) for count in texts)
    return {
        "encode": sum(encode_products(networks.text_encoder, count) for count in texts),
        "denoise": run.steps * sum(products.values()) + captions,
        "decode": run.batch * sum(decode_products(networks.vae, run.height, run.width).values()),
    }


def needed_keys(config: PixArtConfig, run: Run) -> set[int]:
    """Numbers of keys that layers of a run have: where a calibration should time attention."""
    unit = 8 * config.patch_size
    grid = (run.height // unit, run.width // unit)
    return {keys_of(grid, config.layer_ratio(layer)) for layer in range(config.depth)}


# ---- a picture that grows


def plan_growing(
    networks: Networks,
    run: Run,
    sizes: Sequence[UpscaleSize],
    calibration: Calibration | None = None,
    live: Live = LIVE,
) -> list[Plan]:
    """What every size of a growing picture takes, drawn in stages (``core.sampling.upscaling``)."""
    found = []
    for size in sizes:
        layers, taken = range(networks.transformer.depth), steps_taken(run.steps, size.strength)
        net = with_compression(networks.transformer, layers, size.ratio, "mean")
        changed = replace(run, height=size.height, width=size.width, batch=1, steps=taken, staged=True)
        found.append(plan(replace(networks, transformer=net), changed, calibration, live, fresh=not found))
    return found


def growing_keys(config: PixArtConfig, sizes: Sequence[UpscaleSize]) -> set[int]:
    """Numbers of keys that the layers have at every size: where a calibration should time attention."""
    unit = 8 * config.patch_size
    return {keys_of((size.height // unit, size.width // unit), size.ratio) for size in sizes}


# ---- fitting


def check_fits(planned: Plan, limit: float) -> None:
    """Refuse a run that takes more than ``limit`` bytes.

    Raises ``DoesNotFitError`` with the options that would make it fit, or with the least that it can take.
    """
    if planned.peak <= limit:
        return
    worst = max(planned.stages, key=lambda stage: stage.weights + stage.activations)
    said = (
        f"this run takes {planned.peak / 1e9:.1f} GB of memory, {worst.name} the most of it, and {limit / 1e9:.1f} GB "
        "are to be had"
    )
    for options, smaller in smaller_runs(planned):
        if smaller.peak <= limit:
            raise DoesNotFitError(f"{said}. With {' '.join(options)} it takes {smaller.peak / 1e9:.1f} GB.")
    options, least = min(smaller_runs(planned), key=lambda found: found[1].peak)
    raise DoesNotFitError(
        f"{said}. The least that it can take is {least.peak / 1e9:.1f} GB, with {' '.join(options) or 'what is set'}: "
        "draw at a smaller size, or use a machine with more memory."
    )


def smaller_runs(planned: Plan) -> Iterator[tuple[tuple[str, ...], Plan]]:
    """The run with ever more options that make it smaller, fewest first: options, and the plan."""
    run, live = planned.run, replace(LIVE, process=planned.process)
    for count in range(len(SMALLER) + 1):
        for chosen in itertools.combinations(SMALLER, count):
            changes = {name: value for change, _ in chosen for name, value in change.items()}
            if all(getattr(run, name) != value for name, value in changes.items()):
                smaller = plan(planned.networks, replace(run, **changes), live=live)
                yield tuple(option for _, option in chosen), smaller


# ---- what a checkpoint was made for


def warnings_of(config: PixArtConfig, run: Run) -> list[str]:
    """Sentences on a checkpoint that is used at another size than it was trained at."""
    trained, drawn = 8 * config.input_size, (run.height * run.width) ** 0.5
    found = []
    if not 1 / FAR <= drawn / trained <= FAR:
        side, stretch = round(drawn / 8), config.pe_interpolation * drawn / trained
        found.append(
            f"The checkpoint was trained at {trained}x{trained} (pe_interpolation {config.pe_interpolation:g}) and is "
            f"to draw {run.height}x{run.width}: expect repeated, broken or blurred shapes. Draw at its own size, or "
            f"train it further at this one (sample_size {side}, pe_interpolation {stretch:.3g})."
        )
    usual = config.input_size / 64
    if config.input_size in (64, 128, 256, 512) and config.pe_interpolation != usual:
        found.append(
            f"pe_interpolation is {config.pe_interpolation:g} for latents of {config.input_size}; the published models "
            f"have size / 512, which is {usual:g}. A wrong one spoils every picture."
        )
    return found


def overview(
    networks: Networks,
    run: Run,
    sizes: Sequence[int],
    ratios: Sequence[int],
    calibrations: Mapping[str, Calibration | None],
    layers: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Rows of a table: square sizes in pixels, by compression ratio, by kind of number (the keys of ``calibrations``).

    ``layers`` that compress: by default those of the configuration, or the deep half.
    """
    config = networks.transformer
    layers = layers or config.kv_layers or range(config.depth // 2, config.depth)
    found = []
    for size, ratio, dtype in itertools.product(sizes, ratios, calibrations):
        compressed = with_compression(config, layers, ratio, config.kv_operator or "conv")
        changed = replace(run, height=size, width=size, dtype=dtype)
        planned = plan(replace(networks, transformer=compressed), changed, calibrations[dtype])
        working = {stage.name: (stage.weights + stage.activations) / 1e9 for stage in planned.stages}
        found.append(
            {
                "size": size,
                "ratio": ratio,
                "numbers": dtype,
                "tokens": changed.tokens(config),
                "tera multiply-adds a step": sum(planned.products.values()) / 1e12,
                **{f"{name} GB": value for name, value in working.items()},
                "peak GB": planned.peak / 1e9,
                "seconds a step": planned.seconds_per_step,
                "minutes": planned.seconds and planned.seconds / 60,
            }
        )
    return found
