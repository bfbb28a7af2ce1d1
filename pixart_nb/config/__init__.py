"""Configuration files: YAML with the keys of ``config.keys``, for ``pixart-nb -c`` and for papermill at once."""

from __future__ import annotations

import ast
import json
import os
import re
import reprlib
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pixart_nb.config.keys import GUIDANCE_SCALE as GUIDANCE_SCALE
from pixart_nb.config.keys import (
    IGNORED_KEYS,
    RENAMED_KEYS,
    ROOTS,
    InferenceConfig,
    ModelKeys,
    TrainConfig,
    unused_options,
)
from pixart_nb.config.keys import MOST_SIDE as MOST_SIDE
from pixart_nb.config.keys import NEEDS as NEEDS
from pixart_nb.config.keys import SAMPLING_METHOD as SAMPLING_METHOD
from pixart_nb.config.keys import SAMPLING_METHODS as SAMPLING_METHODS
from pixart_nb.config.keys import SAMPLING_STEPS as SAMPLING_STEPS
from pixart_nb.config.keys import bundled_path as bundled_path
from pixart_nb.config.keys import training_identity as training_identity
from pixart_nb.core.errors import PixArtNBError, did_you_mean

CONFIG_TYPES: dict[str, type[ModelKeys]] = {"inference": InferenceConfig, "train": TrainConfig}
_COMMANDS = {"inference": "sample", "train": "train"}
_MOST_BYTES = 1024 * 1024
#: First line of the cell that papermill inserts.
_INJECTED = "# Parameters"
COMMAND_LINE = "command line"
#: File that commands read when none is given. It describes the bundled model.
INFERENCE_CONFIG = Path("configs/inference/tiny.yaml")
#: Width of the captions of published models, and their sizes in pixels by a part of their names.
_CAPTION_CHANNELS = 4096
_PUBLISHED_SIZES = {"256": 256, "512": 512, "1024": 1024, "2K": 2048}


class ConfigError(PixArtNBError):
    """A configuration that cannot be used. The message names the file, the key and what was expected."""


def load_config(
    path: str | os.PathLike[str], config_type: str = "inference", options: Mapping[str, Any] | None = None
) -> Any:
    """Read a YAML file, complete it with ``options`` of the command line, and validate both together.

    ``path`` may name a file that comes with the package (``configs/inference/tiny.yaml``); ``config_type`` is
    ``inference`` or ``train``. With that file and a published model among the options, size and guidance are the
    model's. Raises ``ConfigError``.
    """
    values = read_yaml(path)
    if Path(path) == INFERENCE_CONFIG and options and options.get("model"):
        values = _for_model(values, str(options["model"]))
    config = check_config(values, config_type, str(path), options)
    for sentence in unused_options(config, [key for key, value in (options or {}).items() if value not in (None, [])]):
        warnings.warn(sentence, stacklevel=2)
    return config


