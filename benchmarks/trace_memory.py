"""Peak memory of a sampling run at 4K with and without a trace, and the time that a row of its map takes.

    python benchmarks/trace_memory.py                       # the width of XL/2, two blocks, two steps
    python benchmarks/trace_memory.py --width 288 --heads 4 --side 2048 --steps 4

The transformer has random weights and compresses keys and values; nothing is encoded or decoded. Every run is a process
of its own; read is the most memory that it held while sampling, without pages of mapped files. A row is the attention
of one patch to all keys, in all heads, computed from the trace and drawn over a picture of that size as a PNG. The
seconds of the runs say little: whatever else the machine does is in them. The command fails if a trace takes more than
1.5 GB over the run without it, if a row takes more than 2 s, or if the latents of two runs differ in a bit.

Measured with the defaults on two CPU cores, 2026-11-21: 6.11 GB without a trace, 6.47 GB with it (1.40 GB are announced
and kept; at the moment of the run's own peak less was there), a row in 0.7 s, drawn in 1.0 s, ten minutes in all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

WAYS = ("plain", "traced", "on disk")
#: What a trace may take over the run without it, gigabytes, and a row of its map, seconds.
MOST_GIGABYTES, MOST_SECONDS = 1.5, 2.0


def random_pipeline(options: argparse.Namespace):
    """A pipeline without text encoder and VAE around a transformer of the given size."""
    from pixart_nb import PixArtSigmaPipeline
    from pixart_nb.core import PixArt, PixArtConfig

    compression = {
        "sampling": "conv",
        "scale_factor": options.ratio,
        "kv_compress_layer": list(range(options.depth)),
    }
    config = PixArtConfig(
        hidden_size=options.width,
        num_heads=options.heads,
        depth=options.depth,
        caption_channels=64,
        input_size=options.side // 8,
        pe_interpolation=options.side / 512,
        kv_compress_config=compression if options.ratio > 1 else None,
    )
    net = PixArt(config)
    net.initialize(np.random.default_rng(0), zero_cross_attention=False)
    return PixArtSigmaPipeline(None, None, None, net, "dpm++")


def run(options: argparse.Namespace, way: str) -> dict:
    """Sample once and measure. For a process of its own."""
    from contextlib import nullcontext

    from pixart_nb.core import trace
    from pixart_nb.core.backend import ms
    from pixart_nb.core.memory import PeakMemory

    pipe = random_pipeline(options)
    rng = np.random.default_rng(1)
    given = {
        "prompt_embeds": ms.Tensor(rng.standard_normal((1, 20, 64), dtype=np.float32)),
        "prompt_attention_mask": np.ones((1, 20), bool),
        "height": options.side,
        "width": options.side,
        "num_inference_steps": options.steps,
        "guidance_scale": 1.0,
        "generator": rng,
    }
    said: list[str] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder = scratch if way == "on disk" else None
        watched = trace(pipe, options.layers, announce=said.append, folder=folder)
        started = time.perf_counter()
        with PeakMemory() as memory, nullcontext() if way == "plain" else watched as t:
            *_, last = pipe.sample(**given)
        numbers = {
            "gigabytes": memory.peak / 1e9,
            "seconds": time.perf_counter() - started,
            "latents": zlib.crc32(last.latents.tobytes()),
        }
        if t is not None:
            numbers |= {"announced": said[0], "kept": t.nbytes / 1e9} | row_times(t, Path(scratch))
    return numbers


def row_times(t, folder: Path) -> dict:
    """Seconds until the row of a patch in the middle is computed and drawn, and the largest error of its sum."""
    from pixart_nb.viz.attention import patch_attention

    (height, width), name = t.grid, t.names[-2]
    patch, picture = (height // 2, width // 2), np.zeros((16 * height, 16 * width, 3), np.uint8)
    started = time.perf_counter()
    row = t.rows(name, t.steps[-1], patch[0] * width + patch[1])[:, 0]
    computed = time.perf_counter() - started
    cells = row.mean(0).reshape(1, *t.key_grid(name))
    figure = patch_attention(picture, cells, patch, [name], t.compression(name)[1], t.grid)
    figure.savefig(folder / "row.png")
    return {
        "row": computed,
        "drawn": time.perf_counter() - started,
        "off": float(np.abs(row.sum(-1) - 1).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--side", type=int, default=4096, help="side of the picture in pixels; 4096 has 65,536 tokens"
    )
    parser.add_argument("--width", type=int, default=1152, help="hidden size; XL/2 has 1152")
    parser.add_argument("--heads", type=int, default=16, help="XL/2 has 16")
    parser.add_argument(
        "--depth", type=int, default=2, help="blocks; XL/2 has 28, which need no more at a time"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1], help="blocks that are traced")
    parser.add_argument("--ratio", type=int, default=2, help="compression of keys and values; 1 is none")
    parser.add_argument("--steps", type=int, default=2, help="sampling steps, all of which are traced")
    parser.add_argument("--ways", nargs="+", default=WAYS[:2], choices=WAYS, help="what to run")
    parser.add_argument("--folder", default=None, help="where temporary files go")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return print(json.dumps(run(options, options.measure)))
    results = {}
    for way in options.ways:
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", way]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[way] = found = json.loads(out.splitlines()[-1])
        over = found["gigabytes"] - results.get("plain", found)["gigabytes"]
        print(f"{way:<8}{found['gigabytes']:6.2f} GB (+{over:.2f}) {found['seconds']:7.1f} s")
        if "announced" in found:
            print(
                f"  {found['announced']}\n  kept {found['kept']:.2f} GB; a row in {found['row']:.2f} s, drawn in "
                f"{found['drawn']:.2f} s; its sum is off by {found['off']:.0e}"
            )
    latents = {found["latents"] for found in results.values()}
    print("the latents are the same, bit for bit" if len(latents) == 1 else "the latents DIFFER")
    least = results.get("plain", {"gigabytes": 0.0})["gigabytes"]
    traced = [found for way, found in results.items() if way != "plain"]
    much = [found for found in traced if found["gigabytes"] - least > MOST_GIGABYTES]
    slow = [found for found in traced if found["drawn"] > MOST_SECONDS]
    if much or slow or len(latents) > 1:
        sys.exit("too much memory, too slow a row, or other latents")


if __name__ == "__main__":
    main()
