"""Options of a command from the keys of a configuration: one for each, named and described alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo


class Switch(StrEnum):
    """On or off, said as mindone's options say it."""

    true = "true"
    false = "false"


def with_key_options(model: type[BaseModel]) -> Callable[[Callable], Callable]:
    """Give a command the option ``--start-learning-rate`` for the key ``start_learning_rate``, and so on.

    The command gets them as ``given``, a mapping of what was given; its own parameters come first.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function, eval_str=True)
        own = [p for name, p in signature.parameters.items() if name != "given"]
        keys = [_parameter(name, field) for name, field in model.model_fields.items()]

        def command(**values: Any) -> Any:
            mine = {p.name: values.pop(p.name) for p in own}
            return function(**mine, given={key: v for key, v in map(_plain, values.items()) if v is not None})

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = signature.replace(parameters=[*own, *keys])
        command.__annotations__ = {p.name: p.annotation for p in (*own, *keys)}
        return command

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    panel = (field.json_schema_extra or {}).get("panel")
    option = typer.Option(
        f"--{name.replace('_', '-')}", help=_help(field), rich_help_panel=panel, case_sensitive=False
    )
    annotation = Annotated[_kind(name, field.annotation) | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(field: FieldInfo) -> str:
    words = field.description or ""
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def _kind(name: str, annotation: Any) -> type | UnionType:
    """What typer reads a key of this kind as."""
    if isinstance(annotation, UnionType):
        return str
    if annotation is bool:
        return Switch
    if get_origin(annotation) is Literal:
        values = get_args(annotation)
        if all(isinstance(value, int) for value in values):
            return int
        return StrEnum(name, {str(value) or "none": str(value) for value in values})
    if get_origin(annotation) is list:
        return list[_kind(name, get_args(annotation)[0])]
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[0]
    return annotation


def _plain(item: tuple[str, Any]) -> tuple[str, Any]:
    """A value as the configuration takes it; an option that was not given is None, or an empty list."""
    key, value = item
    if isinstance(value, Switch):
        return key, value is Switch.true
    if isinstance(value, StrEnum):
        return key, value.value
    return key, value if value != [] else None
