"""``pixart-nb bench``: speed and memory on this machine, alone or beside diffusers on PyTorch."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Annotated, Any

import typer

from pixart_nb.cli.options import start
from pixart_nb.config import SAMPLING_STEPS, project_folder
from pixart_nb.core.errors import PixArtNBError

_PARTS = ("table", "denoise", "encode", "decode", "decode-tiled", "image", "train", "block", "pipeline")
#: What is measured beside the kit without options, in the order of the runs.
_PEERS = ("recompute", "diffusers", "compiled")
Benchmark = Enum("Benchmark", {name.replace("-", "_"): name for name in _PARTS}, type=str)

What = Annotated[
    Benchmark,
    typer.Argument(
        help="table: steps/s and training images/s. denoise: all steps, with the share of matrix products. "
        "encode: T5, in diffusers also without padding. decode, decode-tiled: the autoencoder. image: prompt to "
        "image. train: a training step of --batch-size images. block: one block, plain and compressed. pipeline: "
        "peak memory of a whole run, T5 streamed."
    ),
]
Peer = Annotated[
    bool,
    typer.Option("--peer", help="Measure diffusers too, in turns. Needs PyTorch: pip install -e '.\\[reference]'."),
]
Compiled = Annotated[
    bool,
    typer.Option(
        "--compiled",
        help="Measure diffusers with blocks compiled by torch.compile, too. Needs PyTorch and a C++ compiler.",
    ),
]
Recompute = Annotated[
    bool, typer.Option("--recompute", help="Measure a training step with gradient checkpointing, too.")
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(help="fp32, bf16 or both, for denoise and encode, in every system. \\[default: fp32]"),
]


def bench(
    what: What = Benchmark.denoise,
    size: Annotated[list[int] | None, typer.Option(help="Image sides in pixels. \\[default: 256]")] = None,
    training_size: Annotated[
        list[int] | None, typer.Option(help="Sides in pixels at which table measures a training step.")
    ] = None,
    with_diffusers: Peer = False,
    compiled: Compiled = False,
    repeats: Annotated[int, typer.Option(min=0, help="Number of measured runs, after one warm-up run.")] = 3,
    sampling_steps: Annotated[
        int, typer.Option(min=1, max=20, help="Number of measured steps; the rest of 20 is extrapolated.")
    ] = SAMPLING_STEPS,
    depth: Annotated[int, typer.Option(min=1, help="Number of transformer blocks; XL/2 has 28.")] = 28,
    caption_tokens: Annotated[int, typer.Option(min=1, help="Number of prompt tokens.")] = 20,
    text_layers: Annotated[int, typer.Option(min=1, help="Number of T5 layers; XXL has 24.")] = 2,
    ratio: Annotated[int, typer.Option(min=1, help="Ratio of token compression in every block.")] = 1,
    small: Annotated[
        bool, typer.Option("--small", help="A transformer as small as the bundled ones (192 wide, 6 blocks), not XL/2.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a training step.")] = 1,
    recompute: Recompute = False,
    dtype: Dtypes = None,
    output_path: Annotated[
        Path, typer.Option("--output-path", "-o", metavar="folder", help="Folder for the CSV file and the figure.")
    ] = Path("outputs/bench"),
) -> None:
    """Measure PixArt-Sigma XL/2 with random weights, and write the numbers as CSV and as a figure.

    Each system runs in a process of its own. Times are medians of alternating runs; every two systems are compared.

    Example: pixart-nb bench denoise --size 256 512 --peer --compiled --dtype fp32 bf16
    """
    from pixart_nb.viz.figures import save_figure
    from pixart_nb.viz.measurements import SECONDS, benchmark_figure

    dtypes = dtype or ["fp32"]
    peers = [name for name, chosen in zip(_PEERS, (recompute, with_diffusers, compiled), strict=True) if chosen]
    _check(what, peers, dtypes, output_path)
    start()
    runs, shapes_class = load_benchmarks()
    sizes = {"depth": depth, "caption_tokens": caption_tokens, "text_layers": text_layers, "ratio": ratio}
    shapes = shapes_class(steps=sampling_steps, dtype=dtypes[0], batch_size=batch_size, small=small, **sizes)
    shapes_by_size = [replace(shapes, size=side) for side in size or [256]]  # all are validated first
    for name in dtypes:
        replace(shapes, dtype=name)
    typer.echo(runs.machine())
    if what is Benchmark.table:
        parts = [runs.table(shapes, [s.size for s in shapes_by_size], training_size or [], repeats)]
    else:
        parts = (runs.run(what.value, each, repeats, peers, dtypes) for each in shapes_by_size)
    rows = []
    for part in parts:  # those of each size are written before the next one runs
        rows += part
        typer.echo("\n".join(map(str, part)))
        table = runs.write_csv(output_path / f"{what.value}.csv", rows)
    typer.echo(table)
    if any(row.measure in SECONDS for row in rows):
        figure = output_path / f"{what.value}.png"
        save_figure(benchmark_figure(rows), figure)
        typer.echo(figure)


def _check(what: Benchmark, peers: list[str], dtypes: list[str], output: Path) -> None:
    from pixart_nb.core.io import ensure_writable

    ensure_writable(output)
    if "recompute" in peers and what is not Benchmark.train:
        raise PixArtNBError(f"--recompute is measured by train; {what.value} computes no gradients")
    if set(peers) - {"recompute"} and not all(find_spec(name) for name in ("torch", "diffusers")):
        raise PixArtNBError("--peer and --compiled need PyTorch and diffusers: pip install -e '.[reference]'")
    if "compiled" in peers and not has_compiler():
        raise PixArtNBError("--compiled needs a C++ compiler for torch.compile: install g++, or set CXX to another one")
    if dtypes != ["fp32"] and what not in (Benchmark.denoise, Benchmark.encode):
        raise PixArtNBError(
            f"--dtype {' '.join(dtypes)} is measured by denoise and encode; {what.value} is measured in fp32"
        )
    check_dtypes(dtypes)


def check_dtypes(dtypes: list[str]) -> None:
    """Refuse dtypes that are not measured, and bfloat16 on a processor that would compute it in float32."""
    if not dtypes or set(dtypes) - {"fp32", "bf16"}:
        raise PixArtNBError(f"the dtypes are {dtypes}; expected fp32, bf16 or both")
    if "bf16" in dtypes:
        from pixart_nb.core.models.low_precision import inference_dtype_name, unsupported

        if inference_dtype_name("bf16") != "bf16":
            raise PixArtNBError(f"bf16 would be computed in float32: {unsupported()}")


def has_compiler() -> bool:
    """Return True if there is a C++ compiler, which torch.compile needs: that of ``CXX``, g++ or clang++."""
    return any(map(which, filter(None, (os.environ.get("CXX"), "g++", "clang++"))))


def load_benchmarks() -> tuple[Any, type]:
    """Return the module ``benchmarks.runs`` and the class ``Shapes`` of the repository at or above this folder.

    Raises an error without a repository: the installed package does not hold the benchmarks.
    """
    folder = project_folder()
    if not (folder / "benchmarks" / "runs.py").is_file():
        raise PixArtNBError(f"{folder} has no folder benchmarks/; run this in a checkout of the repository")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return import_module("benchmarks.runs"), import_module("benchmarks.shapes").Shapes
