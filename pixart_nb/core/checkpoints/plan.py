"""What a conversion will do, decided from names and shapes alone: layout, architecture, and every tensor's fate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.audit import Audit, Entry
from pixart_nb.core.checkpoints.configuration import (
    FAMILIES,
    config_from_diffusers,
    merge,
    positions_of,
    positions_shown,
    reconcile,
    shown_by,
)
from pixart_nb.core.checkpoints.files import WEIGHTS, WRITERS, open_checkpoint
from pixart_nb.core.checkpoints.layouts import Transformer, official_view, started_compression, target_tensors
from pixart_nb.core.checkpoints.load import shapes_of
from pixart_nb.core.checkpoints.sentences import sentences_on
from pixart_nb.core.checkpoints.store import CheckpointError, read_json
from pixart_nb.core.checkpoints.stored import Stored
from pixart_nb.core.models.transformer import PixArtConfig

#: What ``dtype`` may be, and the kind of number that is written.
DTYPES = {"keep": "", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True)
class Plan:
    """A conversion that is decided but not done: what is written where, and its audit.

    ``official``: the tensors under official names, in the dtype of the target. ``tensors``: under the target's.
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

    ``config`` and ``sample_size`` (latent side of the training size: 32, 64, 128, 256) say what the tensors do not
    show; ``dtype``: keep, fp32, fp16 or bf16. A folder of a whole pipeline stands for its transformer.

    Raises ``CheckpointError`` for a source that is damaged or no PixArt transformer, for contradictions, and for a
    target that cannot be written. Tensors that are missing are in the audit; ``convert`` refuses them.
    """
    source, target = _transformer_of(Path(source)), Path(target)
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not known; expected one of {', '.join(DTYPES)}")
    layout = _check_target(source, target)
    view = official_view(open_checkpoint(source))
    family = _family(view, source)
    base, known = _said(view, source, family, config, sample_size)
    shown = shown_by(view.tensors, source)
    complete = reconcile(base, shown, source)
    if layout == "diffusers" and not {"input_size", "pe_interpolation"} <= known:
        raise CheckpointError(
            f"{source} does not show the size it was trained at, which a diffusers folder must say: give --sample_size "
            "(32, 64, 128, 256 for pictures of 256, 512, 1024, 2048 pixels) or --config"
        )
    known |= set(shown) | {"num_heads"}
    return _Decision(view, source, target, layout, family, complete, known, DTYPES[dtype]).plan()


def _transformer_of(source: Path) -> Path:
    inside = source / "transformer"
    return inside if (source / "model_index.json").is_file() and inside.is_dir() else source


def _check_target(source: Path, target: Path) -> str:
    """The layout of a target, which must not be the source, nor a folder with other weights."""
    if target.suffix in WRITERS:
        if target.is_dir() or target.resolve() == source.resolve():
            raise CheckpointError(f"{target} is a folder or the source itself; choose another target")
        return "official"
    if target.suffix and not target.is_dir():
        raise CheckpointError(
            f"{target}: unknown ending {target.suffix!r}; expected {', '.join(WRITERS)}, or a folder (without a dot)"
        )
    if target.is_file():
        raise CheckpointError(
            f"{target} is a file; expected a folder, or a file ending in {', '.join(WRITERS)}"
        )
    others = [p.name for p in target.glob("*") if p.name != WEIGHTS and p.suffix in (".bin", ".safetensors")]
    others += [p.name for p in target.glob("*.index.json")]
    if others or target.resolve() == source.resolve():
        raise CheckpointError(
            f"{target} holds other weights ({', '.join(others) or 'the source'}); choose an empty folder"
        )
    return "diffusers"


def _family(view: Transformer, source: Path) -> str:
    """``alpha`` or ``sigma``: by caption tokens, micro conditions or the pipeline around; empty if not known."""
    embedding = view.tensors.get("y_embedder.y_embedding")
    if embedding is not None:
        return FAMILIES.get(embedding.shape[0], "") if embedding.shape else ""
    if "csize_embedder.mlp.0.weight" in view.tensors:
        return "alpha"
    index = source.parent / "model_index.json"
    kind = str(read_json(index).get("_class_name")) if index.is_file() else ""
    return {"PixArtAlphaPipeline": "alpha", "PixArtSigmaPipeline": "sigma"}.get(kind, "")


def _said(
    view: Transformer, source: Path, family: str, config: PixArtConfig | None, sample_size: int | None
) -> tuple[PixArtConfig, set[str]]:
    """The configuration as far as it is said, and which of its fields are: by files, by the caller, by positions."""
    base = config or PixArtConfig()
    if sample_size is not None:
        base = merge(PixArtConfig(**positions_of(sample_size, family)), base, "--sample_size")
    written = (source if source.is_dir() else source.parent) / "config.json"
    if written.is_file() and view.layout == "diffusers":
        base = merge(config_from_diffusers(read_json(written), written), base, written)
    tokens = {name: count for count, name in FAMILIES.items()}
    if family and not base.says("model_max_length") and "y_embedder.y_embedding" not in view.tensors:
        base = merge(PixArtConfig(model_max_length=tokens[family]), base, source)
    known = {field.name for field in fields(PixArtConfig) if base.says(field.name)}
    patch = (
        view.tensors["x_embedder.proj.weight"].shape[-1] if "x_embedder.proj.weight" in view.tensors else 0
    )
    for stored in view.recomputed.values():
        seen = {name: value for name, value in positions_shown(stored, patch).items() if name not in known}
        base = PixArtConfig(**{name: getattr(base, name) for name in known} | seen)
        known |= set(seen)
    return base, known


@dataclass(frozen=True)
class _Decision:
    """What a plan follows from: the source as it is seen, what is to become of it, and what is known of it."""

    view: Transformer
    source: Path
    target: Path
    layout: str
    family: str
    config: PixArtConfig
    known: set[str]
    kind: str

    def plan(self) -> Plan:
        config, view = self.config, self.view
        layers = config.kv_layers if config.kv_operator == "conv" and config.kv_ratio > 1 else ()
        started = started_compression(view.tensors, layers, config.kv_ratio)
        needed = shapes_of(config)
        found = view.tensors | started
        whole = {name: tensor for name, tensor in found.items() if needed.get(name) == tensor.shape}
        if self.kind:
            whole = {name: tensor.read_as(self.kind) for name, tensor in whole.items()}
        tensors = target_tensors(whole, self.layout)
        audit = self.audit(tensors, _entries(view, whole, needed, started, self.layout), started)
        return Plan(self.source, self.target, config, whole, tensors, audit)

    def audit(
        self, tensors: Mapping[str, Stored], entries: list[Entry], started: Mapping[str, Stored]
    ) -> Audit:
        kinds = _kinds(self.view.tensors), _kinds(tensors)
        ending = self.target.suffix
        sentences = sentences_on(self.view, self.config, self.family, self.layout, ending, started)
        if kinds[0] != kinds[1]:
            sentences.append(f"The numbers are not the same ones: {kinds[0]} became {kinds[1]}.")
        values = self.config.to_dict().items()
        config = {name: value for name, value in values if name in self.known and value is not None}
        layouts = (self.view.layout, self.layout)
        return Audit(
            str(self.source), str(self.target), layouts, kinds, self.family, config, entries, sentences
        )


def _kinds(tensors: Mapping[str, Stored]) -> str:
    return ", ".join(sorted({tensor.dtype for tensor in tensors.values()}))


def _entries(
    view: Transformer,
    whole: Mapping[str, Stored],
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
        elif name not in whole:
            entries.append(Entry("misfit", *left, (name,), (needed[name],)))
        else:
            right = target_tensors({name: whole[name]}, layout)
            shapes = tuple(tensor.shape for tensor in right.values())
            entries.append(Entry("mapped" if right else "left out", *left, tuple(right), shapes))
    for name, tensor in started.items():
        right = target_tensors({name: tensor}, layout)
        entries.append(Entry("started", (), (), tuple(right), tuple(part.shape for part in right.values())))
    entries += [Entry("unexpected", (name,), (tensor.shape,)) for name, tensor in view.rest.items()]
    lost = set(needed) - set(view.tensors) - set(started) - set(key_maps.OFFICIAL_ONLY)
    return entries + [Entry("missing", (), (), (name,), (needed[name],)) for name in sorted(lost)]
