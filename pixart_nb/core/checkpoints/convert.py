"""Conversion of PixArt transformers between layouts, tensor by tensor, with an audit and a verification.

Sources: whatever ``open_checkpoint`` reads. Targets, by their ending: ``.safetensors``, ``.ckpt`` and ``.pth`` with
official names, or a folder in diffusers' transformer layout. Tensors are renamed, split or stacked; the bits stay the
same unless another dtype is requested. A conversion is planned from names and shapes, and then carried out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.audit import Audit, AuditEntry, sentences_on
from pixart_nb.core.checkpoints.configuration import describe, diffusers_config, read_config
from pixart_nb.core.checkpoints.files import WEIGHTS, open_checkpoint, write_safetensors
from pixart_nb.core.checkpoints.key_maps import TransformerTensors, init_compression, to_layout, to_official_names
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
from pixart_nb.core.checkpoints.load import build_transformer, load_transformer, shapes_of
from pixart_nb.core.checkpoints.mindspore_file import write_mindspore
from pixart_nb.core.checkpoints.torch_file import write_torch
from pixart_nb.core.io import (
    CheckpointError,
    atomic_write,
    atomic_write_together,
    ensure_writable,
    folder_lock,
    read_json,
    write_json,
)
from pixart_nb.core.models.embeddings import sincos_positions
from pixart_nb.core.models.transformer import PixArt, PixArtConfig

#: Writers of checkpoints by ending.
WRITERS: Mapping[str, Callable[[Path, Mapping[str, LazyTensor]], None]] = {
    ".safetensors": write_safetensors,
    ".ckpt": write_mindspore,
    ".pth": write_torch,
    ".pt": write_torch,
}
#: Values of ``dtype``, and the dtype that is written.
DTYPES = {"keep": "", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
#: Largest relative error of one forward pass of a verified conversion, by the dtype of the target.
TOLERANCES = {"F16": 1e-2, "BF16": 1e-1}
TOLERANCE = 1e-4
#: Latent height and width (or the next multiples of the compression) and caption tokens of the verification.
_HEIGHT, _WIDTH, _CAPTION = 8, 12, 10


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion that is planned but not carried out.

    ``official``: the tensors under official names, as the source has them. ``tensors``: as the target will have them.
    """

    source: Path
    target: Path
    config: PixArtConfig
    official: dict[str, LazyTensor]
    tensors: dict[str, LazyTensor]
    audit: Audit

    @property
    def files(self) -> list[Path]:
        """Files that will be written: weights, configuration (of a folder), audit."""
        audit = audit_path(self.target)
        if self.target.suffix in WRITERS:
            return [self.target, audit]
        return [self.target / WEIGHTS, self.target / "config.json", audit]


def audit_path(target: Path) -> Path:
    """Return the path of the audit of a converted checkpoint."""
    return target.with_name(f"{target.name}.audit.json")


def check_default_target(target: Path, source: Path | None = None) -> Path:
    """Return a target that nobody gave, unless it is a file that no conversion wrote, or one of another ``source``."""
    audit = audit_path(target)
    written = read_json(audit).get("source") if audit.is_file() else None
    expected = str(transformer_folder(source.expanduser())) if source else written
    if target.exists() and (written is None or written != expected):
        raise CheckpointError(f"{target} exists and is not a conversion of this source; give --target to replace it")
    return target


