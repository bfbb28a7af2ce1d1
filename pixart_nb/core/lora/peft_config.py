"""adapter_config.json of PEFT: validated where it is read, and written."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pixart_nb.core.io import CheckpointError, load_metadata, read_json
from pixart_nb.core.lora.config import check_pattern, pattern_value

PEFT_CONFIG = "adapter_config.json"
#: Key of the metadata under which diffusers stores the configuration of a LoRA, as JSON.
METADATA = "lora_adapter_metadata"
#: Initial values that leave the weights of the model as they are.
_INITIAL = (None, True, False, "gaussian", "kaiming", "eva", "orthogonal")

_Alpha = Annotated[float, Field(gt=-1e30, lt=1e30, allow_inf_nan=False)]
_Rank = Annotated[int, Field(ge=1)]
_Pattern = Annotated[str, AfterValidator(check_pattern)]
_Nothing = Annotated[list, Field(max_length=0)] | None


class PeftConfig(BaseModel):
    """adapter_config.json of PEFT: alphas, and settings with values that a plain LoRA, DoRA, LoHa or LoKr has."""

    model_config = ConfigDict(strict=True)

    peft_type: Literal["LORA", "LOHA", "LOKR"] = "LORA"
    bias: Literal["none"] = "none"
    modules_to_save: _Nothing = None
    layer_replication: _Nothing = None
    fan_in_fan_out: Literal[False] | None = None
    lora_bias: Literal[False] | None = None
    use_qalora: Literal[False] | None = None
    init_lora_weights: Any = None
    lora_alpha: _Alpha | None = None
    alpha_pattern: dict[_Pattern, _Alpha] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    r: _Rank | None = None  # this and the next two of LoHa and LoKr, whose factors do not always show their rank
    alpha: _Alpha | None = None
    rank_pattern: dict[_Pattern, _Rank] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str) -> PeftConfig:
        """Validate the values of a file, which ``source`` names in messages. Raises ``CheckpointError``."""
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            raise CheckpointError(f"{source}: {first['loc'][0]} is {first['input']!r:.60}; {first['msg']}") from error
        initial = config.init_lora_weights
        if not isinstance(initial, bool | str | None) or initial not in _INITIAL:
            raise CheckpointError(
                f"{source}: init_lora_weights is {initial!r:.60}, with which PEFT changes the model's weights too; "
                "save the adapter with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
            )
        return config

    @classmethod
    def beside(cls, path: Path) -> PeftConfig:
        """Read the configuration beside a file of weights, or in its metadata; without any, it is empty."""
        if path.stem == "adapter_model" and (path.parent / PEFT_CONFIG).is_file():
            return cls.of(read_json(path.parent / PEFT_CONFIG), str(path.parent / PEFT_CONFIG))
        text = load_metadata(path).get(METADATA) if path.suffix == ".safetensors" else None
        if not text:
            return cls()
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: its metadata {METADATA} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: its metadata {METADATA} is {content!r:.60}; expected an object")
        values = {str(name).removeprefix("transformer."): value for name, value in content.items()}
        return cls.of(values, f"the metadata of {path}")

    def scale(self, name: str, rank: int, own: float | None) -> float | None:
        """Return alpha / r of a module; an alpha of its own, beside its weights, is preferred. None without any."""
        if self.peft_type != "LORA" and self.alpha is not None:
            alpha = pattern_value(self.alpha_pattern or {}, name, self.alpha)
            return float(alpha) / pattern_value(self.rank_pattern or {}, name, self.r or 8)
        alpha = own if own is not None else pattern_value(self.alpha_pattern or {}, name, self.lora_alpha)
        if alpha is None:
            return None
        return float(alpha) / (math.sqrt(rank) if self.use_rslora and own is None else rank)


def peft_config(modules: Mapping[str, tuple[float, int]], use_dora: bool, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return adapter_config.json of modules, name: (scale, rank); other values than the most frequent are patterns."""
    rslora = bool(config.get("use_rslora"))
    ranks = {name: rank for name, (_, rank) in modules.items()}
    alphas = {name: alpha_of(scale, rank, rslora) for name, (scale, rank) in modules.items()}
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
        "use_dora": use_dora,
        "target_modules": sorted(modules),
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "modules_to_save": None,
    }


def alpha_of(scale: float, rank: int, rslora: bool = False) -> float | int:
    """Return the alpha of a scale, without the last digits, which the division has rounded."""
    alpha = float(f"{scale * (math.sqrt(rank) if rslora else rank):.12g}")
    return int(alpha) if alpha.is_integer() else alpha
