"""Commands on a system without ``fcntl`` and ``resource``, whose folders cannot be synced, as on Windows."""

import json
import os
import subprocess
import sys

import pytest
from small_pipeline import train_options, write_small_pipeline


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt" or not os.path.isdir("/proc/self/fd"), reason="runs on Linux, which it changes")
def test_commands_work_without_what_windows_lacks(project, tmp_path):
    model = write_small_pipeline(tmp_path / "model", project)
    images, out = project / "data" / "pixelart", tmp_path / "out"
    draw = ["--model", model, "--image_height", 64, "--image_width", 64, "--sampling_steps", 1]
    sample = ["sample", "--prompt", "a red cup", "a cat", *draw, "-o", out / "images"]
    train = ["train", *train_options(project, model, out / "run", feature_cache=out / "features", steps=3)]
    commands = [
        ["convert", "-s", model / "transformer", "-t", out / "net.ckpt"],
        ["convert", "-s", out / "net.ckpt", "-t", out / "net.safetensors"],
        [*sample, "--stages_path", out / "stages"],
        sample,
        train,
        [*train, "--steps", 4],
        [*train, "--output_path", out / "lora", "--lora_rank", 2],
        ["dataset", "folder", "-s", images, "--captions", images / "labels.json", "-o", out / "labels.json"],
    ]
    file = tmp_path / "commands.json"
    file.write_text(json.dumps([[str(word) for word in words] for words in commands]))
    words = [sys.executable, str(project / "tests" / "like_windows.py"), str(file)]
    done = subprocess.run(words, cwd=project, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    for name in ("net.ckpt", "net.safetensors", "run/pipeline/model_index.json", "lora/lora", "labels.json"):
        assert (out / name).exists(), name
    assert not [path for path in out.rglob(".*") if path.name.endswith((".tmp", "lock"))]
