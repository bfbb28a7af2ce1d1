"""LoRA files: read in the layouts of PEFT, diffusers and kohya's scripts; written in the first two. No network needed.

A module is one linear layer under the name that diffusers gives it, or the one that the official code does.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.checkpoints.files import ENDINGS, read_tensors
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import (
    CheckpointError,
    atomic_write_together,
    load_metadata,
    read_json,
    save_tensors,
    write_json,
)

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYOUTS = ("diffusers", "peft")
#: Where diffusers keeps the configuration of a LoRA, as JSON, in the metadata of its file.
METADATA = "lora_adapter_metadata"
#: Before the module's name; the longest that fits is taken off.
PREFIXES = (
    "base_model.model.",
    "unet.base_model.model.",
    "transformer.",
    "diffusion_model.",
    "lora_transformer_",
    "lora_unet_",
)
_PARTS = {
    "down": r"\.(?:lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight",
    "up": r"\.(?:lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight",
    "alpha": r"\.alpha",
    "magnitude": r"\.(?:lora_magnitude_vector(?:\.\w+)??(?:\.weight)?|dora_scale)",
}
_KEY = re.compile("(.+?)(?:" + "|".join(f"(?P<{part}>{ending})" for part, ending in _PARTS.items()) + ")")


@dataclass(frozen=True)
class LoraModule:
    """What a LoRA does to one layer: ``down`` (r, in, ...), ``up`` (out, r, ...), and DoRA's ``magnitude`` (out,).

    The change of the weight is ``scale * up @ down``. A patch embedding's parts have the axes of a convolution.
    """

    down: np.ndarray
    up: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        """The r of the two factors."""
        return len(self.down)


@dataclass(frozen=True)
class LoraFile:
    """The modules of a LoRA; ``source`` is for messages."""

    modules: dict[str, LoraModule]
    source: str = "the LoRA"


def read_lora(source: str | Path | Mapping[str, Any], weight_name: str | None = None) -> LoraFile:
    """Read a LoRA: a file, a folder that holds one (``weight_name`` says which), or a mapping of tensors.

    Where no alpha is written down the scale is 1, with a warning, as in diffusers.

    Raises:
        CheckpointError: what is missing, damaged, or holds tensors that are no part of a LoRA of linear layers.
    """
    if isinstance(source, Mapping):
        tensors = {str(name): _array(value) for name, value in source.items()}
        return _lora_of(tensors, _Alphas(), "the given tensors")
    path = _weights_file(Path(source), weight_name)
    return _lora_of(read_tensors(path), _alphas_beside(path), str(path))


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.asnumpy() if hasattr(value, "asnumpy") else value)


def _weights_file(path: Path, weight_name: str | None) -> Path:
    if path.is_dir():
        known = [DIFFUSERS_FILE, PEFT_FILE, "pytorch_lora_weights.bin", "adapter_model.bin"]
        names = [weight_name] if weight_name else [name for name in known if (path / name).is_file()]
        names = names or sorted(part.name for part in path.glob("*.safetensors"))
        if not names or (len(names) > 1 and names[0] not in known):
            held = sorted(part.name for part in path.iterdir())[:10]
            raise CheckpointError(
                f"{path} holds {'several files' if names else 'no LoRA'}: {held}; expected {DIFFUSERS_FILE} or "
                f"{PEFT_FILE}, or the name of the file as weight_name"
            )
        path = path / names[0]
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; expected a LoRA's file or the folder that holds it. One on a hub has to be "
            "downloaded first."
        )
    if path.suffix not in ENDINGS:
        raise CheckpointError(f"{path}: unknown ending {path.suffix!r}; expected .safetensors or .bin")
    return path


# ---- alpha


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that fits a module: as in PEFT, a regular expression for the end of its name."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


@dataclass(frozen=True)
class _Alphas:
    """What a configuration beside the weights says of alpha; None says nothing."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    def scale(self, name: str, rank: int, own: float | None) -> float | None:
        """alpha / r of a module, whose own alpha, beside its weights, goes first; None where nobody says it."""
        alpha = own if own is not None else pattern_value(self.patterns, name, self.alpha)
        if alpha is None:
            return None
        return float(alpha) / (math.sqrt(rank) if self.use_rslora and own is None else rank)


