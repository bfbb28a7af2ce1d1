"""Options of a command, generated from the fields of a configuration, and the device that a command opens.

typer rather than the command line of pydantic-settings: that one splits "a cat, 8k" into two prompts, and refuses
``--prompt a b``, ``--image_height`` beside ``--image-height``, and ``--imagegrid`` without a value.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typer.core import TyperArgument, TyperCommand

from pixart_nb.config.keys import IGNORED_KEYS, RENAMED_KEYS, ModelKeys, TrainConfig

_BOOLEAN = "true|false"
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_MOST_CHOICES = 4


class Command(TyperCommand):
    """A command whose options take underscores or hyphens, several values for a list, and none for a boolean."""

    def __init__(self, *words: Any, **options: Any):
        super().__init__(*words, **options)
        paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(self.help or ""))
        self.help = "\n\n".join(" ".join(text.split()) for text in paragraphs)  # rich keeps line breaks

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Bring ``args`` into the form that typer reads, and parse them."""
        if "--debug" in args:
            ctx.meta["debug"] = True
            args = [word for word in args if word != "--debug"]
        return super().parse_args(ctx, self._expanded(args))

    @property
    def takes_arguments(self) -> bool:
        """True if words that belong to no option are allowed."""
        return any(isinstance(parameter, TyperArgument) for parameter in self.params)

    def _expanded(self, args: list[str]) -> list[str]:
        options = {name: option for option in self.params for name in option.opts}
        words, rest = [], list(args)
        while rest:
            name, equals, value = rest.pop(0).partition("=")
            if name == "--":
                return [*words, name, *rest]
            if not name.startswith("-"):
                words.append(name + equals + value)
                continue
            name = name.replace("_", "-")
            option = options.get(name) or options.get(f"--{name.removeprefix('--no-')}")
            if option is None:
                words.append(name + equals + value)
            elif option.metavar == _BOOLEAN or getattr(option, "is_flag", False):
                words += _boolean(name, option, [value] if equals else rest, self.takes_arguments)
            elif option.multiple:
                words += _several(name, [value] if equals else rest)
            else:
                words += [name, value] if equals else [name, *rest[:1]]
                rest = rest if equals else rest[1:]
        return words


def _boolean(name: str, option: Any, rest: list[str], arguments: bool) -> list[str]:
    """Words of a boolean option: ``--imagegrid``, ``--imagegrid True``, ``--no-imagegrid``."""
    if (
        option.metavar == _BOOLEAN
        and not arguments
        and rest
        and not rest[0].startswith("-")
        and rest[0].lower() not in _WORDS
    ):
        return [name, rest.pop(0)]  # its error message says what was expected
    on = _WORDS[rest.pop(0).lower()] if rest and rest[0].lower() in _WORDS else True
    if name not in option.opts:
        name, on = f"--{name.removeprefix('--no-')}", not on
    if option.metavar == _BOOLEAN:
        return [name, str(on).lower()]
    return [name] if on else option.secondary_opts[:1]


def _several(name: str, rest: list[str]) -> list[str]:
    """Words of a list: the option once for each of its values, of which there is at least one."""
    values = rest[:1]
    del rest[:1]
    while rest and (not rest[0].startswith("-") or _is_number(rest[0])):
        values.append(rest.pop(0))
    return [word for value in values for word in (name, value)] or [name]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def config_options(
    *models: type[BaseModel],
    only: Container[str] | None = None,
    without: Container[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Callable], Callable]:
    """Give a command an option for each field of ``models``: ``--image-height`` for ``image_height``.

    The command receives them as ``**options``, with None or an empty list for those that are not given. Its own options
    come first, then those of a model itself, then the inherited ones. ``only`` and ``without`` choose among the fields.
    ``defaults`` are values of the command, which its help shows in place of those of the fields.
    """
    fields: dict[str, FieldInfo] = {}
    for model in models:
        for name in sorted(model.model_fields, key=lambda name: name not in model.__annotations__):
            if (not only or name in only) and name not in without:
                fields.setdefault(name, model.model_fields[name])

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function, eval_str=True)
        parameters = [part for part in signature.parameters.values() if part.kind is not part.VAR_KEYWORD]
        parameters += [_parameter(name, field, defaults or {}) for name, field in fields.items()]
        mindone = () if only else (*IGNORED_KEYS, *RENAMED_KEYS)
        parameters += [_hidden(name, fields.get(RENAMED_KEYS.get(name))) for name in mindone if name not in fields]
        function.__signature__ = signature.replace(parameters=parameters)
        function.__annotations__ = {part.name: part.annotation for part in parameters}
        return function

    return decorate


