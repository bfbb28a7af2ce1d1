"""``pixart-nb compress``: a compressed checkpoint, its error at every timestep, and a short training that lowers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.config import ConfigError, check_config
from pixart_nb.core.checkpoints.compress import plan_compression
from pixart_nb.core.checkpoints.configuration import read_config
from pixart_nb.core.checkpoints.convert import convert, plan_conversion
from pixart_nb.core.checkpoints.load import load_transformer
from pixart_nb.core.io import write_json
from pixart_nb.core.sampling.output_error import TIMESTEPS, errors_along, errors_on_noise, reference_run
from pixart_nb.viz.tables import Table

#: What the error is measured on unless told.
PROMPTS = ("a red mushroom in a forest", "a white cat on a beach", "a blue fish in the snow")
#: The training of an adaptation where it is not told otherwise: the rate of the paper's stages, all the time.
_ADAPTATION = {
    "steps": 100,
    "start_learning_rate": 2e-5,
    "warmup_steps": 0,
    "auto_lr": "",
    "optim": "adamw",
    "clip_grad": False,
    "use_ema": False,
    "batch_size": 8,
    "start_report": False,
}


@dataclass(frozen=True)
class Compression:
    """What is compressed, and how the error is measured and lowered.

    ``model``: folder of a pipeline whose text encoder reads the ``prompts``; without it the error is measured on random
    latents and captions. ``height`` and ``width`` of the pictures in pixels, 0 for the model's own. ``adapt``: keys of
    a training configuration (``steps``, ``json_path``, ``image_dir``, ...); empty for none.
    """

    source: Path
    target: Path
    layers: str = "deep"
    ratio: int = 2
    operator: str = "conv"
    config: Path | None = None
    sample_size: int | None = None
    dtype: str = "keep"
    model: str = ""
    prompts: Sequence[str] = ()
    steps: int = 20
    height: int = 0
    width: int = 0
    seed: int = 0
    adapt: dict[str, Any] = field(default_factory=dict)


def default_target(source: Path, ratio: int) -> Path:
    """Where a compressed checkpoint goes unless told: beside its source.

    >>> default_target(Path("models/PixArt-Sigma-XL-2-1024-MS.pth"), 2).as_posix()
    'models/PixArt-Sigma-XL-2-1024-MS-kv2.safetensors'
    """
    stem = source.stem if source.suffix in (".pth", ".ckpt", ".safetensors", ".bin") else source.name
    return source.with_name(f"{stem}-kv{ratio}.safetensors")


def compress(wanted: Compression) -> dict[str, Any]:
    """Write the compressed checkpoint, and beside it TARGET.errors.json, which is also returned.

    ``timesteps``, and by them the relative errors of the prediction against the uncompressed model: ``before`` any
    adaptation and, if there was one, ``after``. A training that was stopped goes on when this is called again.
    """
    target = Path(wanted.target)
    work = target.with_name(f"{target.name}.adapt")
    start = work / "start" if wanted.adapt else target  # a folder says what its tensors do not show
    said = read_config(wanted.config) if wanted.config else None
    plan = plan_compression(
        wanted.source,
        start,
        wanted.layers,
        wanted.ratio,
        wanted.operator,
        said,
        wanted.sample_size,
        wanted.dtype,
    )
    training = _training(wanted, start, work) if wanted.adapt else None
    convert(plan)
    errors = _Errors(wanted, plan.source, said)
    report = {
        "source": str(wanted.source),
        "compression": plan.config.kv_compress_config,
        "measured_on": errors.measured_on,
        "adaptation": wanted.adapt,
        "timesteps": errors.timesteps,
        "before": errors.of(start, plan.config),
    }
    if training:
        from pixart_nb.core.training.run import train

        convert(plan_conversion(train(training) / "transformer", target, dtype=wanted.dtype))
        report["after"] = errors.of(target, plan.config)
    write_json(target.with_name(f"{target.name}.errors.json"), report)
    return report


def _training(wanted: Compression, start: Path, work: Path) -> Any:
    """The training configuration of the adaptation, checked before anything is written."""
    if not wanted.model:
        raise ConfigError(
            "an adaptation trains on pictures and captions, for which it needs the autoencoder and the text encoder: "
            "give --model, the folder of their pipeline"
        )
    own = {"model": wanted.model, "checkpoint": str(start), "output_path": str(work / "training")}
    return check_config(_ADAPTATION | wanted.adapt | own, "train", "adaptation")


class _Errors:
    """Errors of compressed checkpoints against the source: along a run with prompts, or on random latents."""

    def __init__(self, wanted: Compression, source: Path, said: Any):
        self.net = load_transformer(source, said)
        side = 8 * self.net.config.input_size
        self.size = (wanted.height or side, wanted.width or side)
        self.pipe = self.run = None
        if wanted.model:
            self.pipe = PixArtSigmaPipeline.from_pretrained(wanted.model, transformer=self.net, vae=None)
            prompts = list(wanted.prompts) or list(PROMPTS)
            height, width = self.size
            self.run = reference_run(
                self.pipe, prompts, wanted.steps, wanted.seed, height=height, width=width
            )
            self.pipe.text_encoder = None
            self.measured_on = {"prompts": prompts, "seed": wanted.seed, "size": self.size}
            self.timesteps = [float(timestep) for timestep in self.run.timesteps]
        else:
            self.measured_on = {"random": "latents and captions", "size": self.size}
            self.timesteps = list(TIMESTEPS)

    def of(self, checkpoint: Path, config: Any) -> list[float]:
        """The relative error at each of ``timesteps``."""
        other = load_transformer(checkpoint, config)
        if self.run is None:
            return errors_on_noise(self.net, other, *self.size).tolist()
        return errors_along(self.pipe, self.run, other).tolist()


def table(report: dict[str, Any]) -> Table:
    """The errors as a table that a terminal and a notebook show."""
    names = ["before", "after"] if "after" in report else ["before"]
    rows = [
        {"timestep": round(timestep), **{name: report[name][k] for name in names}}
        for k, timestep in enumerate(report["timesteps"])
    ]
    mean = {"timestep": "mean", **{name: float(np.mean(report[name])) for name in names}}
    return Table([*rows, mean], "Relative error of the prediction against the uncompressed model")
