"""``pixart-nb convert``: a transformer in another file format."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pixart_nb.cli.options import start
from pixart_nb.core.errors import PixArtNBError

StoredDtype = Enum("StoredDtype", {name: name for name in ("keep", "fp32", "fp16", "bf16")}, type=str)
ModelConfigFile = Annotated[
    Path | None,
    typer.Option(metavar="file", help="JSON with what the tensors do not show, for example a diffusers config.json."),
]
SampleSize = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="Latent side of the training: 32, 64, 128, 256 for 256 to 2048 pixels."),
]
StoredDtypeOption = Annotated[StoredDtype, typer.Option(help="Floating-point type that is written.")]


def convert(
    source: Annotated[
        Path, typer.Option("--source", "-s", help="A .pth, .bin, .ckpt or .safetensors file, or a folder of diffusers.")
    ],
    target: Annotated[
        Path | None,
        typer.Option(
            "--target",
            "-t",
            help="File to write (.safetensors, .ckpt, .pth), or a folder. By default, a .ckpt beside the source.",
        ),
    ] = None,
    config: ModelConfigFile = None,
    sample_size: SampleSize = None,
    dtype: StoredDtypeOption = StoredDtype.keep,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare one forward pass of both; exit code 1 if they differ.")
    ] = False,
) -> None:
    """Convert a PixArt transformer, alpha or Sigma, to another file format, without PyTorch, and audit every tensor.

    Files get the official names, which mindone uses too; a folder gets the
    names of diffusers and a config.json. The audit is printed and written to
    TARGET.audit.json. Only the transformer is written. For a whole pipeline,
    copy a published one and convert into its transformer folder.

    Example: pixart-nb convert --source PixArt-Sigma-XL-2-1024-MS.pth --target PixArt-Sigma-XL-2-1024-MS.ckpt --verify
    """
    start()
    from pixart_nb.core.checkpoints import convert as conversion
    from pixart_nb.core.checkpoints.configuration import read_config
    from pixart_nb.viz.tables import Table

    if target is None and source.is_dir():
        raise PixArtNBError(f"{source} is a folder; give --target")
    target = target or conversion.check_default_target(source.with_suffix(".ckpt"), source)
    fields = read_config(config) if config else None
    conversion_plan = conversion.plan_conversion(source, target, fields, sample_size, dtype.value)
    typer.echo(f"{Table(conversion_plan.audit.rows())}\n\n{conversion_plan.audit}")
    conversion.convert(conversion_plan)
    typer.echo("\n".join(map(str, conversion_plan.files)))
    if verify:
        error, allowed = conversion.verify(conversion_plan), conversion.tolerance(conversion_plan)
        typer.echo(f"relative error of one forward pass: {error:.1e}, at most {allowed:.0e} allowed")
        if not error <= allowed:
            typer.echo(f"pixart-nb: {target} does not compute what {source} does; do not use it", err=True)
            raise typer.Exit(1)
