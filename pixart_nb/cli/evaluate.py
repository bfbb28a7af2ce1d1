"""``pixart-nb evaluate``: accuracy of a model of this project's pixel art."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pixart_nb.cli.options import config_options
from pixart_nb.config import InferenceConfig, check_config

DEFAULTS = {
    "model": "data/tiny-sigma", "image_height": 128, "image_width": 128, "batch_size": 24,
    "use_resolution_binning": False, "output_path": "outputs/evaluation",
}  # fmt: skip
KEYS = (
    "model", "checkpoint", "vae_root", "text_encoder_root", "tokenizer_root", "image_height", "image_width",
    "sampling_method", "sampling_steps", "guidance_scale", "seed", "batch_size", "dtype", "output_path",
)  # fmt: skip


@config_options(InferenceConfig, only=KEYS)
def evaluate(
    options: dict,
    count: Annotated[int, typer.Option(min=1, help="Number of held-out scenes to generate.")] = 240,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="file", help="Label file of drawn scenes, whose captions are generated in place of them."
        ),
    ] = None,
    vae: Annotated[bool, typer.Option("--vae", help="Measure the reconstruction by the VAE too.")] = False,
) -> None:
    """Generate scenes that training never shows, and count how many show the right object, colour and setting.

    Only for models of this project's pixel art, such as data/tiny-sigma. Writes evaluation.json and images.png.

    Example: pixart-nb evaluate --model data/tiny-sigma --count 48
    """
    from pixart_nb.core.data.labels import read_prompts
    from pixart_nb.pixelart.captions import named_scenes, short_caption
    from pixart_nb.pixelart.evaluation import held_out_scenes

    scenes = named_scenes(read_prompts(labels)[:count]) if labels else held_out_scenes(count)
    prompts = {"prompt": [short_caption(scene) for scene in scenes]}
    config = check_config(DEFAULTS | prompts, options=options)
    report = write_evaluation(config, scenes, vae, {"labels": str(labels)} if labels else {})
    typer.echo(table(report))


def write_evaluation(
    config: InferenceConfig, scenes: list[Any], vae: bool, source: dict[str, str]
) -> dict[str, Any]:
    """Judge the model of a configuration on ``scenes``, write the numbers and the images, and return the numbers."""
    from pixart_nb.core.io import write_json
    from pixart_nb.core.sampling import generate
    from pixart_nb.core.sampling.image_files import write_picture
    from pixart_nb.pixelart.evaluation import evaluate_model, reconstruction_psnr

    pipe = generate.load_pipeline(config)
    size = {"height": config.image_height, "width": config.image_width}
    drawing = {"batch_size": config.batch_size, "seed": config.seed, **size}
    sampling = {"steps": config.sampling_steps, "guidance": config.guidance_scale}
    report = evaluate_model(pipe, scenes, **drawing, **sampling)
    images = report.pop("pictures")
    if vae:
        report["reconstruction_psnr"] = reconstruction_psnr(pipe.vae, scenes, **drawing)
    report = {"model": config.model, "dtype": config.dtype, **source, **drawing, **sampling, **report}
    folder = Path(config.output_path)
    write_picture(folder / "images.png", generate.contact_sheet(images, columns=16), report)
    write_json(folder / "evaluation.json", report)
    return report


def table(report: dict[str, Any]) -> str:
    """Return the accuracies of an evaluation as lines of text."""
    lines = [f"{part:<10}{report['accuracy'][part]:>7.1%}" for part in ("object", "colour", "setting", "all")]
    source = f"captions of {report['labels']}" if report.get("labels") else "held-out scenes"
    lines.append(f"{report['count']} {source}, {report['seconds_per_picture']:.2f} s per image")
    if "reconstruction_psnr" in report:
        lines.append(f"VAE reconstruction: {report['reconstruction_psnr']:.2f} dB")
    return "\n".join(lines)
