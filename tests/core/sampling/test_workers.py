"""Sampling by several processes that msrun starts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from msrun import logs, msrun
from PIL import Image
from typer.testing import CliRunner

from pixart_nb.cli import app

PROMPTS = ["a red mushroom on grass", "a blue fish in the snow", "a green tree at night"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("msrun"), reason="runs once MindSpore's msrun is on the PATH")
def test_two_workers_draw_what_one_would(project, tmp_path):
    script = Path(sys.executable).with_name("pixart-nb")
    words = ["sample", "-c", project / "configs/inference/tiny.yaml", "--model", project / "data/tiny-sigma"]
    words += ["--sampling_steps", 2, "--image_height", 64, "--image_width", 64]
    for prompt in PROMPTS:
        words += ["--prompt", prompt]
    command, environment = msrun(tmp_path / "log", script, *words, "--use_parallel", "True", "-o", tmp_path / "two")
    done = subprocess.run(
        list(map(str, command)), cwd=project, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + logs(tmp_path / "log")
    result = CliRunner().invoke(app, list(map(str, [*words, "-o", tmp_path / "one"])))
    assert result.exit_code == 0, result.output
    files = json.loads((tmp_path / "two" / "sample.json").read_text())["files"]
    assert len(files) == 3
    for name in files:
        one, two = (np.asarray(Image.open(tmp_path / folder / name), int) for folder in ("one", "two"))
        assert np.abs(one - two).max() <= 1  # batches of another size round differently