def plan_conversion(
    source: str | Path,
    target: str | Path,
    config: PixArtConfig | None = None,
    sample_size: int | None = None,
    dtype: str = "keep",
) -> ConversionPlan:
    """Plan a conversion from names and shapes.

    ``config`` and ``sample_size`` (latent side of the training size: 32, 64, 128, 256) give what neither the tensors
    nor a config.json beside them show. ``dtype``: keep, fp32, fp16 or bf16. The folder of a whole pipeline stands for
    its transformer.

    Raises ``CheckpointError`` for a source that is damaged or no PixArt transformer, for contradictions, and for a
    target that cannot be written. Tensors that are missing are in the audit; ``convert`` refuses them.
    """
    source, target = transformer_folder(Path(source).expanduser()), Path(target).expanduser()
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    layout = _layout_of(source, target)
    view = to_official_names(open_checkpoint(source))
    description = describe(view, source, config, sample_size, any_heads=layout == "official")
    if layout == "diffusers" and not all(map(description.is_certain, ("input_size", "pe_interpolation"))):
        raise CheckpointError(
            f"{source} does not show its training size, which a diffusers folder must store: give --sample_size "
            "(32, 64, 128, 256 for images of 256, 512, 1024, 2048 pixels) or --config"
        )
    learned = description.config.kv_operator == "conv" and description.config.kv_ratio > 1
    layers = description.config.kv_layers if learned else ()
    started = init_compression(view.tensors, layers, description.config.kv_ratio)
    needed = shapes_of(description.config)
    official = {name: t for name, t in (view.tensors | started).items() if needed.get(name) == t.shape}
    written = {name: tensor.astype(DTYPES[dtype] or tensor.dtype) for name, tensor in official.items()}
    tensors = to_layout(written, layout)
    values = description.config.to_dict()
    audit = Audit(
        source=str(source),
        target=str(target),
        layouts=(view.layout, layout),
        dtypes=(_dtypes(view.tensors), _dtypes(tensors)),
        family=description.family,
        config={n: v for n, v in values.items() if description.is_certain(n) and v is not None},
        entries=_entries(view, official, needed, started, layout),
        sentences=list(sentences_on(view, description, layout, target.suffix, started)),
    )
    return ConversionPlan(source, target, description.config, official, tensors, audit)


def transformer_folder(source: Path) -> Path:
    """Return the transformer of a pipeline's folder; other paths as they are."""
    inside = source / "transformer"
    return inside if (source / "model_index.json").is_file() and inside.is_dir() else source


def _layout_of(source: Path, target: Path) -> str:
    """Return the layout of a target, which must not be the source, nor a folder with other weights."""
    if source.exists() and target.resolve() == source.resolve():
        raise CheckpointError(f"{target} is the source itself; choose another target")
    if target.suffix in WRITERS and not target.is_dir():
        return "official"
    if target.is_file() or (target.suffix and not target.is_dir()):
        endings = ", ".join(WRITERS)
        raise CheckpointError(f"{target}: expected a file that ends in {endings}, or a folder (without a dot)")
    if (target / "model_index.json").is_file():
        raise CheckpointError(f"{target} is a whole pipeline; give its transformer folder, {target / 'transformer'}")
    if (target / "config.json").is_file():
        read_config(target / "config.json")  # refuses that of another network
    others = [p.name for p in target.glob("*") if p.name != WEIGHTS and p.suffix in (".bin", ".safetensors")]
    others += [p.name for p in target.glob("*.index.json")]
    if others:
        raise CheckpointError(f"{target} holds other weights ({', '.join(others)}); choose an empty folder")
    return "diffusers"


def _dtypes(tensors: Mapping[str, LazyTensor]) -> str:
    return ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))


def _entries(
    view: TransformerTensors,
    official: Mapping[str, LazyTensor],
    needed: Mapping[str, tuple[int, ...]],
    started: Mapping[str, LazyTensor],
    layout: str,
) -> list[AuditEntry]:
    """Return an entry for each tensor of the source, and for each that it lacks."""
    stored = view.checkpoint.tensors
    entries = []
    for name in [*view.tensors, *view.recomputed]:
        source = (view.origins[name], tuple(stored[part].shape for part in view.origins[name]))
        if name in view.recomputed:
            entries.append(AuditEntry("recomputed", *source))
        elif name not in needed:
            entries.append(AuditEntry("unexpected", *source))
        elif name not in official:
            entries.append(AuditEntry("misfit", *source, (name,), (needed[name],)))
        else:
            entries.append(AuditEntry("mapped", *source, *_target_side(name, official[name], layout)))
    entries += [AuditEntry("unexpected", (name,), (tensor.shape,)) for name, tensor in view.rest.items()]
    entries += [AuditEntry("started", (), (), *_target_side(*item, layout)) for item in started.items()]
    for name in sorted(set(needed) - set(view.tensors) - set(started)):
        outcome = "absent" if name in key_maps.OPTIONAL else "missing"
        entries.append(AuditEntry(outcome, (), (), (name,), (needed[name],)))
    return entries


