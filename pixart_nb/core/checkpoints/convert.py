"""Conversion of PixArt transformers between layouts, tensor by tensor, with an audit; and its verification.

Sources: whatever ``open_checkpoint`` reads. Targets, by their ending: ``.safetensors``, ``.ckpt`` and ``.pth`` with
official names, or a folder in diffusers' transformer layout. Either way the same numbers: a tensor is renamed, split
or stacked, never computed with, unless another dtype is asked for. A conversion is planned from names and shapes
alone; then it is done.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.audit import Audit, Entry, sentences_on
from pixart_nb.core.checkpoints.configuration import describe, diffusers_config
from pixart_nb.core.checkpoints.files import WEIGHTS, WRITERS, open_checkpoint
from pixart_nb.core.checkpoints.layouts import Transformer, official_view, started_compression, target_tensors
from pixart_nb.core.checkpoints.lazy_tensor import Stored
from pixart_nb.core.checkpoints.load import load_transformer, shapes_of, transformer_of
from pixart_nb.core.checkpoints.torch_writer import write_torch
from pixart_nb.core.io import CheckpointError, atomic_write, atomic_write_together, write_json
from pixart_nb.core.models.embeddings import sincos_positions
from pixart_nb.core.models.transformer import PixArt, PixArtConfig

#: What ``dtype`` may be, and the kind of number that is written.
DTYPES = {"keep": "", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
#: Largest relative error of one forward pass with which a conversion counts as verified, by the target's numbers.
TOLERANCES = {"F16": 1e-2, "BF16": 1e-1}
TOLERANCE = 1e-4
#: Tokens that verification computes: the sides of the picture (or the next multiples of the compression), the caption.
_HEIGHT, _WIDTH, _CAPTION = 8, 12, 10


@dataclass(frozen=True)
class Plan:
    """A conversion that is decided but not done: what is written where, and its audit.

    ``official``: the tensors under official names, as the source has them. ``tensors``: as the target will.
    """

    source: Path
    target: Path
    config: PixArtConfig
    official: dict[str, Stored]
    tensors: dict[str, Stored]
    audit: Audit

    @property
    def files(self) -> list[Path]:
        """The files that will be written: weights, configuration (of a folder), audit."""
        audit = self.target.with_name(f"{self.target.name}.audit.json")
        if self.target.suffix in WRITERS:
            return [self.target, audit]
        return [self.target / WEIGHTS, self.target / "config.json", audit]


def plan_conversion(
    source: str | Path,
    target: str | Path,
    config: PixArtConfig | None = None,
    sample_size: int | None = None,
    dtype: str = "keep",
) -> Plan:
    """Decide a conversion. Only names and shapes are read.

    ``config`` and ``sample_size`` (latent side of the training size: 32, 64, 128, 256) say what neither the tensors
    nor a config.json with them show; ``dtype``: keep, fp32, fp16 or bf16. A folder of a whole pipeline stands for its
    transformer.

    Raises ``CheckpointError`` for a source that is damaged or no PixArt transformer, for contradictions, and for a
    target that cannot be written. Tensors that are missing are in the audit; ``convert`` refuses them.
    """
    source, target = _transformer_in(Path(source)), Path(target)
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not known; expected one of {', '.join(DTYPES)}")
    layout = _checked_layout(source, target)
    view = official_view(open_checkpoint(source))
    found = describe(view, source, config, sample_size, any_heads=layout == "official")
    if layout == "diffusers" and not (found.knows("input_size") and found.knows("pe_interpolation")):
        raise CheckpointError(
            f"{source} does not show the size it was trained at, which a diffusers folder must say: give --sample_size "
            "(32, 64, 128, 256 for pictures of 256, 512, 1024, 2048 pixels) or --config"
        )
    started = _started(view, found.config)
    needed = shapes_of(found.config)
    official = {name: t for name, t in (view.tensors | started).items() if needed.get(name) == t.shape}
    written = {name: tensor.read_as(DTYPES[dtype] or tensor.dtype) for name, tensor in official.items()}
    tensors = target_tensors(written, layout)
    audit = Audit(
        source=str(source),
        target=str(target),
        layouts=(view.layout, layout),
        dtypes=(_kinds(view.tensors), _kinds(tensors)),
        family=found.family,
        config={n: v for n, v in found.config.to_dict().items() if found.knows(n) and v is not None},
        entries=_entries(view, official, needed, started, layout),
        sentences=sentences_on(view, found, layout, target.suffix, started),
    )
    return Plan(source, target, found.config, official, tensors, audit)


def _started(view: Transformer, config: PixArtConfig) -> dict[str, Stored]:
    """Parts of compressed layers that the source lacks and the configuration, or its other parts, ask for."""
    learned = config.kv_operator == "conv" and config.kv_ratio > 1
    return started_compression(view.tensors, config.kv_layers if learned else (), config.kv_ratio)


def _transformer_in(source: Path) -> Path:
    inside = source / "transformer"
    return inside if (source / "model_index.json").is_file() and inside.is_dir() else source


def _checked_layout(source: Path, target: Path) -> str:
    """The layout of a target, which must not be the source, nor a folder with other weights."""
    endings = ", ".join(WRITERS)
    if target.resolve() == source.resolve():
        raise CheckpointError(f"{target} is the source itself; choose another target")
    if target.suffix in WRITERS and not target.is_dir():
        return "official"
    if target.is_file() or (target.suffix and not target.is_dir()):
        raise CheckpointError(
            f"{target}: expected a file that ends in {endings}, or a folder (without a dot)"
        )
    if (target / "model_index.json").is_file():
        raise CheckpointError(
            f"{target} is a whole pipeline; give its transformer folder, {target / 'transformer'}"
        )
    others = [p.name for p in target.glob("*") if p.name != WEIGHTS and p.suffix in (".bin", ".safetensors")]
    others += [p.name for p in target.glob("*.index.json")]
    if others:
        raise CheckpointError(f"{target} holds other weights ({', '.join(others)}); choose an empty folder")
    return "diffusers"


def _kinds(tensors: Mapping[str, Stored]) -> str:
    return ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))


def _entries(
    view: Transformer,
    official: Mapping[str, Stored],
    needed: Mapping[str, tuple[int, ...]],
    started: Mapping[str, Stored],
    layout: str,
) -> list[Entry]:
    """An entry for each tensor of the source, and for each that it lacks."""
    stored = view.opened.tensors
    entries = []
    for name in [*view.tensors, *view.recomputed]:
        source = view.origins[name]
        left = (source, tuple(stored[part].shape for part in source))
        if name in view.recomputed:
            entries.append(Entry("recomputed", *left))
        elif name not in needed:
            entries.append(Entry("unexpected", *left))
        elif name not in official:
            entries.append(Entry("misfit", *left, (name,), (needed[name],)))
        else:
            entries.append(Entry("mapped", *left, *_target_side(name, official[name], layout)))
    entries += [Entry("unexpected", (name,), (tensor.shape,)) for name, tensor in view.rest.items()]
    entries += [Entry("started", (), (), *_target_side(*item, layout)) for item in started.items()]
    lost = sorted(set(needed) - set(view.tensors) - set(started))
    return entries + [
        Entry("absent" if name in key_maps.OPTIONAL else "missing", (), (), (name,), (needed[name],))
        for name in lost
    ]


def _target_side(
    name: str, tensor: Stored, layout: str
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names and shapes that an official tensor has in the target."""
    parts = target_tensors({name: tensor}, layout)
    return tuple(parts), tuple(part.shape for part in parts.values())


