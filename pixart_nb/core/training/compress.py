"""``pixart-nb compress``: a checkpoint with compressed keys and values, its error, and a training that reduces it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.config import SAMPLING_STEPS, ConfigError, check_config
from pixart_nb.core.checkpoints.compress import plan_compression
from pixart_nb.core.checkpoints.configuration import read_config
from pixart_nb.core.checkpoints.convert import convert, plan_conversion
from pixart_nb.core.checkpoints.load import load_transformer
from pixart_nb.core.io import write_json
from pixart_nb.core.sampling.samplers import image_generators
from pixart_nb.core.sampling.trajectory import TIMESTEPS, errors_along, errors_on_noise, follow
from pixart_nb.core.training.run import train

#: Default prompts of the measurement.
PROMPTS = ("a red mushroom in a forest", "a white cat on a beach", "a blue fish in the snow")
#: Defaults of the adaptation: the learning rate of the paper's stages, constant.
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
class CompressOptions:
    """Options of ``compress``.

    Args:
        source, target: checkpoint to compress, and file or folder to write.
        layers, ratio, operator: what is compressed, as ``plan_compression`` takes it.
        config, sample_size: what the tensors of the source do not show.
        model: folder of a pipeline whose text encoder reads ``prompts``. Without it the error is measured on random
            latents and captions.
        height, width: size of the images in pixels; 0 is the model's size.
        adapt: keys of a training configuration (``steps``, ``json_path``, ``image_dir``, ...); empty for no training.
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
    steps: int = SAMPLING_STEPS
    height: int = 0
    width: int = 0
    seed: int = 0
    adapt: dict[str, Any] = field(default_factory=dict)


def default_target(source: Path, ratio: int) -> Path:
    """Return the default path of a compressed checkpoint, beside its source.

    >>> default_target(Path("models/PixArt-Sigma-XL-2-1024-MS.pth"), 2).as_posix()
    'models/PixArt-Sigma-XL-2-1024-MS-kv2.safetensors'
    """
    stem = source.stem if source.suffix in (".pth", ".ckpt", ".safetensors", ".bin") else source.name
    return source.with_name(f"{stem}-kv{ratio}.safetensors")


def compress(options: CompressOptions) -> dict[str, Any]:
    """Write the compressed checkpoint and TARGET.errors.json, and return the content of the latter.

    ``before`` and ``after`` are the relative errors of the prediction against the uncompressed model at each of
    ``timesteps``, before and after the adaptation. An adaptation that was interrupted resumes.
    """
    target = Path(options.target)
    work = target.with_name(f"{target.name}.adapt")
    start = work / "start" if options.adapt else target  # a folder also keeps what tensors do not show
    config = read_config(options.config) if options.config else None
    layers, ratio, operator = options.layers, options.ratio, options.operator
    plan = plan_compression(options.source, start, layers, ratio, operator, config, options.sample_size, options.dtype)
    training = None
    if options.adapt:  # validated before anything is written
        if not options.model:
            raise ConfigError(
                "the adaptation trains on images and captions and needs a VAE and a text encoder: give --model, the "
                "folder of a pipeline"
            )
        own = {"model": options.model, "checkpoint": str(start), "output_path": str(work / "training")}
        training = check_config(_ADAPTATION | options.adapt | own, "train", "adaptation")
    convert(plan)
    described, errors = _error_measure(options, plan.source, config)
    report = {
        "source": str(options.source),
        "compression": plan.config.kv_compress_config,
        "adaptation": options.adapt,
        **described,
        "before": errors(start, plan.config),
    }
    if training:
        convert(plan_conversion(train(training) / "transformer", target, dtype=options.dtype))
        report["after"] = errors(target, plan.config)
    write_json(target.with_name(f"{target.name}.errors.json"), report)
    return report


def _error_measure(options: CompressOptions, source: Path, config: Any) -> tuple[dict[str, Any], Callable]:
    """Return what errors against the source are measured on, and a function from (checkpoint, config) to the errors."""
    net = load_transformer(source, config)
    side = 8 * net.config.input_size
    height, width = size = (options.height or side, options.width or side)
    if not options.model:
        measured_on = {"random": "latents and captions", "size": size}
        measure = lambda other: errors_on_noise(net, other, height, width)  # noqa: E731
        timesteps = list(TIMESTEPS)
    else:
        pipe = PixArtSigmaPipeline.from_pretrained(options.model, transformer=net, vae=None)
        prompts = list(options.prompts) or list(PROMPTS)
        rngs = image_generators(options.seed, range(len(prompts)))
        run = follow(pipe, prompts, height=height, width=width, generator=rngs, num_inference_steps=options.steps)
        pipe.text_encoder = None
        measured_on = {"prompts": prompts, "seed": options.seed, "size": size}
        measure = lambda other: errors_along(pipe, run, other)  # noqa: E731
        timesteps = [float(timestep) for timestep in run.timesteps]
    described = {"measured_on": measured_on, "timesteps": timesteps}
    return described, lambda path, config: measure(load_transformer(path, config)).tolist()
