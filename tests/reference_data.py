"""The reference outputs in ``tests/reference`` and how close ours must come to them."""

import json
from pathlib import Path

import numpy as np

REFERENCE = Path(__file__).parent / "reference"
OFFICIAL = sorted(path.name for path in (REFERENCE / "official").iterdir() if path.is_dir())
FORWARD, TRAJECTORY = 1e-4, 1e-3


def relative_error(ours, theirs) -> float:
    """||ours - theirs|| / ||theirs||, in float64."""
    ours, theirs = (np.asarray(part, np.float64) for part in (ours, theirs))
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def official(case: str) -> tuple[Path, dict, dict]:
    """Checkpoint path, configuration and input/output arrays of an official case."""
    folder = REFERENCE / "official" / case
    return (folder / "official.pth", json.loads((folder / "config.json").read_text()), dict(np.load(folder / "io.npz")))


def diffusers(name: str) -> tuple[Path, dict, dict]:
    """Folder, call and golden arrays of a diffusers pipeline."""
    folder = REFERENCE / "diffusers" / name
    return folder, json.loads((folder / "golden.json").read_text()), dict(np.load(folder / "golden.npz"))
