"""``pixart-nb``: draw pictures, convert checkpoints, judge a model, train the embedded one. Thin functions."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pixart_nb.cli import commands
from pixart_nb.cli.bench import bench
from pixart_nb.cli.commands import one_line_errors
from pixart_nb.cli.dataset import dataset
from pixart_nb.cli.large import compress, grow, plan
from pixart_nb.cli.options import Switch, with_key_options
from pixart_nb.config import SAMPLING_METHODS, TrainConfig, load_config
from pixart_nb.core.errors import PixArtNBError

TINY = "data/tiny-sigma"

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"token_normalize_func": lambda token: token.replace("_", "-")},  # --image_height too
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="PixArt-Sigma on MindSpore: draw pictures, convert checkpoints, judge a model, train the embedded one.",
)

app.add_typer(dataset, name="dataset")
app.command()(compress)
app.command()(plan)
app.command()(grow)
app.command()(bench)

Method = StrEnum("Method", {name: name for name in SAMPLING_METHODS})


TextEncoder = StrEnum("TextEncoder", {name: name for name in ("whole", "stream", "int8")})
StoredDtype = StrEnum("StoredDtype", {name: name for name in ("keep", "fp32", "fp16", "bf16")})


class Dtype(StrEnum):
    """Names of number formats."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


@app.command()
def sample(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file; the options below replace its values.")
    ] = Path("configs/inference/tiny.yaml"),
    like: Annotated[
        Path | None,
        typer.Option(help="A picture of this command: draw it again, with the options below changed."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw, in English. Give it again for more pictures.")
    ] = None,
    prompt_path: Annotated[Path | None, typer.Option(help="Text file with a prompt on each line.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to steer away from.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder in the diffusers layout, or a hub id.")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A transformer to use in the model: .pth, .ckpt, .safetensors or a folder."),
    ] = None,
    image_height: Annotated[int | None, typer.Option(help="Height in pixels.")] = None,
    image_width: Annotated[int | None, typer.Option(help="Width in pixels.")] = None,
    sampling_method: Annotated[Method | None, typer.Option(help="The solver.")] = None,
    sampling_steps: Annotated[int | None, typer.Option(help="Steps: more is slower and finer.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strongly the prompt pulls; 1 is off.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same pictures.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures drawn at once.")] = None,
    imagegrid: Annotated[
        bool | None, typer.Option("--imagegrid/--no-imagegrid", help="One file for the pictures of a prompt.")
    ] = None,
    nrows: Annotated[int | None, typer.Option(help="A prompt has rows x columns pictures.")] = None,
    ncols: Annotated[int | None, typer.Option(help="Columns of the grid.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Numbers the networks compute in.")] = None,
    use_parallel: Annotated[
        Switch | None,
        typer.Option(case_sensitive=False, help="Under msrun: divide the prompts among the workers."),
    ] = None,
    stages_path: Annotated[
        Path | None,
        typer.Option(
            help="Draw in stages whose state lies in this folder: less memory, and the same command goes on."
        ),
    ] = None,
    upscale_from: Annotated[
        Path | None,
        typer.Option(
            help="The folder of such a run, smaller, to begin with its pictures; with --stages_path."
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of an enlarged picture is drawn anew, above 0 to 1.")
    ] = None,
    t5_load: Annotated[
        TextEncoder | None, typer.Option(help="T5 whole in memory, one layer at a time, or in eight bits.")
    ] = None,
    tile_size: Annotated[
        int | None, typer.Option(help="Decode by tiles of so many pixels a side; 0 is whole.")
    ] = None,
    memory_limit: Annotated[
        float | None, typer.Option(help="GB that it may take; 0 is what the machine has free.")
    ] = None,
    output_path: Annotated[
        Path | None, typer.Option("--output-path", "-o", help="Folder for the pictures.")
    ] = None,
) -> None:
    """Draw pictures of prompts and write them as PNG files, each of which carries what repeats it.

    Example: pixart-nb sample --prompt "a red mushroom on grass" --output-path outputs/mushroom
    """
    from pixart_nb.core.sampling import generate as command

    given = {
        "prompt": prompt or None,
        "prompt_path": prompt_path and str(prompt_path),
        "negative_prompt": negative_prompt,
        "model": model,
        "checkpoint": checkpoint and str(checkpoint),
        "image_height": image_height,
        "image_width": image_width,
        "sampling_method": sampling_method and sampling_method.value,
        "sampling_steps": sampling_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "batch_size": batch_size,
        "imagegrid": imagegrid,
        "nrows": nrows,
        "ncols": ncols,
        "dtype": dtype and dtype.value,
        "use_parallel": use_parallel and use_parallel is Switch.true,
        "stages_path": stages_path and str(stages_path),
        "upscale_from": upscale_from and str(upscale_from),
        "strength": strength,
        "t5_load": t5_load and t5_load.value,
        "tile_size": tile_size,
        "memory_limit": memory_limit,
        "output_path": output_path and str(output_path),
    }
    if prompt and not prompt_path:
        given["prompt_path"] = ""
    elif prompt_path and not prompt:
        given["prompt"] = []
    with one_line_errors():
        settings = (
            command.like(like, **given)
            if like
            else load_config(config, "inference", {k: v for k, v in given.items() if v is not None})
        )
        for path in command.sample(settings):
            typer.echo(path)
        typer.echo(f"{command.seconds_of_this_process():.1f} s from the cold start of this command")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Option(
            "--source",
            "-s",
            help="Checkpoint: .pth, .bin, .ckpt, .safetensors, or a folder in the diffusers layout.",
        ),
    ],
    target: Annotated[
        Path | None,
        typer.Option(
            "--target",
            "-t",
            help="What to write, by its ending: .safetensors, .ckpt, .pth; without one, a folder. Left out: a .ckpt "
            "beside the source.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="JSON with what the tensors do not show: a diffusers config.json, or our fields."),
    ] = None,
    sample_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Latent side of the training size: 32, 64, 128, 256 for 256 to 2048 pixels."
        ),
    ] = None,
    dtype: Annotated[StoredDtype, typer.Option(help="Kind of numbers that is written.")] = StoredDtype.keep,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Load both, compare one forward pass; exit code 1 if they differ."),
    ] = False,
) -> None:
    """Convert a PixArt transformer, alpha or sigma, between layouts, without PyTorch, and audit every tensor.

    Files get the official names, which mindone uses too; a folder gets
    diffusers' names and a config.json. The audit is printed, and written
    beside the target as TARGET.audit.json.

    Only the transformer is written. For a whole pipeline, copy the folder of a
    published one, empty its transformer folder and convert into that:
    --target my-pipeline/transformer

    Example: pixart-nb convert --source PixArt-Sigma-XL-2-1024-MS.pth
    --target PixArt-Sigma-XL-2-1024-MS.ckpt --verify
    """
    with one_line_errors():
        from pixart_nb.core.checkpoints import convert as conversion
        from pixart_nb.core.checkpoints.configuration import read_config

        said = read_config(config) if config else None
        if target is None and source.is_dir():
            raise PixArtNBError(f"{source} is a folder; give --target")
        target = target or source.with_suffix(".ckpt")
        plan = conversion.plan_conversion(source, target, said, sample_size, dtype.value)
        typer.echo(f"{plan.audit.table()}\n\n{plan.audit}")
        conversion.convert(plan)
        typer.echo("\n".join(map(str, plan.files)))
        if verify:
            error, allowed = conversion.verify(plan), conversion.tolerance(plan)
            typer.echo(f"relative error of one forward pass: {error:.1e}, at most {allowed:.0e} allowed")
            if not error <= allowed:
                typer.echo(
                    f"pixart-nb: {target} does not compute what {source} does; do not use it", err=True
                )
                raise typer.Exit(1)


