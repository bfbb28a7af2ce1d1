"""``pixart-nb doctor``: checks of an installation."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from pixart_nb.core.errors import PixArtNBError


def doctor() -> None:
    """Check this installation: versions, the device, products in each dtype, small networks against stored numbers.

    Takes a minute and needs no download. Paste what it prints into a bug
    report. Exit code 1 if a check fails.

    Example: PIXART_NB_DEVICE=Ascend pixart-nb doctor
    """
    from pixart_nb.core.doctor import device_checks, environment

    typer.echo("Paste all of this into a bug report.\n")
    failed = _show(environment())
    try:
        failed += _show(device_checks())
    except PixArtNBError as error:
        typer.echo(f"FAILED  device: {error}")
        failed.append("device")
    typer.echo(f"\nfailed: {'; '.join(failed)}" if failed else "\nEvery check passed.")
    if failed:
        raise typer.Exit(1)


def _show(checks: Iterable) -> list[str]:
    """Print checks as they end; return the names of those that failed."""
    failed = []
    for check in checks:
        typer.echo(f"{ {True: 'ok', False: 'FAILED', None: ''}[check.passed]:7} {check.name}: {check.result}")
        failed += [check.name] if check.passed is False else []
    return failed
