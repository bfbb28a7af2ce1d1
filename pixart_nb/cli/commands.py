"""What the commands of ``pixart-nb`` do, once their options are read. MindSpore is loaded only when one runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from pixart_nb.core.data.errors import ProblemsError
from pixart_nb.core.io import write_json
from pixart_nb.core.sampling.generate import contact_sheet
from pixart_nb.core.sampling.image_files import write_picture

SHEET_COLUMNS = 16


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Errors that a user can mend end the command with one line (a list, with one for each item) and exit code 2."""
    try:
        yield
    except ProblemsError as error:
        typer.echo(f"pixart-nb: {error.whole()}", err=True)
        raise typer.Exit(2) from None
    except (ValueError, FileNotFoundError) as error:  # the project's own errors are ValueErrors
        typer.echo(f"pixart-nb: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def load_pipeline(model: str, dtype: str) -> Any:
    """The pipeline of a folder or hub id, computing in ``fp32`` | ``fp16`` | ``bf16``."""
    from pixart_nb import PixArtSigmaPipeline
    from pixart_nb.core.backend import dtype_from_name

    return PixArtSigmaPipeline.from_pretrained(model, mindspore_dtype=dtype_from_name(dtype))


def evaluate(
    model: str,
    count: int,
    vae: bool,
    dtype: str,
    output: str | os.PathLike[str],
    labels: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Judge a model on held-out scenes; writes ``evaluation.json`` and ``pictures.png`` and returns the numbers.

    ``labels``: a label file whose captions, the first ``count``, are drawn in their place. ``options`` are those of
    ``evaluate_model``: steps, guidance, batch_size, seed, height, width.
    """
    from pixart_nb.pixelart.evaluation import evaluate_model, held_out_scenes, reconstruction_psnr

    scenes = _labelled_scenes(labels, count) if labels else held_out_scenes(count)
    pipe = load_pipeline(model, dtype)
    report = evaluate_model(pipe, scenes, **options)
    pictures = report.pop("pictures")
    if vae:
        plain = {key: options[key] for key in ("batch_size", "seed", "height", "width")}
        report["reconstruction_psnr"] = reconstruction_psnr(pipe.vae, scenes, **plain)
    folder = Path(output)
    source = {"labels": str(labels)} if labels else {}
    report = {"model": model, "dtype": dtype, **source, **options, **report}
    write_picture(folder / "pictures.png", contact_sheet(pictures, SHEET_COLUMNS), report)
    write_json(folder / "evaluation.json", report)
    return report


def _labelled_scenes(labels: str | os.PathLike[str], count: int) -> list[Any]:
    from pixart_nb.core.data.labels import read_prompts
    from pixart_nb.pixelart.captions import named_scenes

    return named_scenes(read_prompts(labels)[:count])


def table(report: dict[str, Any]) -> str:
    """The accuracies of an evaluation as lines of text."""
    lines = [f"{part:<10}{report['accuracy'][part]:>7.1%}" for part in ("object", "colour", "setting", "all")]
    drawn = f"captions of {report['labels']}" if report.get("labels") else "held-out scenes"
    lines.append(f"{report['count']} {drawn}, {report['seconds_per_picture']:.2f} s a picture")
    if "reconstruction_psnr" in report:
        lines.append(f"autoencoder: {report['reconstruction_psnr']:.2f} dB")
    return "\n".join(lines)
