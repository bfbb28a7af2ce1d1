"""``pixart-nb sample --staged``: pictures of a configuration drawn in stages that can be stopped and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.config import ConfigError, InferenceConfig
from pixart_nb.core.sampling import generate as sample

#: Seconds between two changes of a bar, at least: in a notebook each is a message, which others must read.
BAR_SECONDS = 0.5


def draw_staged(
    config: InferenceConfig, prompts: Sequence[str], wanted: Sequence[sample.Picture]
) -> Iterator[tuple[Sequence[sample.Picture], np.ndarray]]:
    """Yield (pictures, images (N, H, W, 3) uint8) of whole prompts, once all have gone through all stages."""
    drawings = staged_pictures(config, prompts, wanted)
    show(drawings, lambda names: sample.load_pipeline(config, names))
    copies = config.nrows * config.ncols
    for first in range(0, len(wanted), copies):
        rows = slice(first, first + copies)
        yield wanted[rows], np.stack([drawing.pixels() for drawing in drawings[rows]])


def show(drawings: Sequence[Any], load: Callable[[Sequence[str]], Any]) -> None:
    """Draw ``StagedPicture``s, with a progress bar for every stage of every picture."""
    from tqdm.auto import tqdm

    from pixart_nb.core.sampling.stages import run_staged

    bar, shown = None, None
    for part in run_staged(drawings, load):
        if (part.stage, part.picture) != shown:
            shown = (part.stage, part.picture)
            if bar is not None:
                bar.close()
            name = f"{part.stage} {part.picture + 1}"
            bar = tqdm(total=part.total, initial=part.done, desc=name, mininterval=BAR_SECONDS)
        bar.update(part.done - bar.n)
    if bar is not None:
        bar.close()


def staged_pictures(
    config: InferenceConfig, prompts: Sequence[str], wanted: Sequence[sample.Picture]
) -> list[Any]:
    """The ``StagedPicture`` of every picture, each in a folder of its own in ``config.stages_path``."""
    from pixart_nb.core.sampling.stages import StagedPicture

    drawn, models = drawn_size(config), identity_of(config)
    negatives = sample.negative_prompts_of(config, len(prompts))
    return [
        StagedPicture(
            Path(config.stages_path) / f"{picture.stream:03d}",
            prompts[picture.prompt],
            drawn,
            (config.image_height, config.image_width),
            seed=(config.seed, picture.stream),
            models=models,
            **_how(config) | {"negative_prompt": negatives[picture.prompt]},
            enlarge=Path(config.upscale_from) / f"{picture.stream:03d}" if config.upscale_from else None,
            strength=config.strength,
        )
        for picture in wanted
    ]


def _how(config: InferenceConfig) -> dict[str, Any]:
    """What a ``StagedPicture`` takes of a configuration as it stands there, whatever its prompt and size."""
    return {
        "negative_prompt": sample.negative_prompts_of(config, len(sample.prompts_of(config)))[0],
        "steps": config.sampling_steps,
        "guidance_scale": config.guidance_scale,
        "max_sequence_length": config.t5_max_length,
        "tile": config.tile_size or sample.TILE,
    }


def growing_pictures(config: InferenceConfig, sizes: Sequence[Any]) -> list[Any]:
    """The ``StagedPicture``s of a picture that grows through ``sizes`` (``core.sampling.growing.Size``), one prompt.

    Each has a folder named after its size in ``config.stages_path``, and begins with the one before.
    """
    from pixart_nb.core.sampling.stages import StagedPicture

    models, found = identity_of(config), []
    for size in sizes:
        drawn = (size.height, size.width)
        found.append(
            StagedPicture(
                Path(config.stages_path) / f"{size.height}x{size.width}-keys-{size.ratio}",
                sample.prompts_of(config)[0],
                drawn,
                drawn,
                seed=(config.seed, config.first_image),
                **_how(config),
                models=models | {"keys": f"mean of {size.ratio} x {size.ratio}"},
                enlarge=found[-1].folder if size.strength < 1 else None,
                strength=size.strength,
            )
        )
    return found


def growing_pipeline(config: InferenceConfig, size: Any, names: Sequence[str]) -> Any:
    """Components of a configuration's pipeline, whose transformer compresses as a ``Size`` says."""
    from pixart_nb.core.sampling.upscaling import shrink_keys

    pipe = sample.load_pipeline(config, names)
    if pipe.transformer is not None:
        shrink_keys(pipe.transformer, size.ratio)
    return pipe


def draw_growing(config: InferenceConfig, sizes: Sequence[Any]) -> list[Any]:
    """Draw the ``growing_pictures`` of a configuration, with progress bars; sizes that are drawn stay as they are."""
    pictures = growing_pictures(config, sizes)
    for size, picture in zip(sizes, pictures, strict=True):
        show([picture], lambda names, size=size: growing_pipeline(config, size, names))
    return pictures