def check_config(
    values: Mapping[str, Any],
    config_type: str = "inference",
    source: str = "parameters",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Validate values; ``options`` replace them, and ``source`` names in an error where the other values came from.

    Options that are None or an empty list are not given.

    >>> check_config({"model": "m", "image_height": 64, "image_width": 64, "prompt": ["a"]}).sampling_steps
    20
    """
    if config_type not in CONFIG_TYPES:
        raise ConfigError(f"configuration type {config_type!r} is not known; expected one of {', '.join(CONFIG_TYPES)}")
    options = {key: value for key, value in (options or {}).items() if value is not None and value != []}
    options = _translated(options)
    values = _replaced(_translated(values), options)
    try:
        return CONFIG_TYPES[config_type].model_validate(values)
    except ValidationError as error:
        problems = error.errors()
    unknown = [str(problem["loc"][0]) for problem in problems if problem["type"] == "extra_forbidden"]
    _refuse_other_type(unknown, config_type, source)
    described: dict[str, list[str]] = {}
    for problem in problems:
        origin = COMMAND_LINE if problem["loc"] and problem["loc"][0] in options else source
        if options and not problem["loc"]:  # several keys together, which may come from both
            origin = f"{source} with the {COMMAND_LINE}"
        described.setdefault(origin, []).append(_problem(problem, list(CONFIG_TYPES[config_type].model_fields)))
    raise ConfigError("; ".join(f"{origin}: {'; '.join(dict.fromkeys(texts))}" for origin, texts in described.items()))


def _translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename mindone's keys to those of this package, and leave out with one line those without meaning here."""
    values = {RENAMED_KEYS.get(key, key): value for key, value in values.items()}
    ignored = [key for key in values if key in IGNORED_KEYS]
    if ignored:
        reasons = [f"{key} ({IGNORED_KEYS[key]})" for key in ignored]
        print(f"Ignored, without meaning here: {', '.join(reasons)}", file=sys.stderr)
    return {key: value for key, value in values.items() if key not in ignored}


def _replaced(values: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with ``options`` in their place. What an option takes the place of leaves too."""
    takes_place = {
        "prompt": ["prompt_path"],
        "prompt_path": ["prompt"],
        "model": ["checkpoint", *ROOTS, "sd_scale_factor"],
        "epochs": ["steps"],
        "ckpt_save_interval": ["ckpt_save_steps"],
        "visualize_interval": ["visualize_steps"],
    }
    replaced = {other for key in options for other in takes_place.get(key, ())} - set(options)
    return {key: value for key, value in values.items() if key not in replaced} | dict(options)


def _for_model(values: dict[str, Any], model: str) -> dict[str, Any]:
    """Return the values of ``INFERENCE_CONFIG`` for a published model: its own size, and the default guidance."""
    try:
        described = json.loads((bundled_path(model) / "transformer" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of the hub, or of another layout
        described = None
    described = described if isinstance(described, dict) else {}
    if described.get("caption_channels", _CAPTION_CHANNELS) != _CAPTION_CHANNELS:
        return values
    named = re.search("|".join(_PUBLISHED_SIZES), Path(model).name)
    latent = described.get("sample_size")
    side = 8 * latent if isinstance(latent, int) else _PUBLISHED_SIZES[named[0] if named else "1024"]
    return {k: v for k, v in values.items() if k != "guidance_scale"} | {"image_height": side, "image_width": side}


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the keys and values of a YAML file as they stand there. Raises ``ConfigError``."""
    try:
        with bundled_path(path).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a YAML file") from error
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: larger than {_MOST_BYTES} bytes; expected a configuration file")
    try:
        values = yaml.load(content, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {_shown(values)}; expected lines of the form 'key: value'")
    return values


class _Loader(yaml.SafeLoader):
    """YAML in which no key is given twice and no alias stands for a collection, which could expand without limit."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            if not isinstance(self.anchors.get(event.anchor), yaml.ScalarNode):
                raise yaml.YAMLError(f"the alias *{event.anchor} stands for a list or a mapping; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"the key {twice!r} is given twice")
        return super().construct_mapping(node, deep)


# ---- messages


def _refuse_other_type(unknown: Iterable[str], config_type: str, source: str) -> None:
    """Name a training file that is given for sampling, and the reverse."""
    for other, model in CONFIG_TYPES.items():
        keys = [key for key in unknown if key in model.model_fields]
        if other != config_type and len(keys) >= 2:
            raise ConfigError(
                f"{source}: is a configuration of `pixart-nb {_COMMANDS[other]}` ({', '.join(keys[:3])}); "
                f"expected one of `pixart-nb {_COMMANDS[config_type]}`"
            )


#: Words of pydantic's messages -> those of this package, replaced in this order.
_WORDS = {
    "Input should be ": "expected ",
    "Input should ": "expected to ",
    "expected greater": "expected a number greater",
    "expected less": "expected a number less",
    "String should have ": "expected ",
    "List should have ": "expected ",
    " after validation": "",
    "Value error, ": "",
    "Keys should be strings": "expected a text as the key",
    "a valid integer": "an integer",
    "a valid boolean": "true or false",
    "a valid ": "a ",
}


def _problem(error: Mapping[str, Any], keys: list[str]) -> str:
    loc = [part for part in error["loc"] if part not in ("str", "list[str]")]  # branches of a union
    key = ".".join(str(part) for part in loc)
    if error["type"] == "value_error" and not loc:  # several keys together
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {closest(key, keys)}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    if loc != list(error["loc"]):
        return f"{key}: given {_shown(error['input'])}; expected a string or a list of strings"
    expected = error["msg"]
    for pydantic, words in _WORDS.items():
        expected = expected.replace(pydantic, words)
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        choices = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        expected += did_you_mean(error["input"], choices)
    return f"{key}: given {_shown(error['input'])}; {expected}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"


def closest(name: str, names: Iterable[str]) -> str:
    """Return the question for the closest valid name, or the list of all."""
    names = list(names)
    return did_you_mean(name, names).removeprefix("; ") or f"valid: {', '.join(names)}"


# ---- notebooks


def project_folder(start: str | os.PathLike[str] = ".") -> Path:
    """Return the folder that relative paths of a notebook refer to: that of pyproject.toml at or above ``start``.

    Without one it is ``start`` itself.
    """
    start = Path(start).resolve()
    return next((folder for folder in (start, *start.parents) if (folder / "pyproject.toml").is_file()), start)


def notebook_config(namespace: Mapping[str, Any], **values: Any) -> InferenceConfig:
    """Return the sampling configuration that a notebook's parameters describe; call it with ``globals()``.

    ``values`` are keys that the notebook sets by itself. Raises ``ConfigError``, as ``check_parameters`` does, and if
    the parameters are not there because their cell did not run.
    """
    check_parameters(namespace)
    parameters = {name: namespace[name] for name in InferenceConfig.model_fields if name in namespace}
    required = {name for name, field in InferenceConfig.model_fields.items() if field.is_required()}
    if not required & {*parameters, *values}:
        names = ", ".join(sorted(required))
        raise ConfigError(f"the parameters are not set ({names}, ...): run the cell tagged 'parameters' first")
    return check_config(parameters | values)


def check_parameters(namespace: Mapping[str, Any]) -> None:
    """Refuse parameters that papermill inserted but the notebook does not declare; papermill itself only warns.

    papermill inserts its cell right after the one tagged ``parameters``. IPython keeps the source of every cell that
    ran in the variable ``In``, so the names that both cells assign can be compared. Raises ``ConfigError``.
    """
    cells = [source for source in namespace.get("In", ()) if source.strip()]
    injected = [number for number, source in enumerate(cells) if source.lstrip().startswith(_INJECTED)]
    if not injected:
        return
    declared = _assigned(cells[: injected[-1]])
    for name in _assigned([cells[injected[-1]]]):
        if name not in declared:
            raise ConfigError(f"parameter {name!r} is not declared by this notebook; {closest(name, declared)}")


def _assigned(cells: Iterable[str]) -> list[str]:
    """Names that the statements of cells assign, in order."""
    names: list[str] = []
    for source in cells:
        code = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
        for node in ast.parse(code).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names