def _alphas_beside(path: Path) -> _Alphas:
    if path.stem == "adapter_model" and (path.parent / PEFT_CONFIG).is_file():
        return _alphas_of(read_json(path.parent / PEFT_CONFIG), str(path.parent / PEFT_CONFIG))
    if path.suffix == ".safetensors":
        text = load_metadata(path).get(METADATA)
        if text:
            return _alphas_of(_unpacked(text, path), f"the metadata of {path}")
    return _Alphas()


def _unpacked(text: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata {METADATA} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: its metadata {METADATA} is {content!r:.60}; expected an object")
    return {str(name).removeprefix("transformer."): value for name, value in content.items()}


def _alphas_of(config: Mapping[str, Any], source: str) -> _Alphas:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(f"{source}: peft_type is {kind!r}; expected 'LORA'")
    for key, harmless in (("bias", "none"), ("modules_to_save", None), ("layer_replication", None)):
        if config.get(key, harmless) not in (harmless, []):
            raise CheckpointError(
                f"{source}: {key} is {config[key]!r}; this kit adapts linear layers alone, with {key} {harmless}"
            )
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise CheckpointError(
            f"{source}: alpha_pattern is {patterns!r}; expected names of modules with numbers"
        )
    for value in (alpha, *patterns.values()):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not number:
            raise CheckpointError(f"{source}: an alpha is {value!r}; expected a number")
    _check_patterns(patterns, source)
    return _Alphas(alpha, patterns, bool(config.get("use_rslora")), bool(config.get("use_dora")))


def _check_patterns(patterns: Mapping[str, Any], source: str) -> None:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{source}: {pattern!r} is no regular expression: {error}") from error


# ---- reading


def _plain(name: str) -> str:
    fitting = [prefix for prefix in PREFIXES if name.startswith(prefix)]
    return name.removeprefix(max(fitting, key=len, default=""))


def _lora_of(tensors: Mapping[str, np.ndarray], alphas: _Alphas, source: str) -> LoraFile:
    found: dict[str, dict[str, np.ndarray]] = {}
    strange = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_plain(key))
        if match:
            part = next(name for name in _PARTS if match[name])
            if part in found.setdefault(match[1], {}):
                raise CheckpointError(f"{source} holds the {part} of {match[1]} twice, under two names")
            found[match[1]][part] = tensor
        else:
            strange.append(key)
    if strange or not found:
        raise CheckpointError(
            f"{source} is no LoRA of linear layers: "
            + (f"{len(strange)} tensors are no part of one ({_some(strange)})" if strange else "it is empty")
            + "; expected pairs of lora_A.weight and lora_B.weight, or of lora_down.weight and lora_up.weight"
        )
    modules, silent = {}, []
    for name, parts in found.items():
        scale = alphas.scale(name, *_rank_and_alpha(name, parts, source))
        silent += [name] if scale is None else []
        modules[name] = _module(name, parts, 1.0 if scale is None else scale, source)
    if silent:
        warnings.warn(
            f"{source} says no alpha for {len(silent)} modules ({_some(silent)}); their scale is taken to be 1",
            stacklevel=3,
        )
    if alphas.use_dora and all(module.magnitude is None for module in modules.values()):
        raise CheckpointError(f"{source} is described as a DoRA, but holds no lora_magnitude_vector")
    return LoraFile(modules, source)


