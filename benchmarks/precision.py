"""Errors of bfloat16 against float32, in this kit and in diffusers: one forward pass, and the latents after 20 steps.

    python -m benchmarks.precision                               # the bundled model, with prompts of its own
    python -m benchmarks.precision --depth 28 --size 256         # XL/2 with random weights

Both systems load the same weights in the same layout and draw from the same noise. Each is compared with itself in
float32. Needs PyTorch and diffusers: pip install -e '.[reference]'.

Measured with the bundled model (MindSpore 2.8.0, diffusers 0.42.1, PyTorch 2.14.1, an AMD EPYC): forward 2.4e-3 here,
7.5e-3 in diffusers; 20 steps 1.3e-2 here, 3.2e-2 in diffusers. In float32 the two differ by 4e-7 and 2e-6.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.memory import run_in_subprocess

BUNDLED = Path(__file__).resolve().parents[1] / "data/tiny-sigma"
PROMPTS = ("a red mushroom on grass", "a blue cup in the desert")
#: Timesteps of the forward passes.
TIMESTEPS = (900.0, 500.0, 100.0)
Arrays = dict[str, np.ndarray]


def write_random(folder: Path, depth: int, size: int) -> None:
    """Write a transformer of XL/2's width in which every part shows."""
    from benchmarks.mindspore_work import transformer_config
    from benchmarks.shapes import Shapes
    from pixart_nb.core import PixArt
    from pixart_nb.core.backend import ms
    from pixart_nb.core.checkpoints.components import write_transformer

    net, rng = PixArt(transformer_config(Shapes(depth=depth, size=size))), np.random.default_rng(0)
    for parameter in net.get_parameters():
        scale = 0.02 if parameter.ndim == 1 else np.prod(parameter.shape[1:]) ** -0.5
        parameter.set_data(ms.Tensor((scale * rng.standard_normal(parameter.shape)).astype(np.float32)))
    write_transformer(folder / "transformer", net)


def random_inputs(channels: int, cells: int) -> Arrays:
    """Return random embeddings of two captions and an empty one, and the noise of two images."""
    rng = np.random.default_rng(1)
    captions = rng.standard_normal((2, 20, channels), dtype=np.float32)
    return {"captions": captions, "empty": captions[:, :1], "noise": _noise(2, cells)}


def bundled_inputs() -> Arrays:
    """Return the embeddings of ``PROMPTS`` and of the empty prompt by the bundled model, and the noise."""
    from pixart_nb import PixArtSigmaPipeline

    pipe = PixArtSigmaPipeline.from_pretrained(BUNDLED, transformer=None, vae=None)
    embeds, mask, empty, empty_mask = (x.asnumpy() if hasattr(x, "asnumpy") else x for x in pipe.encode_prompt(PROMPTS))
    shortest, shortest_empty = int(mask.sum(1).min()), int(empty_mask.sum(1).min())  # without padding
    return {"captions": embeds[:, :shortest], "empty": empty[:, :shortest_empty], "noise": _noise(len(PROMPTS), 16)}


