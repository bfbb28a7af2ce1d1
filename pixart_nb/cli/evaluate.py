"""``pixart-nb evaluate``: accuracy of a model of this project's pixel art."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pixart_nb.cli.options import config_options, start
from pixart_nb.cli.sample import ConfigFile
from pixart_nb.config import INFERENCE_CONFIG, InferenceConfig, check_config, read_yaml
from pixart_nb.core.errors import PixArtNBError

#: Values for keys that the configuration file does not have, and the output folder, which replaces that of the file.
DEFAULTS = {"batch_size": 24, "use_resolution_binning": False}
OWN = {"output_path": "outputs/evaluation"}
KEYS = (
    "model", "lora", "checkpoint", "vae_root", "text_encoder_root", "tokenizer_root", "image_height", "image_width",
    "negative_prompt", "sampling_method", "sampling_steps", "guidance_scale", "pag_scale", "pag_adaptive_scale",
    "pag_applied_layers", "seed", "batch_size", "dtype", "output_path",
)  # fmt: skip


@config_options(InferenceConfig, only=KEYS, defaults=DEFAULTS | OWN)
def evaluate(
    config: ConfigFile = INFERENCE_CONFIG,
    count: Annotated[int, typer.Option(min=1, help="Number of held-out scenes to generate.")] = 240,
    things: Annotated[int, typer.Option(min=1, max=2, help="Objects in each held-out scene: one or two.")] = 1,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="file", help="Label file of drawn scenes, whose captions are generated in place of them."),
    ] = None,
    vae: Annotated[bool, typer.Option("--vae", help="Measure the reconstruction by the VAE too.")] = False,
    **options: Any,
) -> None:
    """Generate held-out scenes, and count how many show the right object, colour, setting and relation.

    Only for models of this project's pixel art, such as data/tiny-sigma. Sampling is that of the configuration file;
    its prompts are not used. Writes evaluation.json and images.png; their names count up. An interrupted evaluation
    continues with the same command.

    Example: pixart-nb evaluate --model data/tiny-sigma --count 48
    """
    from pixart_nb.core.models.low_precision import inference_dtype_name
    from pixart_nb.core.sampling import generate
    from pixart_nb.core.sampling.planning import check_run
    from pixart_nb.core.sampling.text import per_prompt
    from pixart_nb.pixelart import evaluation
    from pixart_nb.pixelart.captions import short_caption

    scenes = evaluation.requested_scenes(count, things, labels)
    options["prompt"] = [short_caption(scene) for scene in scenes]
    chosen = check_config(DEFAULTS | read_yaml(config) | OWN, "inference", str(config), options)
    start(chosen)
    settings = {"model": chosen.model, "dtype": chosen.dtype}
    computed = inference_dtype_name(chosen.dtype)
    settings |= {"computed_dtype": computed} if computed != chosen.dtype else {}
    settings |= {"lora": chosen.lora} if chosen.lora else {}
    negative, *others = dict.fromkeys(per_prompt(chosen.negative_prompt, len(scenes)))
    if others:
        raise PixArtNBError(f"negative_prompt has {1 + len(others)} texts; expected one for all scenes")
    check_run(chosen, KEYS)
    if not labels:
        _warn_of_other_models(chosen)
    report, path = evaluation.evaluate_and_write(
        generate.load_pipeline(chosen),
        scenes,
        chosen.output_path,
        vae=vae,
        settings=settings | ({"labels": str(labels)} if labels else {}),
        identity=generate.network_identity(chosen)
        | {"t5_max_length": chosen.t5_max_length, "tile_size": chosen.tile_size},
        sampling_steps=chosen.sampling_steps,
        guidance_scale=chosen.guidance_scale,
        batch_size=chosen.batch_size,
        seed=chosen.seed,
        height=chosen.image_height,
        width=chosen.image_width,
        negative_prompt=negative,
        **generate.pag_options(chosen),
    )
    Console().print(evaluation.score_table(report))
    typer.echo(f"{evaluation.score_summary(report)}\n{path}")


def _warn_of_other_models(config: InferenceConfig) -> None:
    """Warn of a model whose card does not name the drawn scenes. The size is checked when images are read."""
    from pixart_nb.pixelart.evaluation import SMALLEST, draws_scenes

    if not draws_scenes(config.model_copy(update={"image_height": SMALLEST, "image_width": SMALLEST})):
        warnings.warn(
            f"{config.checkpoint or config.model} has no model card that names the drawn scenes. The evaluator knows "
            "only these: the shares are those of chance for a model that was not trained on them",
            stacklevel=2,
        )
