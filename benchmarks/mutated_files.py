"""Load mutated copies of every kind of file that the kit reads; each must be refused by name or load.

    python benchmarks/mutated_files.py [--count 300] [--form vae_config ...]

A row for each form: how many loaded, how many were refused with an error of the kit, how many failed in any other way
(a traceback, 20 s of CPU time, or other values of a file that carries checksums), the slowest, and the growth of the
process in MB. Exit code 1 if any failed. Measured on one CPU core: 300 of each of the 17 forms take two minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core import PixArtConfig, load_transformer
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import LOADERS
from pixart_nb.core.checkpoints.convert import WRITERS
from pixart_nb.core.checkpoints.files import open_checkpoint
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.lora.adapters import Adapters
from pixart_nb.core.lora.config import LoraConfig
from pixart_nb.core.lora.files import LoraFile, read_lora

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from torch_files import as_saved, write_legacy

REFERENCE = Path(__file__).resolve().parents[1] / "tests" / "reference"
PATIENCE = 20
#: Values that replace one in a JSON file.
VALUES = (None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, float("nan"), "", "x", "../../etc", [], [[]], {}, {"a": 1})
#: Files of other programs, which carry no checksums.
FOREIGN_WRITERS: dict[str, Callable[[Path, dict[str, np.ndarray]], Any]] = {
    "foreign.safetensors": lambda path, arrays: save_file(arrays, path),
    "foreign.ckpt": lambda path, arrays: ms.save_checkpoint(
        [{"name": name, "data": ms.Tensor(value)} for name, value in arrays.items()], str(path)
    ),
    "foreign.pth": lambda path, arrays: write_legacy(path, *as_saved(arrays)),
}


class Form(NamedTuple):
    """A sound file, the names that an error has to contain, its loader, and True if it carries checksums."""

    path: Path
    names: tuple[str, ...]
    load: Callable[[], Any]
    checked: bool = False


class Hang(BaseException):
    """Raised after ``PATIENCE`` seconds of CPU time; no handler of exceptions catches it."""


def forms(folder: Path) -> dict[str, Form]:
    """Write sound files of each form into ``folder``."""
    pipeline = folder / "pipeline"
    shutil.copytree(REFERENCE / "diffusers" / "sigma", pipeline, ignore=shutil.ignore_patterns("*golden*"))
    tensors = open_checkpoint(REFERENCE / "official" / "sigma-256" / "official.pth").tensors
    config = PixArtConfig(num_heads=2)
    out: dict[str, Form] = {}
    for name in (".pth", ".safetensors", ".ckpt", "foreign.safetensors", "foreign.ckpt", "foreign.pth"):
        path = folder / f"a{name}"
        WRITERS[path.suffix](path, tensors)
        if name in FOREIGN_WRITERS:
            FOREIGN_WRITERS[name](path, {key: np.asarray(tensor) for key, tensor in tensors.items()})
        load = lambda path=path: load_transformer(path, config)  # noqa: E731
        out[name.removeprefix(".")] = Form(path, (path.name,), load, name not in FOREIGN_WRITERS)
    shards = folder / "shards"
    shards.mkdir()
    shutil.copy(folder / "a.safetensors", shards / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    load = lambda: open_checkpoint(shards)  # noqa: E731
    out["index of shards"] = Form(shards / "model.safetensors.index.json", ("shards",), load)
    net = load_transformer(pipeline / "transformer")
    adapter = Adapters.of(net).add("a", LoraConfig(r=2, target_modules=("to_q", "ff.net.2")))
    for layout in ("diffusers", "peft"):
        path = adapter.save(folder / layout, layout)
        load = lambda path=path: read_lora(path)  # noqa: E731
        out[f"lora {layout}"] = Form(path, (path.name,), load, True)
    out["lora config"] = Form(path.with_name("adapter_config.json"), (path.parent.name,), load)
    for part in ("transformer", "vae", "text_encoder", "scheduler", "tokenizer"):
        file = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(part, "config.json")
        load = lambda part=part: LOADERS[part](pipeline / part, ms.float32)  # noqa: E731
        out[f"{part} config"] = Form(pipeline / part / file, (part,), load)
    out["spiece.model"] = Form(pipeline / "tokenizer" / "spiece.model", ("tokenizer",), load)
    load = lambda: PixArtSigmaPipeline.from_pretrained(pipeline)  # noqa: E731
    out["model_index.json"] = Form(pipeline / "model_index.json", ("pipeline",), load)
    return out


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Change one to three places, mostly near the beginning or the end, where the structure of a file is."""
    out = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        size = max(len(out), 1)
        reach = min(size, int(rng.choice([64, 2000, 20_000, size])))
        start = int(rng.integers(reach)) if rng.random() < 0.7 else size - 1 - int(rng.integers(reach))
        length = int(rng.choice([1, 2, 4, 8, 100]))
        change = rng.integers(7)
        if change == 0:
            out = out[:start]
        elif change == 1:
            del out[start : start + length]
        elif change == 2:
            out[start:start] = rng.bytes(length)
        elif change == 3:
            out[start : start + length] = out[start // 2 : start // 2 + length]
        else:
            out[start : start + length] = [rng.bytes(length), b"\xff" * length, b"\0" * length][change - 4]
    return bytes(out)


def mutated_json(content: bytes, rng: np.random.Generator) -> bytes:
    """Replace one value of a JSON object, remove it, or add an unknown key; or change bytes."""
    values = json.loads(content)
    keys = sorted(values)
    key = keys[int(rng.integers(len(keys)))]
    change = rng.integers(8)
    if change == 0:
        return mutated(content, rng)
    if change == 1:
        del values[key]
    elif change == 2:
        values["unknown"] = values[key]
    elif change == 3 and type(values[key]) in (int, float):
        values[key] = values[key] * float(rng.choice([-1, 0.5, 1e6]))
    elif change == 4 and isinstance(values[key], list):
        values[key] = values[key] * int(rng.choice([0, 2, 10_000]))
    else:
        values[key] = VALUES[int(rng.integers(len(VALUES)))]
    return json.dumps(values).encode()


def mutated_zip(path: Path, content: bytes, rng: np.random.Generator) -> bytes:
    """Change the pickle of a torch file, but not its checksum; or bytes of the archive."""
    if rng.random() < 0.5:
        return mutated(content, rng)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    other = path.with_name("mutated.zip")
    with zipfile.ZipFile(other, "w") as archive:
        for name, values in members.items():
            archive.writestr(name, mutated(values, rng) if name.endswith("data.pkl") else values)
    return other.read_bytes()


def fingerprint(loaded: Any) -> int:
    """Return a checksum of the values of a network or a LoRA."""
    if isinstance(loaded, LoraFile):
        arrays = {f"{n} {m.scale}": np.concatenate([m.down, m.up.T], 1) for n, m in loaded.modules.items()}
    else:
        arrays = {name: p.asnumpy() for name, p in loaded.parameters_and_names()}
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(np.ascontiguousarray(arrays[name]), zlib.crc32(name.encode(), total))
    return total


def outcome(form: Form, sound: int | None = None) -> str:
    """Return ``loaded``, ``refused``, or a description of any other failure."""
    try:
        loaded = form.load()
        if sound is not None and fingerprint(loaded) != sound:
            return "failed: other values than those of the sound file"
    except PixArtNBError as error:
        if len(str(error)) > 2000 or not any(name in str(error) for name in form.names):
            return f"failed: a message that names no file, or is endless: {error!s:.200}"
        return "refused"
    except Hang:
        return "failed: it hangs"
    except BaseException as error:  # noqa: BLE001
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"failed: {type(error).__name__}: {error!s:.200} ({Path(place.filename).name}:{place.lineno})"
    return "loaded"


def peak_megabytes() -> int:
    """Return the largest resident size of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024


def measure(name: str, form: Form, count: int, rng: np.random.Generator) -> dict[str, Any]:
    """Load ``count`` mutated copies of one form."""
    sound, outcomes, slowest = form.path.read_bytes(), Counter(), 0.0
    reference = fingerprint(form.load()) if form.checked else None
    before = peak_megabytes()
    for _ in range(count):
        if form.path.suffix == ".json":
            content = mutated_json(sound, rng)
        else:
            content = mutated_zip(form.path, sound, rng) if zipfile.is_zipfile(form.path) else mutated(sound, rng)
        form.path.write_bytes(content)
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        outcomes[outcome(form, reference)] += 1
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - started)
        form.path.write_bytes(sound)
    failures = {key: number for key, number in outcomes.items() if key.startswith("failed")}
    row = {"form": name, "loaded": outcomes["loaded"], "refused": outcomes["refused"]}
    row |= {"failed": sum(failures.values()), "slowest s": round(slowest, 2), "MB": peak_megabytes() - before}
    return row | ({"failures": failures} if failures else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="mutated files of each form")
    parser.add_argument("--form", nargs="*", help="forms to load, all by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(Hang()))
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, form in forms(Path(folder)).items():
            if not options.form or name in options.form:
                row = measure(name, form, options.count, np.random.default_rng((options.seed, len(name))))
                failed += row["failed"]
                print(json.dumps(row), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