def _noise(count: int, cells: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal((count, 4, cells, cells), dtype=np.float32)


def mindspore_results(folder: Path, inputs: Arrays, steps: int, dtype: str) -> Arrays:
    """Return the predictions and the latents after all steps of this kit."""
    from pixart_nb import PixArtSigmaPipeline
    from pixart_nb.core import load_transformer
    from pixart_nb.core.backend import dtype_from_name, ms
    from pixart_nb.core.fast import denoiser

    net = load_transformer(folder / "transformer", dtype=dtype_from_name(dtype))
    captions, empty, noise = (ms.Tensor(inputs[name]) for name in ("captions", "empty", "noise"))
    step = denoiser(net, captions, None)
    forward = np.stack([step(noise, timestep).astype(ms.float32).asnumpy() for timestep in TIMESTEPS])
    pipe = PixArtSigmaPipeline(None, None, None, net, "dpm++")
    masks = [np.ones(x.shape[:2], bool) for x in (captions, empty)]
    *_, last = pipe.sample(
        prompt_embeds=captions,
        prompt_attention_mask=masks[0],
        negative_prompt_embeds=empty,
        negative_prompt_attention_mask=masks[1],
        latents=noise,
        num_inference_steps=steps,
        height=8 * noise.shape[2],
        width=8 * noise.shape[3],
    )
    return {"forward": forward, "sampled": np.asarray(last.latents)}


def diffusers_results(folder: Path, inputs: Arrays, steps: int, dtype: str) -> Arrays:
    """Return the predictions and the latents after all steps of diffusers."""
    import diffusers
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    net = diffusers.PixArtTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=kind).eval()
    captions, empty, noise = (torch.from_numpy(inputs[name]).to(kind) for name in ("captions", "empty", "noise"))
    options = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False}
    with torch.no_grad():
        forward = [
            net(noise, timestep=torch.full((len(noise),), t), encoder_hidden_states=captions, **options)[0]
            for t in TIMESTEPS
        ]
        scheduler = diffusers.DPMSolverMultistepScheduler(beta_end=0.02, beta_schedule="linear")
        pipe = diffusers.PixArtSigmaPipeline(None, None, None, net, scheduler)
        length = captions.shape[1]
        padded = torch.nn.functional.pad(empty, (0, 0, 0, length - empty.shape[1]))
        sampled = pipe(
            prompt=None,
            negative_prompt=None,
            prompt_embeds=captions,
            prompt_attention_mask=torch.ones(captions.shape[:2]),
            negative_prompt_embeds=padded,
            negative_prompt_attention_mask=(torch.arange(length) < empty.shape[1]).float().repeat(len(noise), 1),
            latents=noise,
            num_inference_steps=steps,
            height=8 * noise.shape[2],
            width=8 * noise.shape[3],
            use_resolution_binning=False,
            output_type="latent",
        ).images
    return {"forward": torch.stack(forward).float().numpy(), "sampled": sampled.float().numpy()}


def relative_error(values: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference relative to that of ``expected``."""
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def errors(folder: Path, inputs: Arrays, steps: int, systems: dict[str, Callable]) -> list[tuple[str, float, float]]:
    """Return lines of a name and its relative errors, forward and after all steps: of bf16 in each system, and of fp32.

    Every result is computed in a process of its own.
    """
    results: dict[tuple[str, str], Any] = {
        (system, dtype): run_in_subprocess(f"computes {system} in {dtype}", function, folder, inputs, steps, dtype)
        for system, function in systems.items()
        for dtype in ("fp32", "bf16")
    }
    pairs = [(f"{name}, bf16 against fp32", (name, "bf16"), (name, "fp32")) for name in systems]
    names = [*systems]
    pairs += [(f"{names[0]} against {name}, fp32", (names[0], "fp32"), (name, "fp32")) for name in names[1:]]
    return [
        (text, *(relative_error(results[own][part], results[other][part]) for part in ("forward", "sampled")))
        for text, own, other in pairs
    ]


SYSTEMS = {"mindspore": mindspore_results, "diffusers": diffusers_results}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=0, help="blocks of XL/2 with random weights; 0: the bundled model")
    parser.add_argument("--size", type=int, default=256, help="side in pixels of the images of XL/2")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, inputs = BUNDLED, None
        if options.depth:
            folder = Path(temporary)
            run_in_subprocess("writes random weights", write_random, folder, options.depth, options.size)
            inputs = random_inputs(4096, options.size // 8)
        inputs = inputs or run_in_subprocess("encodes the prompts", bundled_inputs)
        print(f"{'relative error':<36}{'forward':>10}{f'{options.steps} steps':>10}")
        for name, forward, sampled in errors(folder, inputs, options.steps, SYSTEMS):
            print(f"{name:<36}{forward:>10.2e}{sampled:>10.2e}")
    return 0


if __name__ == "__main__":
    from benchmarks import precision  # functions of an imported module can be sent to another process

    sys.exit(precision.main())
