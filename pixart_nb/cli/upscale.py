"""``pixart-nb upscale``: a large image with a model of small ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from pixart_nb.cli.options import config_options, start
from pixart_nb.cli.sample import ConfigFile
from pixart_nb.config import INFERENCE_CONFIG, InferenceConfig, load_config

WITHOUT = (
    "image", "mask", "upscale_from", "strength", "imagegrid", "nrows", "ncols", "batch_size", "use_resolution_binning",
)  # fmt: skip


@config_options(InferenceConfig, without=WITHOUT)
def upscale(
    config: ConfigFile = INFERENCE_CONFIG,
    factors: Annotated[
        list[int] | None,
        typer.Option(
            help="Divisors of the final size, falling to 1. By default powers of 2, down to about the model's own size."
        ),
    ] = None,
    strengths: Annotated[
        list[float] | None, typer.Option(help="Share of the denoising steps at each size but the first.")
    ] = None,
    keys: Annotated[
        int,
        typer.Option(
            min=0, help="Number of keys per side that self-attention is compressed to; 0 for as many as in training."
        ),
    ] = 0,
    **options: Any,
) -> None:
    """Generate a large image by progressive upscaling: small first, then upscaled and denoised again.

    Uses the first prompt, and exactly the given size. Works in resumable stages: the same command resumes
    where it was stopped. Writes the image, and zoom.html to look around in it.

    Example: pixart-nb upscale --image_height 1024 --image_width 1024 --prompt "a red mushroom in a forest"
    """
    from pixart_nb.viz.tables import Table

    settings = load_config(config, "inference", options)
    start(settings)
    paths, rows = upscaled(settings, factors or (), strengths or (), keys)
    typer.echo(Table(rows, "Time and memory"))
    typer.echo("\n".join(map(str, paths)))


def upscaled(config: InferenceConfig, factors: Any, strengths: Any, keys: int) -> tuple[list[Path], list[dict]]:
    """Draw the image and write it with its page. Return the paths, and table rows of planned and measured memory."""
    from pixart_nb.core.io import ensure_writable
    from pixart_nb.core.run_plan import check_fits, plan_upscaling, process_memory, size_warnings
    from pixart_nb.core.sampling import planning, upscaling
    from pixart_nb.core.sampling.images import write_new_image
    from pixart_nb.core.sampling.planning import drawn_size, prompts_of
    from pixart_nb.viz.zoom import ZoomViewer

    stages = config.stages_path or str(Path(config.output_path) / "stages")
    config = config.model_copy(update={"stages_path": stages, "use_resolution_binning": False})
    networks, _ = planning.networks_of(config)
    height, width = drawn_size(config, networks.transformer)
    sizes = upscaling.upscale_sizes(networks.transformer, height, width, factors, strengths, keys)
    plans = plan_upscaling(networks, planning.run_settings(config, networks), sizes, process=process_memory())
    for plan in plans:
        check_fits(plan, planning.memory_limit(config))
    first, own = plans[0].run, 8 * networks.transformer.input_size
    large = min(first.height, first.width) > own
    advice = f" Multiples of {own} as height and width begin near that size." if large else ""
    for sentence in size_warnings(networks.transformer, first, planning.trained_sizes(config)):
        warnings.warn(f"Upscaling begins at {first.height}x{first.width}.{advice} {sentence}", stacklevel=2)
    ensure_writable(config.output_path, needed=3 * height * width)
    images = upscaling.upscale(config, sizes)
    steps = {"factors": [sizes[-1].height // size.height for size in sizes]}
    steps |= {"strengths": [size.strength for size in sizes[1:]], "ratios": [size.ratio for size in sizes]}
    path = Path(config.output_path) / "image.png"
    path = write_new_image(path, images[-1].pixels(), config.model_dump() | steps, config.overwrite)
    page = path.with_name(f"{path.stem.replace('image', 'zoom')}.html")
    ZoomViewer(images[-1].pixels(), prompts_of(config)[0]).write(page)
    return [path, page], planning.measured_rows(plans, [image.files.measured() for image in images])
