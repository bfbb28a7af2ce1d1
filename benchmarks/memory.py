"""Peak memory of the largest operations, with random weights of the published shapes.

    python benchmarks/memory.py block            # one block of XL/2 over the 65,536 tokens of a 4096 x 4096 image
    python benchmarks/memory.py decode           # the first tiles of a 4096 x 4096 image
    python benchmarks/memory.py text-encoder     # layers of T5 XXL: whole, in eight bits, in four, streamed
    python benchmarks/memory.py trace            # two denoising steps at 4096 x 4096, also with a trace
    python benchmarks/memory.py convert          # a checkpoint of XL/2's size between the layouts

Every measurement runs in a process of its own and reports the most memory that the process held, without pages of
mapped files. The exit code is 1 if a limit is exceeded, or if results differ that must be equal.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb import PixArtSigmaPipeline, T5EncoderModel
from pixart_nb.core import PixArt, PixArtConfig, trace
from pixart_nb.core.backend import dtype_from_name, ms
from pixart_nb.core.checkpoints.convert import convert, plan_conversion, write_random
from pixart_nb.core.cost import parameters
from pixart_nb.core.fast import denoiser
from pixart_nb.core.memory import PeakMemory, run_in_subprocess
from pixart_nb.core.models.low_precision import unsupported
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.run_plan import PROCESS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.mindspore_work import write_text_encoder
from benchmarks.shapes import Shapes

#: Ways of loading T5: arguments of ``T5EncoderModel.from_pretrained``.
T5_LOADS: dict[str, dict[str, bool]] = {
    "whole": {},
    "int8": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True},
    "streamed": {"stream": True},
}


def random_transformer(side: int, ratio: int, **config: Any) -> PixArt:
    """Build a transformer for images of ``side`` pixels; with a ratio above 1 every block compresses its keys."""
    layers = list(range(config.get("depth", 1)))
    compression = {"sampling": "conv", "scale_factor": ratio, "kv_compress_layer": layers}
    net = PixArt(
        PixArtConfig(
            **{"depth": 1, "input_size": side // 8, "pe_interpolation": side / 512} | config,
            kv_compress_config=compression if ratio > 1 else None,
        )
    )
    net.initialize(np.random.default_rng(0), zero_cross_attention=False)
    return net.set_train(False)


# ---- what runs in the subprocess


def measured(function: Callable[..., dict[str, Any] | None], *args: Any) -> dict[str, Any]:
    """Return ``gigabytes`` and ``seconds`` of a call, and what the call returns."""
    with PeakMemory() as memory:
        started = time.perf_counter()
        result = function(*args) or {}
    return {"gigabytes": memory.peak / 1e9, "seconds": time.perf_counter() - started} | result


def block(side: int, ratio: int) -> None:
    """Run one block without guidance."""
    net, rng = random_transformer(side, ratio), np.random.default_rng(1)
    caption = ms.Tensor(rng.standard_normal((1, 20, net.config.caption_channels), np.float32))
    latents = rng.standard_normal((1, 4, side // 8, side // 8), np.float32)
    denoiser(net, caption, np.ones((1, 20), bool))(ms.Tensor(latents), 500.0).asnumpy()


def decode(side: int, rows: int) -> None:
    """Decode the first rows of tiles; later rows need no more memory."""
    vae, rng = AutoencoderKL(VAEConfig()).set_train(False), np.random.default_rng(0)
    vae.initialize(rng)
    vae.enable_tiling(512)
    cells = side // vae.factor
    coarse = vae.decode_coarse(rng.standard_normal((1, 4, cells, cells), np.float32))
    tiles = vae.decode_fine()
    for row in tiles.rows(coarse, tiles.measure(coarse)):
        if row.number + 1 == rows:
            return


def encode(folder: Path, load: str) -> dict[str, Any]:
    """Load a text encoder in one of ``T5_LOADS`` and encode 20 tokens."""
    encoder = T5EncoderModel.from_pretrained(folder, mindspore_dtype=dtype_from_name("fp16"), **T5_LOADS[load])
    ids = np.arange(2, 22)[None]
    return {"embeddings": encoder(ids, np.ones_like(ids, bool)).astype(ms.float32).asnumpy()}


def sample(side: int, width: int, steps: int, traced: bool) -> dict[str, Any]:
    """Sample with two blocks, and compute the attention of one patch from the trace."""
    net = random_transformer(side, 2, depth=2, hidden_size=width, num_heads=width // 72, caption_channels=64)
    pipe, rng = PixArtSigmaPipeline(None, None, None, net, "dpm++"), np.random.default_rng(1)
    arguments = {
        "prompt_embeds": ms.Tensor(rng.standard_normal((1, 20, 64), np.float32)),
        "prompt_attention_mask": np.ones((1, 20), bool),
        "height": side,
        "width": side,
        "num_inference_steps": steps,
        "guidance_scale": 1.0,
        "generator": rng,
    }
    if not traced:
        *_, last = pipe.sample(**arguments)
        return {"latents": zlib.crc32(last.latents.tobytes())}
    with trace(pipe, [0, 1]) as t:
        *_, last = pipe.sample(**arguments)
    started = time.perf_counter()
    t.rows(t.names[-2], t.steps[-1], t.grid[0] * t.grid[1] // 2)
    row = time.perf_counter() - started
    return {"latents": zlib.crc32(last.latents.tobytes()), "kept": t.nbytes / 1e9, "row": row}


def conversion(source: Path, target: Path, dtype: str) -> None:
    """Convert a checkpoint."""
    convert(plan_conversion(source, target, sample_size=128, dtype=dtype))


# ---- the measurements


def in_process(name: str, function: Callable[..., Any], *args: Any, more: str = "") -> dict[str, Any]:
    """Measure a call in a process of its own and print a line."""
    result = run_in_subprocess(f"measures {name}", measured, function, *args)
    extra = f", {more.format(**result)}" if more else ""
    print(f"{name}: {result['gigabytes']:.2f} GB, {result['seconds']:.1f} s{extra}", flush=True)
    return result


def measure_block(options: argparse.Namespace) -> bool:
    """Compare one block without and with compression by 2."""
    results = [in_process(f"block, ratio {ratio}", block, options.side, ratio) for ratio in (1, 2)]
    print(f"time with ratio 2 / without: {results[1]['seconds'] / results[0]['seconds']:.2f}")
    return max(result["gigabytes"] for result in results) <= 4.0


def measure_decode(options: argparse.Namespace) -> bool:
    """Measure two rows of tiles."""
    return in_process("decode", decode, options.side, 2)["gigabytes"] <= 4.0


def measure_text_encoder(options: argparse.Namespace) -> bool:
    """Compare the ways of loading T5, in bfloat16 where the processor has it (float32 elsewhere).

    Streaming needs the same memory for any number of layers. With all 24, whole weights take at most 2.1 bytes each.
    """
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_text_encoder(Shapes(text_layers=options.layers), Path(folder))
        results = {load: in_process(load, encode, Path(folder), load) for load in T5_LOADS}
    whole, weights = results["whole"]["embeddings"], parameters(T5Config(num_layers=options.layers))
    for load, result in results.items():
        error = np.linalg.norm(result["embeddings"] - whole) / np.linalg.norm(whole)
        size = (result["gigabytes"] - PROCESS / 1e9) / weights * 1e9
        print(f"{load}: {size:.2f} bytes per weight at the worst moment, relative error {error:.1e}")
        if load == "whole" and options.layers == 24 and not unsupported() and size > 2.1:
            return False
    return np.array_equal(results["streamed"]["embeddings"], whole)


def measure_trace(options: argparse.Namespace) -> bool:
    """Compare sampling without and with a trace: equal latents, at most 1.5 GB more, a row of a map in 2 s."""
    plain = in_process("sampling", sample, options.side, options.width, options.steps, False)
    more = "trace of {kept:.2f} GB, a row of its map in {row:.2f} s"
    traced = in_process("with a trace", sample, options.side, options.width, options.steps, True, more=more)
    equal = plain["latents"] == traced["latents"]
    print("the latents are equal, bit for bit" if equal else "the latents DIFFER")
    return equal and traced["gigabytes"] - plain["gigabytes"] <= 1.5 and traced["row"] <= 2.0


def measure_convert(options: argparse.Namespace) -> bool:
    """Convert around all layouts: at most 1.3 times the size of the source."""
    route = [
        ("official.pth", "diffusers", "keep"),
        ("diffusers", "back.ckpt", "keep"),
        ("back.ckpt", "back.pth", "keep"),
        ("official.pth", "bf16.safetensors", "bf16"),
    ]
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        write_random(folder / "official.pth", PixArtConfig(depth=options.depth), dtype="fp16")
        size = (folder / "official.pth").stat().st_size / 1e9
        print(f"a checkpoint of {size:.2f} GB")
        peaks = [
            in_process(f"{a} -> {b} ({dtype})", conversion, folder / a, folder / b, dtype)["gigabytes"]
            for a, b, dtype in route
        ]
    return max(peaks) <= max(1.3 * size, 0.6)


MEASUREMENTS = {
    "block": measure_block,
    "decode": measure_decode,
    "text-encoder": measure_text_encoder,
    "trace": measure_trace,
    "convert": measure_convert,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--side", type=int, default=4096, help="side of the image in pixels")
    parser.add_argument("--width", type=int, default=1152, help="trace: channels of the transformer, a multiple of 72")
    parser.add_argument("--steps", type=int, default=2, help="trace: denoising steps")
    parser.add_argument("--layers", type=int, default=2, help="text-encoder: number of layers; XXL has 24")
    parser.add_argument("--depth", type=int, default=28, help="convert: blocks; XL/2 has 28")
    parser.add_argument("--folder", help="where temporary files go")
    options = parser.parse_args()
    return 0 if MEASUREMENTS[options.measurement](options) else 1


if __name__ == "__main__":
    from benchmarks import memory  # functions of an imported module can be sent to another process

    sys.exit(memory.main())