# ---- doing it


def convert(plan: Plan) -> Audit:
    """Do a conversion; the target, its configuration and its audit appear together, or, on any error, not at all."""
    audit = plan.audit
    if not audit.complete:
        names = [name for e in (*audit.of("missing"), *audit.of("misfit")) for name in (*e.source, *e.target)]
        raise CheckpointError(
            f"{plan.source} is not whole: {len(names)} tensors are missing or of another shape "
            f"({', '.join(names[:4])}). Nothing was written."
        )
    needed = sum(tensor.nbytes for tensor in plan.tensors.values())
    try:
        _check_space(plan.target, needed)
        with atomic_write_together(*plan.files) as paths:
            WRITERS.get(plan.target.suffix, WRITERS[".safetensors"])(paths[0], plan.tensors)
            if len(paths) == 3:
                write_json(paths[1], _folder_config(plan))
            write_json(paths[-1], audit.to_dict())
    except OSError as error:
        raise CheckpointError(
            f"{plan.target} could not be written ({error.strerror or error}); it needs {needed / 1e6:,.1f} MB. Nothing "
            "half-written was left. Free space or choose another place."
        ) from error
    return audit


def _folder_config(plan: Plan) -> dict:
    """``config.json`` of the target; a number of caption tokens that nobody said is left out."""
    values = diffusers_config(plan.config)
    return {
        name: value
        for name, value in values.items()
        if name != "model_max_length" or name in plan.audit.config
    }