@app.command()
@with_key_options(TrainConfig)
def train(
    given: dict,
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file; the options below replace its values.")
    ] = Path("configs/train/tiny.yaml"),
) -> None:
    """Train a transformer, or a LoRA, on pictures with captions. If it was stopped, it goes on where it was.

    Writes checkpoints, curve.csv, validation pictures and, at the end, a
    folder pipeline that `sample --model` takes. On several devices, under
    msrun, with --use_parallel True.

    Example: pixart-nb train -c configs/train/tiny.yaml --steps 40
    """
    with one_line_errors():
        from pixart_nb.core.training import run as command
        from pixart_nb.core.training.divergence import DivergenceError

        try:
            result = command.train(load_config(config, "train", given))
        except DivergenceError as error:
            typer.echo(f"pixart-nb: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as stopped:
            typer.echo(f"pixart-nb: {stopped}", err=True)
            raise typer.Exit(130) from None
        if result:
            typer.echo(result)


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Folder in the diffusers layout, or a hub id.")] = TINY,
    count: Annotated[
        int, typer.Option(min=1, help="Scenes to draw, all of which training never shows.")
    ] = 240,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the solver.")] = 20,
    guidance: Annotated[float, typer.Option(min=1, help="How strongly the prompt pulls; 1 is off.")] = 4.5,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same pictures.")] = 0,
    height: Annotated[int, typer.Option(min=16, help="Height in pixels, a multiple of 16.")] = 128,
    width: Annotated[int, typer.Option(min=16, help="Width in pixels, a multiple of 16.")] = 128,
    dtype: Annotated[Dtype, typer.Option(help="Numbers the networks compute in.")] = Dtype.fp32,
    labels: Annotated[
        Path | None,
        typer.Option(help="Label file of drawn scenes, such as those kept for testing: draw its captions."),
    ] = None,
    vae: Annotated[bool, typer.Option("--vae", help="Measure the autoencoder's reconstruction too.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for numbers and pictures.")] = Path(
        "outputs/evaluation"
    ),
) -> None:
    """Draw scenes that training never shows, and count how many show the asked object, colour and setting.

    Only for models of this project's pixel art, such as data/tiny-sigma. Writes evaluation.json and pictures.png.
    """
    with one_line_errors():
        report = commands.evaluate(
            model,
            count,
            vae,
            dtype.value,
            output,
            labels,
            steps=steps,
            guidance=guidance,
            batch_size=batch_size,
            seed=seed,
            height=height,
            width=width,
        )
        typer.echo(commands.table(report))


@app.command()
def tiny(
    folder: Annotated[Path, typer.Option(help="Where the trained pipeline is written.")] = Path(TINY),
    work: Annotated[Path, typer.Option(help="Where an unfinished training is kept.")] = Path("outputs/tiny"),
) -> None:
    """Train the embedded model from nothing on drawn pixel art. If it was stopped, it goes on where it was."""
    with one_line_errors():
        from pixart_nb.pixelart.bundled_model import train_tiny

        train_tiny(folder=folder, work=work)
        typer.echo(folder)
