"""What the commands of ``pixart-nb`` do, once their options are read. MindSpore is loaded only when one runs."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from pixart_nb.config import InferenceConfig
from pixart_nb.core.checkpoints.store import write_json, written_beside

SHEET_COLUMNS = 16


def sample(config: InferenceConfig) -> list[Path]:
    """Draw every prompt of a configuration and write the pictures and ``sample.json``; the paths of the pictures."""
    from pixart_nb.core.sampling.evaluation import to_uint8

    images = to_uint8(_draw(load_pipeline(config.model, config.dtype), config))
    folder = Path(config.output_dir)
    paths = [folder / f"{number:03d}_{_file_name(words)}.png" for number, words in enumerate(config.prompts)]
    for path, image in zip(paths, images, strict=True):
        write_picture(path, image)
    numbers = {"files": [path.name for path in paths], "seconds_from_cold_start": seconds_of_this_process()}
    write_json(folder / "sample.json", config.model_dump() | numbers)
    return paths


def seconds_of_this_process() -> float:
    """Seconds since the operating system started this process: imports and loading included."""
    return round(time.time() - psutil.Process().create_time(), 2)


def load_pipeline(model: str, dtype: str) -> Any:
    """The pipeline of a folder or hub id, computing in ``fp32`` | ``fp16`` | ``bf16``."""
    from pixart_nb import PixArtSigmaPipeline
    from pixart_nb.core.backend import dtype_from_name

    return PixArtSigmaPipeline.from_pretrained(model, mindspore_dtype=dtype_from_name(dtype))


def _draw(pipe: Any, config: InferenceConfig) -> np.ndarray:
    """All prompts in one batch: (N, H, W, 3) float in [0, 1]."""
    from tqdm import tqdm

    with tqdm(total=config.sampling_steps, desc="draw", unit="step") as bar:
        return pipe(
            list(config.prompts),
            negative_prompt=config.negative_prompt,
            num_inference_steps=config.sampling_steps,
            guidance_scale=config.guidance_scale,
            height=config.image_height,
            width=config.image_width,
            generator=np.random.default_rng(config.seed),
            use_resolution_binning=False,
            output_type="np",
            callback=lambda *_: bar.update(),
        )[0]


def evaluate(
    model: str, count: int, vae: bool, dtype: str, output: str | os.PathLike[str], **options: Any
) -> dict[str, Any]:
    """Judge a model on held-out scenes; writes ``evaluation.json`` and ``pictures.png`` and returns the numbers.

    ``options`` are those of ``evaluate_model``: steps, guidance, batch_size, seed, height, width.
    """
    from pixart_nb.core.sampling.evaluation import evaluate_model, held_out_scenes, reconstruction_psnr

    scenes = held_out_scenes(count)
    pipe = load_pipeline(model, dtype)
    report = evaluate_model(pipe, scenes, **options)
    pictures = report.pop("pictures")
    if vae:
        plain = {key: options[key] for key in ("batch_size", "seed", "height", "width")}
        report["reconstruction_psnr"] = reconstruction_psnr(pipe.vae, scenes, **plain)
    folder = Path(output)
    write_picture(folder / "pictures.png", contact_sheet(pictures))
    report = {"model": model, "dtype": dtype, **options, **report}
    write_json(folder / "evaluation.json", report)
    return report


def table(report: dict[str, Any]) -> str:
    """The accuracies of an evaluation as lines of text."""
    lines = [f"{part:<10}{report['accuracy'][part]:>7.1%}" for part in ("object", "colour", "setting", "all")]
    lines.append(f"{report['count']} held-out scenes, {report['seconds_per_picture']:.2f} s a picture")
    if "reconstruction_psnr" in report:
        lines.append(f"autoencoder: {report['reconstruction_psnr']:.2f} dB")
    return "\n".join(lines)


def contact_sheet(pictures: np.ndarray, columns: int = SHEET_COLUMNS) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 edge to edge in rows, in order; the places that stay free are white."""
    count, height, width, _ = pictures.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, 3), 255, dtype=np.uint8)
    sheet[:count] = pictures
    sheet = sheet.reshape(rows, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return sheet.reshape(rows * height, columns * width, 3)


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Write (H, W, 3) uint8 as a PNG file, whole or not at all."""
    with written_beside(path) as unfinished:
        Image.fromarray(pixels).save(unfinished, format="PNG")


def _file_name(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")[:60]