def _check_space(target: Path, needed: int) -> None:
    place = next(folder for folder in (target.parent, *target.parent.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{target} needs {needed / 1e6:,.1f} MB and {place} has {free / 1e6:,.1f} MB free; choose another place"
        )


# ---- verifying it


def verify(plan: Plan, seed: int = 0) -> float:
    """Relative error of one forward pass: the target as it is read back, against the source with its own numbers.

    Unless another dtype was asked for the weights should be the same bits, so this should be 0.
    """
    expected, found = outputs(plan, seed)
    distance = np.linalg.norm(found - expected)
    return float(distance / np.linalg.norm(expected)) if distance else 0.0


def outputs(plan: Plan, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What source and target predict for random latents, timestep and caption, in float32: (1, 2C, H, W) each."""
    expected = _forward(transformer_of(plan.official, plan.config, plan.source, ms.float32), seed)
    return expected, _forward(load_transformer(plan.target, plan.config), seed)  # one network at a time


def tolerance(plan: Plan) -> float:
    """The largest error with which ``verify`` passes: more where numbers were rounded to a smaller kind."""
    before, after = plan.audit.dtypes
    return TOLERANCE if before == after else TOLERANCES.get(after, TOLERANCE)


def _forward(net: PixArt, seed: int) -> np.ndarray:
    config, rng = net.config, np.random.default_rng(seed)
    height, width = (
        -(-side // config.kv_ratio) * config.kv_ratio * config.patch_size for side in (_HEIGHT, _WIDTH)
    )
    latents = rng.standard_normal((1, config.in_channels, height, width)).astype(np.float32)
    caption = rng.standard_normal((1, _CAPTION, config.caption_channels)).astype(np.float32)
    timestep = np.array([500.0], np.float32)
    return net(*(ms.Tensor(part) for part in (latents, timestep, caption))).asnumpy().astype(np.float64)


# ---- something to try it with


def write_random(path: str | Path, config: PixArtConfig, seed: int = 0, dtype: str = "fp32") -> None:
    """Write a ``.pth`` in the official layout, with ``pos_embed``, of random weights (normal, 0.02).

    One pool of random numbers serves all tensors, so that a file of full size takes little memory to write.
    """
    rng, shapes = np.random.default_rng(seed), shapes_of(config)
    largest = max(map(math.prod, shapes.values()))
    pool = rng.standard_normal(2 * largest, np.float32) * np.float32(0.02)
    tensors = {}
    for name, shape in shapes.items():
        start = int(rng.integers(pool.size - math.prod(shape)))
        tensors[name] = Stored.of(pool[start : start + math.prod(shape)].reshape(shape), name)
    side = config.input_size // config.patch_size
    positions = sincos_positions(config.hidden_size, side, side, side, config.pe_interpolation)[None]
    tensors["pos_embed"] = Stored.of(positions, "pos_embed")
    with atomic_write(path) as temporary:
        write_torch(temporary, {name: t.read_as(DTYPES[dtype] or t.dtype) for name, t in tensors.items()})
