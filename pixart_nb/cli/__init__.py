"""``pixart-nb``: the kit on the command line. MindSpore is imported only when a command runs."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import PurePath
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pixart_nb import __version__
from pixart_nb.cli.options import Command
from pixart_nb.core.errors import PixArtNBError

#: Module and function of each command -> panel of the help, in the order in which a user meets them.
PANELS = {
    "sample": "Generate images", "upscale": "Generate images", "plan": "Generate images",
    "dataset": "Train", "train": "Train", "evaluate": "Train", "tiny": "Train",
    "convert": "Checkpoints", "compress": "Checkpoints", "bench": "Measure", "doctor": "Measure",
}  # fmt: skip


class LazyCommands(dict):
    """Commands by name, each imported when it is used first."""

    def __getitem__(self, name: str) -> Any:
        """Return a command."""
        if super().__getitem__(name) is None:
            command = getattr(import_module(f"pixart_nb.cli.{name}"), name)
            if not isinstance(command, typer.Typer):
                function, command = command, typer.Typer(add_completion=False)
                command.command(name, cls=Command)(function)
            self[name] = typer.main.get_command(command)
            self[name].name, self[name].rich_help_panel = name, PANELS[name]
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a command, or ``default``."""
        return self[name] if name in self else default  # noqa: SIM401  (dict.get would not import it)


class Commands(TyperGroup):
    """The commands, whose errors become one line and exit code 2; a bug keeps its traceback."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.commands = LazyCommands.fromkeys(PANELS)

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in the order of the help."""
        return list(PANELS)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read ``--debug``, which is allowed before and after the command."""
        for stream in (sys.stdout, sys.stderr):  # prompts and paths may have characters that a terminal or pipe lacks
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        ctx.meta["debug"] = "--debug" in args
        return super().parse_args(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command by its name or by that of mindone's script (``sample.py``, ``tools/convert.py``)."""
        script = PurePath(cmd_name)
        return super().get_command(ctx, script.stem if script.suffix == ".py" else cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Its warnings are a line each, above a progress bar."""
        try:
            with warnings.catch_warnings():
                if not ctx.meta["debug"]:
                    warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except (PixArtNBError, OSError, KeyboardInterrupt) as error:
            if ctx.meta["debug"]:
                raise
            typer.echo(f"pixart-nb: {_message(error)}", err=True)
            code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 2)
            raise typer.Exit(code) from None


def _show_warning(message: Warning | str, *_: Any) -> None:
    from tqdm import tqdm  # has no part in --help and --version

    tqdm.write(f"pixart-nb: warning: {message}", file=sys.stderr)


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, PixArtNBError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if hasattr(error, "whole"):  # a list of problems, with one line for each
        return error.whole()
    return " ".join(str(error).split()) or "interrupted"


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="PixArt-Sigma on MindSpore: generate images, look inside the model, finetune it and scale it to 4K.",
    epilog='Start with: pixart-nb sample --prompt "a red mushroom on grass"',
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"pixart-nb {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of every error. Also allowed after the command.")
    ] = False,
) -> None:
    """Options of all commands."""
