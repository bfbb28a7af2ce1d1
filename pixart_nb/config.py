"""Configuration files: at once parameters of a notebook (papermill) and what ``pixart-nb sample -c`` reads."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.schedulers import SAMPLING_METHODS
from pixart_nb.train_config import TrainConfig

Text = Annotated[str, Field(min_length=1)]
#: Names of the solvers that ``sampling_method`` takes.
METHODS = tuple(SAMPLING_METHODS)


class ConfigError(PixArtNBError):
    """A configuration that cannot be used; the message names the file, the key and what was expected."""


class InferenceConfig(BaseModel):
    """What to draw and how: the keys of ``configs/inference/*.yaml``, named as in mindone's example.

    The weights come from ``model``, or part by part from ``checkpoint`` and the three roots; a part that is given
    replaces that of ``model``. An empty text, an empty list or a zero means: not given.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str = Field("", description="folder in the diffusers layout, or the id of a model on a hub")
    checkpoint: str = Field("", description="the transformer alone: .pth, .ckpt, .safetensors or a folder")
    vae_root: str = Field("", description="folder of the autoencoder")
    text_encoder_root: str = Field("", description="folder of the T5 encoder")
    tokenizer_root: str = Field("", description="folder of the tokenizer")
    sample_size: int = Field(0, ge=0, description="latent cells a side that a checkpoint was trained at")
    t5_max_length: Literal[120, 300] = Field(
        300, description="tokens of a prompt: 120 in alpha, 300 in sigma"
    )
    sd_scale_factor: float = Field(
        0.0, ge=0, description="scaling factor of the latents, if not the VAE's own"
    )
    kv_compress: bool = Field(False, description="whether the checkpoint compresses keys and values")
    kv_compress_sampling: Literal["conv", "ave", "uniform", "mean"] = Field("conv", description="operator")
    kv_compress_scale_factor: int = Field(1, ge=1, description="shrinking in each direction")
    kv_compress_layer: list[int] = Field([], description="layers that compress, counted from 0")
    image_height: int = Field(gt=0, description="image pixels")
    image_width: int = Field(gt=0, description="image pixels")
    use_resolution_binning: bool = Field(True, description="draw at the nearest published size, cut to yours")
    prompt: list[Text] = Field(
        [], description="what to draw, one entry for each picture or group of pictures"
    )
    prompt_path: str = Field("", description="text file with a prompt on each line, in place of prompt")
    negative_prompt: str = Field("", description="what to steer away from")
    sampling_method: Literal[METHODS] = Field("dpm++", description="the solver")
    sampling_steps: int = Field(20, ge=1, description="steps of the solver for a picture")
    guidance_scale: float = Field(4.5, ge=1, allow_inf_nan=False, description="1 switches guidance off")
    seed: int = Field(0, ge=0, description="the same seed draws the same pictures")
    first_picture: int = Field(0, ge=0, description="number of the first picture's random stream of the seed")
    dtype: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="what the networks compute in")
    batch_size: int = Field(8, ge=1, description="pictures drawn at once")
    imagegrid: bool = Field(False, description="one file for the pictures of a prompt, in a grid")
    nrows: int = Field(1, ge=1, description="rows of that grid")
    ncols: int = Field(1, ge=1, description="columns of that grid; a prompt has rows x columns pictures")
    use_parallel: bool = Field(False, description="under msrun: the prompts are divided among the workers")
    staged: str = Field("", description="folder for the state of a run in stages, which goes on when stopped")
    enlarge: str = Field(
        "", description="such a folder of the same prompts, smaller, to begin with its pictures"
    )
    strength: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of the steps that a picture is drawn anew with when it is enlarged",
    )
    t5_load: Literal["whole", "stream", "int8"] = Field(
        "whole", description="T5 whole in memory, one layer at a time, or in eight bits"
    )
    tile_size: int = Field(0, ge=0, multiple_of=8, description="pixels of the tiles to decode by; 0 is whole")
    memory_limit: float = Field(
        0.0, ge=0, description="GB that a run may take; 0 is what the machine has free"
    )
    output_path: Text = Field("outputs/sample", description="where pictures and numbers are written")

    @model_validator(mode="after")
    def _enough_to_draw(self) -> InferenceConfig:
        if bool(self.prompt) == bool(self.prompt_path):
            raise PixArtNBError("expected either prompt, a list of at least one text, or prompt_path")
        roots = ("checkpoint", "vae_root", "text_encoder_root", "tokenizer_root")
        missing = [name for name in roots if not getattr(self, name)]
        if not self.model and missing:
            raise PixArtNBError(
                f"expected model, or all of {', '.join(roots)}; not given: {', '.join(missing)}"
            )
        if self.kv_compress and not self.kv_compress_layer:
            raise PixArtNBError("kv_compress is on, so expected at least one layer in kv_compress_layer")
        if self.enlarge and not self.staged:
            raise PixArtNBError(
                "enlarge is given, so expected staged, the folder to draw the larger pictures in"
            )
        unit = 1 if self.use_resolution_binning else 16
        if self.image_height % unit or self.image_width % unit:
            raise PixArtNBError(
                f"image_height and image_width are {self.image_height} and {self.image_width}; expected multiples of "
                "16, or use_resolution_binning with a model that has published sizes"
            )
        return self


KINDS: dict[str, type[BaseModel]] = {"inference": InferenceConfig, "train": TrainConfig}


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

    >>> check_config({"model": "m", "image_height": 64, "image_width": 64, "prompt": ["a"]}).sampling_steps
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
    if error["type"] == "value_error":  # of the configuration as a whole
        return str(error["ctx"]["error"])
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
