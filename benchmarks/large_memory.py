"""Peak memory of the two largest things at 4096x4096: one block of XL/2 over 65,536 tokens, and the VAE's decoding.

    python benchmarks/large_memory.py block --ratios 1 2    # two minutes or so on two cores, and the time of each
    python benchmarks/large_memory.py decode --rows 2       # the first rows of tiles; --rows 0 is all, half an hour

The weights are random, the shapes are the published ones. Every measurement is a process of its own; read is the most
memory that it held, without pages of mapped files, so Python and MindSpore are in it. After the first row of tiles
decoding takes no more than before, so a few rows tell its peak. Exit code 1 if more than --limit GB were taken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np


def block(options: argparse.Namespace) -> None:
    """A step of a transformer of one block, as sampling takes it, without guidance."""
    from pixart_nb.core import PixArt, PixArtConfig
    from pixart_nb.core.backend import ms
    from pixart_nb.core.fast import denoiser

    compression = {"sampling": "conv", "scale_factor": options.ratio, "kv_compress_layer": [0]}
    net = PixArt(
        PixArtConfig(
            depth=1,
            input_size=options.side // 8,
            kv_compress_config=compression if options.ratio > 1 else None,
        )
    )
    rng = np.random.default_rng(0)
    net.initialize(rng, zero_cross_attention=False)
    caption = ms.Tensor(rng.standard_normal((1, 20, net.config.caption_channels), dtype=np.float32))
    denoise = denoiser(net.set_train(False), caption, np.ones((1, 20), bool))
    latents = rng.standard_normal((1, 4, options.side // 8, options.side // 8), dtype=np.float32)
    denoise(ms.Tensor(latents), 500.0).asnumpy()


def decode(options: argparse.Namespace) -> None:
    """The coarse part of the decoder, the statistics of its norms, and rows of tiles, as drawing in stages has them."""
    from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig

    vae, rng = AutoencoderKL(VAEConfig()).set_train(False), np.random.default_rng(0)
    vae.initialize(rng)
    vae.enable_tiling(options.tile)
    cells = options.side // vae.factor
    coarse, tiles = (
        vae.decode_coarse(rng.standard_normal((1, 4, cells, cells), np.float32)),
        vae.decode_fine(),
    )
    for row in tiles.rows(coarse, tiles.measure(coarse)):
        if row.number + 1 == options.rows:
            return


def measured(options: argparse.Namespace) -> dict[str, float]:
    """For a process of its own: the most gigabytes that it held, and its seconds."""
    from pixart_nb.core.memory import PeakMemory

    with PeakMemory() as memory:
        started = time.perf_counter()
        {"block": block, "decode": decode}[options.what](options)
    return {"gigabytes": memory.peak / 1e9, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("block", "decode"))
    parser.add_argument("--side", type=int, default=4096, help="side of the picture in pixels")
    parser.add_argument(
        "--ratios", type=int, nargs="+", default=[1, 2], help="compressions of the block; 1 is none"
    )
    parser.add_argument("--tile", type=int, default=512, help="side of the tiles to decode by, pixels")
    parser.add_argument("--rows", type=int, default=2, help="rows of tiles to decode; 0 is all")
    parser.add_argument("--limit", type=float, default=4.0, help="GB")
    parser.add_argument("--ratio", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ratio is not None:
        return print(json.dumps(measured(options)))
    found = {}
    for ratio in options.ratios if options.what == "block" else [1]:
        command = [sys.executable, __file__, *sys.argv[1:], "--ratio", str(ratio)]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found[ratio] = json.loads(out.splitlines()[-1])
        name = f"{options.what}, ratio {ratio}" if options.what == "block" else options.what
        print(f"{name}: {found[ratio]['gigabytes']:.2f} GB, {found[ratio]['seconds']:.1f} s", flush=True)
    if len(found) > 1:
        share = found[max(found)]["seconds"] / found[min(found)]["seconds"]
        print(f"time with ratio {max(found)}, of that with ratio {min(found)}: {share:.2f}")
    worst = max(each["gigabytes"] for each in found.values())
    if worst > options.limit:
        sys.exit(f"{worst:.2f} GB are more than {options.limit:g}")


if __name__ == "__main__":
    main()