def grow(
    config: InferenceConfig, factors: Sequence[int] = (), strengths: Sequence[float] = (), keys: int = 0
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Draw a picture of a configuration through growing sizes, and write it with a page to zoom into it.

    ``factors``, ``strengths``, ``keys``: as ``growing_sizes`` takes them, what is usual where they are not given. Its
    stages lie in ``config.stages_path``, else in the folder of the picture. -> paths, and rows of what was planned and
    measured for every size.

    Raises ``DoesNotFitError`` before anything is drawn.
    """
    from pixart_nb.core.planning import report as planner
    from pixart_nb.core.planning.memory import live_here
    from pixart_nb.core.planning.plan import check_fits, plan_growing
    from pixart_nb.core.sampling import upscaling as growing
    from pixart_nb.core.sampling.image_files import write_picture
    from pixart_nb.viz.zoom import ZoomViewer

    config = config.model_copy(
        update={"stages_path": config.stages_path or str(Path(config.output_path) / "stages")}
    )
    networks, _ = planner.networks_of(config)
    height, width = drawn_size(config, networks.transformer)
    factors = list(factors) or growing.usual_factors(networks.transformer, height, width)
    strengths = list(strengths) or growing.usual_strengths(len(factors))
    sizes = growing.growing_sizes(
        networks.transformer, height, width, factors, strengths, keys or growing.KEYS
    )
    plans = plan_growing(networks, planner.run_of(config, networks), sizes, live=live_here())
    for plan in plans:
        check_fits(plan, planner.memory_limit(config))
    pictures = draw_growing(config, sizes)
    prompt = sample.prompts_of(config)[0]
    path = Path(config.output_path) / "picture.png"
    told = config.model_dump() | {"factors": factors, "strengths": strengths, "keys": keys or growing.KEYS}
    write_picture(path, pictures[-1].pixels(), told)
    page = ZoomViewer(pictures[-1].pixels(), prompt).write(path.with_name("zoom.html"))
    return [path, page], planner.compared_rows(plans, [picture.files.measured() for picture in pictures])


def transformer_config(config: InferenceConfig) -> Any:
    """The ``PixArtConfig`` of a configuration's transformer, read from its names and shapes alone."""
    from pixart_nb.core.checkpoints.configuration import describe
    from pixart_nb.core.checkpoints.files import open_checkpoint
    from pixart_nb.core.checkpoints.layouts import to_official_names
    from pixart_nb.core.checkpoints.pipeline_folder import component_paths
    from pixart_nb.core.models.transformer import PixArtConfig

    said = None
    if config.checkpoint:
        place, said = Path(config.checkpoint), PixArtConfig(**sample.architecture_of(config))
    else:
        place = component_paths(config.model, ["transformer"])["transformer"]
    return describe(to_official_names(open_checkpoint(place)), place, said).config


def drawn_size(config: InferenceConfig, model: Any = None) -> tuple[int, int]:
    """Height and width that the model works at.

    Raises ``ConfigError`` for a size that it cannot draw, or whose ratio no published size has.
    """
    from pixart_nb.core.sampling.aspect_ratio import binned_size, bins_for, checked_size

    model = model or transformer_config(config)
    height, width = config.image_height, config.image_width
    bins = bins_for(8 * model.input_size) if config.use_resolution_binning else None
    if bins and not min(bins) <= round(height / width, 2) <= max(bins):
        nearest = binned_size(model, height, width)
        raise ConfigError(
            f"image_height and image_width are {height}x{width}, {height / width:.3g} times as high as wide; the "
            f"published sizes of {8 * model.input_size} go from {min(bins)} to {max(bins)}. Give a size between, for "
            f"example {nearest[0]}x{nearest[1]}, or switch use_resolution_binning off"
        )
    return (binned_size if bins else checked_size)(model, height, width)


def identity_of(config: InferenceConfig) -> dict[str, str]:
    """What else the numbers of a picture depend on: fingerprints of the networks' files, and how they compute."""
    from pixart_nb.core.backend import device_name, ms
    from pixart_nb.core.checkpoints.pipeline_folder import component_paths
    from pixart_nb.core.data.features import fingerprint

    roots = {name: getattr(config, f"{name}_root") for name in ("vae", "text_encoder", "tokenizer")}
    places = {name: Path(root) for name, root in (roots | {"transformer": config.checkpoint}).items() if root}
    others = [name for name in sample.COMPONENTS if name not in places]
    if config.model:
        places |= component_paths(config.model, others)
    known = {name: fingerprint(place) for name, place in places.items()}
    known |= {"sampling_method": config.sampling_method, "dtype": config.dtype}
    known |= {
        "sd_scale_factor": str(config.sd_scale_factor),
        "t5_in_eight_bits": str(config.t5_load == "int8"),
    }
    return known | {"device": device_name(), "mindspore": ms.__version__}
