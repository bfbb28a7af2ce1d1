"""The installed package works in any folder, without the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(project, tmp_path_factory):
    """Run ``pixart-nb`` of a wheel in an environment of its own, in an empty folder; return what it printed."""
    folder = tmp_path_factory.mktemp("wheel")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, project]
    built_before = (project / "build").exists()
    subprocess.run(pip, check=True, env=environment)
    if not built_before:
        shutil.rmtree(project / "build", ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, wheel]
    subprocess.run(install, check=True, env=environment)
    (folder / "empty").mkdir()

    def run(*words):
        program = [folder / "venv" / "bin" / "python", "-c", "from pixart_nb.cli import app; app()", *map(str, words)]
        result = subprocess.run(program, cwd=folder / "empty", env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run.folder = folder / "empty"
    return run


def test_sample_evaluate_plan_and_train_find_their_configuration_and_model(command):
    small = ("--image_height", 128, "--image_width", 128, "--sampling_steps", 1)
    command("sample", "--prompt", "a red mushroom on grass", *small, "-o", "images")
    assert list((command.folder / "images").glob("*.png"))
    assert "_bundled" in json.loads((command.folder / "images" / "sample.json").read_text())["model"]
    assert "2 held-out scenes" in command("evaluate", "--count", 2, *small)
    assert "denoise" in command("plan", "--no-timed")
    command("train", "--steps", 1, "--batch_size", 2, "--visualize", "False", "--tensorboard", "False", "-o", "run")
    assert (command.folder / "run" / "pipeline" / "model_index.json").is_file()


def test_a_configuration_of_the_package_is_found_by_its_name(command):
    assert "4096x4096" in command("plan", "--no-timed", "-c", "configs/inference/pixart-sigma-4K-MS-KV-Compress.yaml")