def _target_side(name: str, tensor: LazyTensor, layout: str) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Return names and shapes that an official tensor has in the target."""
    parts = to_layout({name: tensor}, layout)
    return tuple(parts), tuple(part.shape for part in parts.values())


# ---- carrying it out


def convert(plan: ConversionPlan) -> Audit:
    """Carry out a conversion; the target, its configuration and its audit appear together, or, on an error, not at all.

    Raises ``CheckpointError`` for an incomplete source, ``WriteError`` for a target that cannot be written, and
    ``FolderInUseError`` if another process is writing it.
    """
    audit, target = plan.audit, plan.target
    if not audit.complete:
        names = [name for e in (*audit.of("missing"), *audit.of("misfit")) for name in (*e.source, *e.target)]
        raise CheckpointError(
            f"{plan.source} is not complete: {len(names)} tensors are missing or of another shape "
            f"({', '.join(names[:4])}). Nothing was written."
        )
    ensure_writable(target.parent, needed=sum(tensor.nbytes for tensor in plan.tensors.values()))
    with folder_lock(target.parent, name=f".{target.name}.lock"), atomic_write_together(*plan.files) as paths:
        WRITERS.get(target.suffix, WRITERS[".safetensors"])(paths[0], plan.tensors)
        if len(paths) == 3:
            values = diffusers_config(plan.config)
            if "model_max_length" not in audit.config:  # which is then not certain
                del values["model_max_length"]
            write_json(paths[1], values)
        write_json(paths[-1], audit.to_dict())
    return audit


# ---- verifying it


def verify(plan: ConversionPlan, seed: int = 0) -> float:
    """Return the relative error of one forward pass of the target, as it is read back, against the source.

    Unless another dtype was requested the weights are the same bits, and the error is 0.
    """
    expected, actual = outputs(plan, seed)
    distance = np.linalg.norm(actual - expected)
    return float(distance / np.linalg.norm(expected)) if distance else 0.0


def outputs(plan: ConversionPlan, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return the predictions of source and target for random inputs, in float32: (1, 2C, H, W) each."""
    expected = _forward(build_transformer(plan.official, plan.config, plan.source, ms.float32), seed)
    return expected, _forward(load_transformer(plan.target, plan.config), seed)  # one network at a time


def tolerance(plan: ConversionPlan) -> float:
    """Return the largest error with which ``verify`` passes; it is larger where the dtype changed."""
    before, after = plan.audit.dtypes
    return TOLERANCE if before == after else TOLERANCES.get(after, TOLERANCE)


def _forward(net: PixArt, seed: int) -> np.ndarray:
    config, rng = net.config, np.random.default_rng(seed)
    cell = config.kv_ratio * config.patch_size
    height, width = (-(-side // config.kv_ratio) * cell for side in (_HEIGHT, _WIDTH))
    latents = rng.standard_normal((1, config.in_channels, height, width)).astype(np.float32)
    caption = rng.standard_normal((1, _CAPTION, config.caption_channels)).astype(np.float32)
    timestep = np.array([500.0], np.float32)
    return net(*(ms.Tensor(part) for part in (latents, timestep, caption))).asnumpy().astype(np.float64)


def write_random(path: str | Path, config: PixArtConfig, seed: int = 0, dtype: str = "fp32") -> None:
    """Write a ``.pth`` in the official layout with ``pos_embed`` and random weights (normal, 0.02), to try things with.

    One pool of random numbers serves all tensors, so that a file of full size takes little memory to write.
    """
    rng, shapes = np.random.default_rng(seed), shapes_of(config)
    pool = rng.standard_normal(2 * max(map(math.prod, shapes.values())), np.float32) * np.float32(0.02)
    arrays = {}
    for name, shape in shapes.items():
        start = int(rng.integers(pool.size - math.prod(shape)))
        arrays[name] = pool[start : start + math.prod(shape)].reshape(shape)
    side = config.input_size // config.patch_size
    arrays["pos_embed"] = sincos_positions(config.hidden_size, side, side, side, config.pe_interpolation)[None]
    tensors = {name: LazyTensor.of(value, name) for name, value in arrays.items()}
    with atomic_write(path) as temporary:
        write_torch(temporary, {name: t.astype(DTYPES[dtype] or t.dtype) for name, t in tensors.items()})