def _parameter(name: str, field: FieldInfo, defaults: Mapping[str, Any]) -> inspect.Parameter:
    choices = [str(choice) for choice in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []
    several = _is_list(field.annotation)
    names = [f"--{name.replace('_', '-')}"] + (["-o"] if name == "output_path" else [])
    help_text = (field.description or "").replace("[", "\\[")
    help_text += f" One of: {', '.join(choices)}." if len(choices) > _MOST_CHOICES else ""
    option = typer.Option(
        *names,
        help=help_text + _default(defaults.get(name, field.get_default(call_default_factory=True))),
        metavar=_metavar(field.annotation, choices) + (" ..." if several else ""),
        show_default=False,
        rich_help_panel=(field.json_schema_extra or {}).get("panel"),
        autocompletion=lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)],
        parser=partial(_value, get_args(field.annotation)[0] if several else field.annotation),
    )
    annotation = Annotated[list[Any] | None if several else Any, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _hidden(name: str, field: FieldInfo | None) -> inspect.Parameter:
    """Option for a key of mindone's that the configuration ignores with a line, or renames to that of ``field``."""
    option = typer.Option(
        f"--{name.replace('_', '-')}", hidden=True, parser=partial(_value, field.annotation if field else str)
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Any, option])


def _default(default: Any) -> str:
    if default is False or default in (None, "", PydanticUndefined) or isinstance(default, list):
        return ""
    return f" [dim]\\[default: {'true' if default is True else default}][/dim]"


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(get_origin(part) is list for part in get_args(annotation))


def _metavar(annotation: Any, choices: list[str]) -> str:
    if choices:
        return "|".join(filter(None, choices)) if len(choices) <= _MOST_CHOICES else "name"
    if annotation is bool:
        return _BOOLEAN
    part = str(annotation)
    return "integer" if "int" in part else "number" if "float" in part else "text"


def _value(annotation: Any, text: str) -> Any:
    """Value of an option as the configuration takes it; a text that cannot be read stays for its error message."""
    if get_origin(annotation) is Literal:
        return next((choice for choice in get_args(annotation) if str(choice) == text), text)
    try:
        return TypeAdapter(annotation).validate_python(text)
    except ValidationError:
        return text


def start(settings: ModelKeys | None = None) -> None:
    """Open the device, and print it with the dtype and MindSpore's version on one line of stderr.

    Raises ``PixArtNBError`` for a device that cannot be opened, that is not supported, or that differs from
    ``device_target``.
    """
    target = settings.device_target if settings else ""
    if target:
        os.environ.setdefault("PIXART_NB_DEVICE", target)
    from pixart_nb.core import backend

    backend.check_device(target)
    backend.set_graph_mode(settings is not None and settings.mode == 0)
    cann, accepted = backend.cann_versions()
    if backend.on_ascend() and cann and accepted and cann not in accepted:
        expected = f"MindSpore {backend.ms.__version__} accepts {', '.join(accepted)}"
        warnings.warn(f"CANN is {cann}, and {expected}; install one of them", stacklevel=2)
    parts = f"Device: {backend.device_name()}", _dtype(settings), f"MindSpore {backend.ms.__version__}"
    typer.echo(", ".join(filter(None, parts)), err=True)


def _dtype(settings: ModelKeys | None) -> str:
    """Return the dtype and, on a CPU, what is computed in where it differs, or what would be faster."""
    from pixart_nb.core import backend

    if settings is None or settings.dtype == "fp32" or backend.on_ascend():
        return settings.dtype if settings else ""
    if isinstance(settings, TrainConfig):
        return "fp16 (slow on a CPU; fp32 is faster)" if settings.dtype == "fp16" else "bf16 computed in fp32"
    from pixart_nb.core.models import low_precision

    warnings.filterwarnings("ignore", low_precision.REPLACED)  # this line says it
    chosen, reason = low_precision.inference_dtype_name(settings.dtype), low_precision.unsupported()
    if chosen == settings.dtype:
        return chosen
    return f"{settings.dtype} computed in {chosen}" + (f" ({reason})" if reason else "")
