"""LoRA files: read in the layouts of PEFT, diffusers, kohya's scripts and LyCORIS; written in the first two.

A module is one linear layer under the name that diffusers gives it, or the official code.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pixart_nb.config import bundled_path
from pixart_nb.core.checkpoints.files import ENDINGS, read_tensors
from pixart_nb.core.checkpoints.hub import from_hub
from pixart_nb.core.errors import PixArtNBError, first_few
from pixart_nb.core.io import CheckpointError, atomic_write_together, save_tensors, write_json
from pixart_nb.core.lora.peft_config import METADATA, PEFT_CONFIG, PeftConfig, alpha_of, peft_config

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
LORA_FILES = (DIFFUSERS_FILE, PEFT_FILE, "pytorch_lora_weights.bin", "adapter_model.bin")
LAYOUTS = ("diffusers", "peft")
#: Prefixes of module names, which are removed one after the other.
PREFIXES = (
    "module.",
    "_orig_mod.",
    "base_model.model.",
    "unet.",
    "model.",
    "transformer.",
    "diffusion_model.",
    "lora_transformer_",
    "lora_unet_",
    "lycoris_",
)
#: Prefixes of parts that are not of the transformer: text encoders and bundled embeddings.
OTHER_PARTS = ("lora_te", "text_encoder", "te1.", "te2.", "te3.", "bundle_emb", "emb_params")
_PARTS = {
    "down": r"\.(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight",
    "up": r"\.(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight",
    "alpha": r"\.alpha",
    "magnitude": r"\.(?:lora_magnitude_vector(?:\.\w+)??(?:\.weight)?|dora_scale)",
}
#: Factors of LoKr and LoHa in LyCORIS and PEFT.
_FACTORS = tuple(f"{family}_w{n}{side}" for family in ("lokr", "hada") for n in "12" for side in ("", "_a", "_b"))
_PARTS |= {name: rf"\.{name}(?:\.default)?" for name in _FACTORS}
_KEY = re.compile("(.+?)(?:" + "|".join(f"(?P<{part}>{ending})" for part, ending in _PARTS.items()) + ")")
_OF_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.")
_MAX_NAME = 500
#: Elements of the largest update that factors may make: a layer of 4096 to 16384.
_MAX_DELTA = 2**26


@dataclass(frozen=True)
class LoraModule:
    """LoRA of one layer: ``down`` (r, in, ...), ``up`` (out, r, ...), and DoRA's ``magnitude`` (out,).

    The update of the weight is ``scale * up @ down``. Those of a patch embedding have the axes of a convolution.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return len(self.down)

    def shape_on(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the weights that the module changes, on a layer with weights of ``shape``."""
        return len(self.up), *self.down.shape[1:]


@dataclass(frozen=True)
class DeltaModule:
    """LoKr or LoHa of one layer: ``scale * delta`` (out, in) is added to the weight; a convolution's in is flat."""

    delta: np.ndarray
    scale: float
    magnitude: None = None

    def shape_on(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the weights that the module changes, on a layer with weights of ``shape``."""
        rows, size = self.delta.shape
        return (rows, *shape[1:]) if size == math.prod(shape[1:]) else self.delta.shape


@dataclass(frozen=True)
class LoraFile:
    """Modules of a LoRA; ``source`` is for messages."""

    modules: dict[str, LoraModule | DeltaModule]
    source: str = "the LoRA"


def lora_path(source: str | Path, weight_name: str | None = None, subfolder: str | None = None, **hub: Any) -> Path:
    """Return the file or folder of a LoRA, which may be a hub id; ``weight_name`` is its file there.

    Raises ``CheckpointError``.
    """
    path = bundled_path(source)
    if not path.exists():
        files = [*([weight_name] if weight_name else LORA_FILES), PEFT_CONFIG]
        path = from_hub(source, [str(PurePosixPath(subfolder or "", name)) for name in files], "a LoRA", hub)
    return path / subfolder if subfolder else path


def read_lora(source: str | Path | Mapping[str, Any], weight_name: str | None = None) -> LoraFile:
    """Read a LoRA: a file, a folder that holds one (``weight_name``: its file), or a mapping of tensors.

    Without any alpha the scale is 1, with a warning, as in diffusers. Parts of text encoders and bundled embeddings are
    left out with a warning. Raises ``CheckpointError`` for a file that is missing, damaged, or holds tensors that are
    no part of a LoRA of linear layers.
    """
    if isinstance(source, Mapping):
        tensors = {str(name): _array(value) for name, value in source.items()}
        return _lora_of(tensors, PeftConfig(), "the given tensors")
    path = _weights_file(Path(source).expanduser(), weight_name)
    return _lora_of(read_tensors(path), PeftConfig.beside(path), str(path))


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.asnumpy() if hasattr(value, "asnumpy") else value)


def _weights_file(path: Path, weight_name: str | None) -> Path:
    if path.is_dir():
        names = [weight_name] if weight_name else [name for name in LORA_FILES if (path / name).is_file()]
        names = names or sorted(part.name for part in path.glob("*.safetensors"))
        if not names or (len(names) > 1 and names[0] not in LORA_FILES):
            listed = sorted(part.name for part in path.iterdir())[:10]
            raise CheckpointError(
                f"{path} holds {'several files' if names else 'no LoRA'}: {listed}; expected {DIFFUSERS_FILE} or "
                f"{PEFT_FILE}, or the name of the file as weight_name"
            )
        path = path / names[0]
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a LoRA's file or its folder")
    if path.suffix not in ENDINGS:
        raise CheckpointError(f"{path}: unknown ending {path.suffix!r}; expected .safetensors or .bin")
    return path


# ---- reading


def _plain_name(name: str) -> str:
    """Return the name of a tensor without prefixes; a layer of a processor, as diffusers once wrote, has its own."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return _OF_PROCESSOR.sub(lambda match: f".{match[1]}{'.0' * (match[1] == 'to_out')}.lora.", name)


def _lora_of(tensors: Mapping[str, np.ndarray], config: PeftConfig, source: str) -> LoraFile:
    parts_of, unknown, others = _grouped(tensors, source)
    if unknown or not parts_of:
        reason = "it is empty" if not tensors else "it holds no part of a transformer"
        if unknown:
            reason = f"{len(unknown)} tensors are no part of one ({first_few(unknown, 3)})"
        raise CheckpointError(
            f"{source} is no LoRA of linear layers: {reason}; expected pairs of lora_A.weight and lora_B.weight, or of "
            "lora_down.weight and lora_up.weight, or the factors of LoKr or LoHa; without the Tucker decompositions of "
            "convolutions (lora_mid, lokr_t2, hada_t1, hada_t2)"
        )
    modules, silent = {}, []
    for name, parts in parts_of.items():
        _check_values(f"{source}: {name}", parts)
        own = float(parts["alpha"].reshape(())) if "alpha" in parts else None
        if any(part in _FACTORS for part in parts):
            delta, rank = _delta(f"{source}: {name}", parts)
            scale = config.scale(name, rank or 1, own)
            scale = 1.0 if rank is None and config.peft_type == "LORA" else scale  # whole factors: as LyCORIS does
            module = DeltaModule(delta, 1.0 if scale is None else scale)
        else:
            _check_pair(f"{source}: {name}", parts)
            scale = config.scale(name, len(parts["down"]), own)
            down, up = (np.array(parts[part], np.float32) for part in ("down", "up"))
            magnitude = np.array(parts["magnitude"], np.float32).reshape(len(up)) if "magnitude" in parts else None
            module = LoraModule(down, up, 1.0 if scale is None else scale, magnitude)
        modules[name] = module
        silent += [name] if scale is None else []
    if config.use_dora and all(module.magnitude is None for module in modules.values()):
        raise CheckpointError(f"{source} is described as a DoRA, but holds no lora_magnitude_vector")
    if silent:
        warnings.warn(
            f"{source} holds no alpha for {len(silent)} modules ({first_few(silent, 3)}); their scale is taken to be 1",
            stacklevel=3,
        )
    if others:
        warnings.warn(
            f"{source}: the {len(others)} tensors of text encoders or embeddings ({first_few(others, 3)}) were left "
            "out; only the LoRA of the transformer is loaded",
            stacklevel=3,
        )
    return LoraFile(modules, source)


def _grouped(tensors: Mapping[str, np.ndarray], source: str) -> tuple[dict, list[str], list[str]]:
    """Return the parts of each module, tensors that are no part of a LoRA, and those of other networks."""
    modules: dict[str, dict[str, np.ndarray]] = {}
    unknown, others = [], []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_plain_name(key)) if len(key) <= _MAX_NAME else None
        if key.startswith(OTHER_PARTS):
            others.append(key)
        elif match is None:
            unknown.append(key)
        else:
            part = next(name for name in _PARTS if match[name])
            if part in modules.setdefault(match[1], {}):
                raise CheckpointError(f"{source} holds the {part} of {match[1]} twice, under two names")
            modules[match[1]][part] = tensor
    return modules, unknown, others


def _check_values(module: str, parts: Mapping[str, np.ndarray]) -> None:
    for part, tensor in parts.items():
        if tensor.dtype.kind != "f" and part != "alpha":
            raise CheckpointError(f"{module} has a {part} of {tensor.dtype}; expected floats")
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{module} has a {part} that is not finite")
    if "alpha" in parts and parts["alpha"].size != 1:
        raise CheckpointError(f"{module} has an alpha of shape {parts['alpha'].shape}; expected a number")


def _check_pair(module: str, parts: Mapping[str, np.ndarray]) -> None:
    """Refuse the parts of a LoRA or DoRA that are not complete, or do not fit each other."""
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise CheckpointError(f"{module} has no {' and no '.join(missing)}; half of it is missing")
    down, up = parts["down"], parts["up"]
    if down.ndim not in (2, 4) or up.ndim != down.ndim or down.shape[0] != up.shape[1] or not down.size:
        raise CheckpointError(
            f"{module} has factors of shapes {down.shape} and {up.shape}; expected (r, in) and (out, r)"
        )
    magnitude, rows = parts.get("magnitude", np.zeros(len(up))), len(up)
    if magnitude.size != rows or not (magnitude.shape[:1] == (rows,) or magnitude.ndim == 4):
        raise CheckpointError(
            f"{module} has a magnitude of shape {magnitude.shape}; expected {rows} numbers, one for each output"
        )


def _delta(module: str, parts: Mapping[str, np.ndarray]) -> tuple[np.ndarray, int | None]:
    """Return the update of a LoKr or LoHa, (out, in) float32, without its scale, and its rank.

    LoKr is the Kronecker product of W1 and W2, each whole or a product of two factors; LoHa the elementwise product of
    W1 = W1a W1b and W2 = W2a W2b (Yeh et al. 2023, "Navigating Text-To-Image Customization", section 3; FedPara,
    Hyeon-Woo et al. 2021, proposition 1). The scale is alpha / rank, and 1 for a LoKr of two whole factors.
    """
    family = next(part for part in parts if part in _FACTORS)[:4]
    names = [f"{family}_w{number}{side}" for number in "12" for side in ("", "_a", "_b")]
    first, second = (_factor(parts, f"{family}_w{number}") for number in "12")
    fits = first is not None and second is not None and set(parts) <= {*names, "alpha"}
    if fits:
        fits = first.shape == second.shape if family == "hada" else first.size * second.size <= _MAX_DELTA
    if not fits:
        shapes = ", ".join(f"{part} {tensor.shape}" for part, tensor in parts.items())
        raise CheckpointError(
            f"{module} has {shapes}; expected the factors w1 and w2 of a LoKr, or w1_a, w1_b, w2_a and w2_b of a LoHa, "
            "whole or as products that fit, and no dora_scale"
        )
    rank = next((len(parts[name]) for name in names if name.endswith("_b") and name in parts), None)
    return (first * second if family == "hada" else np.kron(first, second)).astype(np.float32), rank


def _factor(parts: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
    """Return W1 or W2 as a matrix (the axes of a kernel belong to the inputs); None if its parts do not fit."""
    whole, first, second = (parts.get(name + side) for side in ("", "_a", "_b"))
    if whole is not None and first is None and second is None and whole.ndim in (2, 4) and whole.size:
        return whole.astype(np.float64).reshape(len(whole), -1)
    if whole is not None or first is None or second is None or first.shape[1:] != second.shape[:1] or not second.size:
        return None
    second = second.astype(np.float64).reshape(len(second), -1)
    return first.astype(np.float64) @ second if len(first) * second.shape[1] <= _MAX_DELTA else None


# ---- writing


def write_lora(
    folder: str | Path,
    modules: Mapping[str, LoraModule],
    layout: str = "diffusers",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a LoRA whose modules have diffusers' names into ``folder``; returns the path of its weights.

    ``diffusers``: one file, with an alpha beside each module and PEFT's configuration in the metadata. ``peft``: a file
    and its adapter_config.json. ``config``: further keys of the configuration.
    """
    if layout not in LAYOUTS:
        raise PixArtNBError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    folder = Path(folder)
    if layout == "diffusers":
        tensors = {f"transformer.{name}": value for name, value in _tensors(modules, alpha=True).items()}
        values = {f"transformer.{key}": value for key, value in _described(modules, config or {}).items()}
        save_tensors(folder / DIFFUSERS_FILE, tensors, {"format": "pt", METADATA: json.dumps(values)})
        return folder / DIFFUSERS_FILE
    tensors = {f"base_model.model.{name}": value for name, value in _tensors(modules, alpha=False).items()}
    with atomic_write_together(folder / PEFT_FILE, folder / PEFT_CONFIG) as (weights, description):
        save_tensors(weights, tensors, {"format": "pt"})
        write_json(description, _described(modules, config or {}))
    return folder / PEFT_FILE


def _tensors(modules: Mapping[str, LoraModule], alpha: bool) -> dict[str, np.ndarray]:
    out = {}
    for name, module in modules.items():
        out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = module.down, module.up
        if module.magnitude is not None:
            axes = (1, -1, 1, 1) if module.down.ndim == 4 else (-1,)
            out[f"{name}.lora_magnitude_vector"] = module.magnitude.reshape(axes)
        if alpha:
            out[f"{name}.alpha"] = np.array(alpha_of(module.scale, module.rank), np.float32)
    return out


def _described(modules: Mapping[str, LoraModule], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's configuration of modules."""
    sizes = {name: (module.scale, module.rank) for name, module in modules.items()}
    return peft_config(sizes, any(module.magnitude is not None for module in modules.values()), config)