def _rank_and_alpha(name: str, parts: Mapping[str, np.ndarray], source: str) -> tuple[int, float | None]:
    """The rank of a module, whose parts are all there and fit each other, and the alpha beside its weights."""
    missing = [part for part in ("down", "up") if part not in parts]
    if missing:
        raise CheckpointError(f"{source}: {name} has no {' and no '.join(missing)}; half of it is missing")
    down, up = parts["down"], parts["up"]
    if down.ndim not in (2, 4) or up.ndim != down.ndim or down.shape[0] != up.shape[1] or not down.size:
        raise CheckpointError(
            f"{source}: {name} has factors of shapes {down.shape} and {up.shape}; expected (r, in) and (out, r)"
        )
    for part, tensor in parts.items():
        if tensor.dtype.kind != "f" and part != "alpha":
            raise CheckpointError(f"{source}: {name} has a {part} of {tensor.dtype}; expected floats")
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{source}: {name} has a {part} that is not finite")
    if "alpha" in parts and parts["alpha"].size != 1:
        raise CheckpointError(
            f"{source}: {name} has an alpha of shape {parts['alpha'].shape}; expected a number"
        )
    return len(down), float(parts["alpha"].reshape(())) if "alpha" in parts else None


def _module(name: str, parts: Mapping[str, np.ndarray], scale: float, source: str) -> LoraModule:
    magnitude = parts.get("magnitude")
    if magnitude is not None:
        rows = parts["up"].shape[0]
        if magnitude.size != rows or (magnitude.shape[:1] != (rows,) and magnitude.ndim != 4):
            raise CheckpointError(
                f"{source}: {name} has a magnitude of shape {magnitude.shape}; expected {rows} numbers, one for each "
                "output"
            )
        magnitude = np.array(magnitude, np.float32).reshape(rows)
    return LoraModule(
        np.array(parts["down"], np.float32), np.array(parts["up"], np.float32), scale, magnitude
    )


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# ---- writing


def write_lora(
    folder: str | Path,
    modules: Mapping[str, LoraModule],
    layout: str = "diffusers",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a LoRA whose modules have diffusers' names into ``folder``; the path of its weights.

    ``diffusers``: one file, with an alpha beside each module and PEFT's configuration in the metadata. ``peft``: a file
    and its adapter_config.json. The configuration has ``config`` too. Everything is written, or nothing.
    """
    if layout not in LAYOUTS:
        raise PixArtNBError(f"layout {layout!r} is not known; expected one of {', '.join(LAYOUTS)}")
    folder = Path(folder)
    if layout == "diffusers":
        tensors = {f"transformer.{name}": value for name, value in _tensors(modules, alpha=True).items()}
        told = {f"transformer.{key}": value for key, value in peft_config(modules, config or {}).items()}
        save_tensors(folder / DIFFUSERS_FILE, tensors, {"format": "pt", METADATA: json.dumps(told)})
        return folder / DIFFUSERS_FILE
    tensors = {f"base_model.model.{name}": value for name, value in _tensors(modules, alpha=False).items()}
    with atomic_write_together(folder / PEFT_FILE, folder / PEFT_CONFIG) as (weights, description):
        save_tensors(weights, tensors, {"format": "pt"})
        write_json(description, peft_config(modules, config or {}))
    return folder / PEFT_FILE


def _tensors(modules: Mapping[str, LoraModule], alpha: bool) -> dict[str, np.ndarray]:
    out = {}
    for name, module in modules.items():
        out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = module.down, module.up
        if module.magnitude is not None:
            axes = (1, -1, 1, 1) if module.down.ndim == 4 else (-1,)
            out[f"{name}.lora_magnitude_vector"] = module.magnitude.reshape(axes)
        if alpha:
            out[f"{name}.alpha"] = np.array(_alpha(module, False), np.float32)
    return out


def peft_config(modules: Mapping[str, LoraModule], config: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json of a LoRA. Ranks and alphas other than the most frequent ones are patterns."""
    rslora = bool(config.get("use_rslora"))
    ranks = {name: module.rank for name, module in modules.items()}
    alphas = {name: _alpha(module, rslora) for name, module in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": float(config.get("lora_dropout", 0.0)),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": rslora,
        "use_dora": any(module.magnitude is not None for module in modules.values()),
        "target_modules": sorted(modules),
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "modules_to_save": None,
    }


def _alpha(module: LoraModule, rslora: bool) -> float | int:
    """The alpha of which the scale was made, without the last digits, which the division has touched."""
    alpha = float(f"{module.scale * (math.sqrt(module.rank) if rslora else module.rank):.12g}")
    return int(alpha) if alpha.is_integer() else alpha
