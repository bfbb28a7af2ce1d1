"""Peak memory of a T5 encoder of XXL's width: loaded, in eight bits, and streamed layer by layer.

    python benchmarks/text_encoder_memory.py --layers 2 4

The weights are random, float16, sharded as the published ones. Every way runs in a process of its own, whose largest
resident size is read; what it holds before the encoder is loaded is taken off. Streaming should not depend on the
number of layers, and its embeddings should be those of the loaded encoder.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

WAYS = ("loaded", "int8", "streamed")
TOKENS = 20
WIDTH = 4096
#: Spread of T5's own initialisation, where it is not 1 / sqrt(width).
SPREAD = {"q": (WIDTH * 64) ** -0.5, "wo": 10240**-0.5, "shared": 1.0}


def write_weights(folder: Path, layers: int) -> None:
    """An encoder folder in the published layout, with a shard for each layer."""
    from pixart_nb.core.io import save_tensors, write_json

    rng = np.random.default_rng(layers)
    d, inner, ff, vocabulary = WIDTH, WIDTH, 10240, 32128
    places: dict[str, str] = {}

    def save(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {}
        for key, shape in shapes.items():
            spread = SPREAD.get(key.split(".")[-2], d**-0.5)
            values = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape, np.float32) * spread
            tensors[key] = values.astype(np.float16)
        save_tensors(folder / name, tensors)
        places.update(dict.fromkeys(shapes, name))

    save(
        "model-00000.safetensors", {"shared.weight": (vocabulary, d), "encoder.final_layer_norm.weight": (d,)}
    )
    for layer in range(layers):
        start = f"encoder.block.{layer}.layer"
        shapes = {f"{start}.0.SelfAttention.{part}.weight": (inner, d) for part in "qkvo"}
        shapes |= {f"{start}.{i}.layer_norm.weight": (d,) for i in range(2)}
        shapes |= {f"{start}.1.DenseReluDense.wi_{i}.weight": (ff, d) for i in range(2)}
        shapes |= {f"{start}.1.DenseReluDense.wo.weight": (d, ff)}
        if layer == 0:
            shapes[f"{start}.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
        save(f"model-{layer + 1:05d}.safetensors", shapes)
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})
    write_json(folder / "config.json", {"num_layers": layers})


def measure(folder: Path, way: str, dtype: str) -> None:
    """Encode one prompt and print the numbers as JSON. For a process of its own."""
    from pixart_nb import T5EncoderModel
    from pixart_nb.core.backend import dtype_from_name, ms

    before = peak()
    started = time.perf_counter()
    encoder = T5EncoderModel.from_pretrained(
        folder, mindspore_dtype=dtype_from_name(dtype), load_in_8bit=way == "int8", stream=way == "streamed"
    )
    ids = np.arange(2, 2 + TOKENS)[None]
    embeddings = encoder(ids, np.ones_like(ids, bool)).astype(ms.float32).asnumpy()
    np.save(folder / f"{way}.npy", embeddings)
    print(json.dumps({"gigabytes": peak() - before, "seconds": time.perf_counter() - started}))


def peak() -> float:
    """Largest resident size of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4], help="numbers of layers; XXL has 24")
    parser.add_argument("--dtype", default="fp16", help="of the loaded and streamed weights: fp16 or fp32")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(Path(options.measure[0]), options.measure[1], options.dtype)
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_weights(folder, layers)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
            print(f"{layers} layers, {size:.2f} GB of files")
            for way in WAYS:
                command = [sys.executable, __file__, "--dtype", options.dtype, "--measure", str(folder), way]
                out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                ours, theirs = np.load(folder / f"{way}.npy"), np.load(folder / "loaded.npy")
                error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
                print(f"  {way:<9}{out['gigabytes']:6.2f} GB {out['seconds']:6.1f} s   error {error:.1e}")


if __name__ == "__main__":
    main()
