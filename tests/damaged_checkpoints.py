"""Opens damaged checkpoints by the thousand, in a process of its own, and prints as JSON what came of it.

    python tests/damaged_checkpoints.py FOLDER COUNT

Every file must give a ``CheckpointError`` that names it, or tensors that can be read whole. Anything else ends the
process: another error with its traceback, a crash with its signal, and what takes over ``PATIENCE`` seconds of the
processor as a hang.
"""

import json
import signal
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from reference_data import official
from torch_files import as_saved, write_legacy, write_pickle

from pixart_nb.core import PixArtConfig, load_transformer
from pixart_nb.core.checkpoints.configuration import shown_by
from pixart_nb.core.checkpoints.files import WRITERS, open_checkpoint
from pixart_nb.core.checkpoints.layouts import to_official_names
from pixart_nb.core.checkpoints.pickle_program import MAX_VIEWS, MIN_SIZE
from pixart_nb.core.io import CheckpointError

PATIENCE = 20
KINDS = ("zip", "pickle", "legacy", "safetensors", "ckpt", "index")
LOADED_EVERY = 8


class Hang(BaseException):
    """Not an ``Exception``: nothing may catch it."""


def whole_files(folder: Path) -> dict[str, Path]:
    """A sound file of each kind, of the same transformer."""
    source = official("sigma-256")[0]
    tensors = open_checkpoint(source).tensors
    paths = {"zip": source, "legacy": folder / "legacy.pth"}
    named, storages = as_saved({name: np.asarray(t) for name, t in tensors.items()})
    write_legacy(paths["legacy"], {"state_dict": named}, storages)
    for kind in ("safetensors", "ckpt"):
        paths[kind] = folder / f"whole.{kind}"
        WRITERS[f".{kind}"](paths[kind], tensors)
    paths["index"] = folder / "model.safetensors.index.json"
    places = {name: f"model-{k % 3}.safetensors" for k, name in enumerate(tensors)}
    for shard in set(places.values()):
        part = {name: t for name, t in tensors.items() if places[name] == shard}
        WRITERS[".safetensors"](folder / shard, part)
    paths["index"].write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return paths


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one to three wounds, most of them where the structure is: near the beginning or the end."""
    out = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        size = max(len(out), 1)
        near = min(size, int(rng.choice([64, 2000, 20_000, size])))
        place = int(rng.integers(near)) if rng.random() < 0.7 else size - 1 - int(rng.integers(near))
        length = int(rng.choice([1, 2, 4, 8, 100]))
        wound = rng.integers(7)
        if wound == 0:
            out = out[:place]
        elif wound == 1:
            del out[place : place + length]
        elif wound == 2:
            out[place:place] = rng.bytes(length)
        elif wound == 3:
            out[place : place + length] = out[place // 2 : place // 2 + length]
        else:
            fill = [rng.bytes(length), b"\xff" * length, b"\0" * length][wound - 4]
            out[place : place + length] = fill
    return bytes(out)


def outcome(path: Path, load: bool) -> str:
    """``refused``, ``misfit`` (opened, but no whole transformer) or ``loaded``."""
    try:
        opened = open_checkpoint(path)
    except CheckpointError as error:
        return named(error, path, "refused")
    read = sum(np.asarray(tensor).nbytes for tensor in opened.tensors.values())
    assert read <= 2 * MAX_VIEWS * max(size_of(path), MIN_SIZE)
    try:
        view = to_official_names(opened)
        shown_by(view.complete, path)
        if load:
            load_transformer(path, PixArtConfig(num_heads=2))
    except CheckpointError as error:
        return named(error, path, "misfit")
    return "loaded"


def named(error: CheckpointError, path: Path, outcome: str) -> str:
    """The outcome, if the error names the file."""
    if path.name not in str(error):
        raise AssertionError(f"{path} is not named") from error
    return outcome


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.glob("*") if path.is_dir() else [path]))


def peak() -> int:
    """Largest resident size in MB (``ru_maxrss`` would count the process that started this one, too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024


def main(folder: Path, count: int) -> None:
    signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(Hang()))
    rng, whole = np.random.default_rng(0), whole_files(folder)
    sound = {kind: path.read_bytes() for kind, path in whole.items()}
    with zipfile.ZipFile(whole["zip"]) as archive:  # of these the pickle is damaged, but not its checksum
        members = {name: archive.read(name) for name in archive.namelist()}
    storages = {name.rsplit("/", 1)[1]: values for name, values in members.items() if "/data/" in name}
    program = next(values for name, values in members.items() if name.endswith("/data.pkl"))
    found = {kind: Counter() for kind in KINDS}
    slowest, before = 0.0, peak()
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        if kind == "pickle":
            path = write_pickle(folder / "damaged.bin", damaged(program, rng), storages)
        else:
            path = whole["index"] if kind == "index" else folder / f"damaged{whole[kind].suffix}"
            path.write_bytes(damaged(sound[kind], rng))
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)
        load = number // len(KINDS) % LOADED_EVERY == 0
        found[kind][outcome(folder if kind == "index" else path, load)] += 1
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - started)
    print(json.dumps({"found": found, "slowest": slowest, "grown_megabytes": peak() - before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
