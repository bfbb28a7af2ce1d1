"""Configuration files: at once parameters of a notebook (papermill) and what ``pixart-nb sample -c`` reads."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ImageSide = Annotated[int, Field(gt=0, multiple_of=16)]
Text = Annotated[str, Field(min_length=1)]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file, the key and what was expected."""


class InferenceConfig(BaseModel):
    """What to draw and how: the keys of ``configs/inference/*.yaml``, named as in mindone's example."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: Text = Field(description="folder in the diffusers layout, or the id of a model on a hub")
    image_height: ImageSide = Field(description="image pixels, a multiple of 16")
    image_width: ImageSide = Field(description="image pixels, a multiple of 16")
    prompts: list[Text] = Field(min_length=1, description="one picture for each")
    sampling_method: Literal["dpm++"] = Field("dpm++", description="the solver: DPM-Solver++ (2M)")
    sampling_steps: int = Field(20, ge=1, description="steps of the solver for a picture")
    guidance_scale: float = Field(4.5, ge=1, allow_inf_nan=False, description="1 switches guidance off")
    negative_prompt: str = Field("", description="what to steer away from")
    seed: int = Field(0, ge=0, description="the same seed draws the same pictures")
    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="what the networks compute in")
    output_dir: Text = Field("outputs/sample", description="where pictures and numbers are written")


KINDS: dict[str, type[BaseModel]] = {"inference": InferenceConfig}


def load_config(path: str | os.PathLike[str], kind: str = "inference") -> Any:
    """Read and validate a YAML file as a configuration of ``kind`` (a key of ``KINDS``).

    Raises:
        ConfigError: the file is missing, is not YAML, or has an unknown key, a wrong type or a wrong value.
    """
    return check_config(read_yaml(path), kind, str(path))


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys and values of a YAML file, as they stand there; ``ConfigError`` if it has none."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {_given(values)}; expected lines of the form 'key: value'")
    return values


def check_config(values: Mapping[str, Any], kind: str = "inference", source: str = "parameters") -> Any:
    """Validate values given as a mapping; ``source`` says in an error where they came from.

    >>> check_config({"model": "m", "image_height": 64, "image_width": 64, "prompts": ["a"]}).sampling_steps
    20
    """
    if kind not in KINDS:
        raise ConfigError(f"configuration kind {kind!r} is not known; expected one of {', '.join(KINDS)}")
    try:
        return KINDS[kind].model_validate(dict(values))
    except ValidationError as error:
        known = list(KINDS[kind].model_fields)
        problems = [_problem(dict(part), known) for part in error.errors()]
        raise ConfigError(f"{source}: {'; '.join(problems)}") from None


def override(config: Any, kind: str = "inference", **values: Any) -> Any:
    """The configuration with ``values`` in place of its own, validated again; a None leaves the key as it is."""
    given = {key: value for key, value in values.items() if value is not None}
    return check_config(config.model_dump() | given, kind, "command line")


def project_folder(start: str | os.PathLike[str] = ".") -> Path:
    """The folder that holds pyproject.toml, at ``start`` or above it; ``start`` itself if there is none.

    Paths in configuration files are relative to it, from whichever folder a notebook is opened.
    """
    start = Path(start).resolve()
    return next((place for place in (start, *start.parents) if (place / "pyproject.toml").is_file()), start)


def _problem(error: dict[str, Any], known: list[str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest(key, known)}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    wanted = error["msg"].replace("Input should be ", "expected ").replace("Input should ", "expected to ")
    return f"{key}: given {_given(error['input'])}; {wanted}"


def _given(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def _nearest(key: str, known: list[str]) -> str:
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"known keys: {', '.join(known)}"
