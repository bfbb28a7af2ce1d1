"""Every command that computes names its device in one line, and refuses one that it cannot have."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.ascend_stand_ins import ascend
from pixart_nb.cli import app
from pixart_nb.core import backend
from pixart_nb.core.models import low_precision
from pixart_nb.core.sampling import generate
from pixart_nb.core.training import run as training

RUN = CliRunner()


@pytest.fixture
def stderr(monkeypatch, project):
    """A function that runs a command up to its work."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(generate, "sample", lambda config: [])
    monkeypatch.setattr(training, "train", lambda config: None)
    monkeypatch.setattr(low_precision, "unsupported", lambda: "no products")
    return lambda *words: RUN.invoke(app, words).stderr


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        (("sample",), "fp32"),
        (("sample", "--dtype", "fp16", "--device_target", "CPU"), "fp16 computed in fp32 (no products)"),
        (("train", "-c", "configs/train/tiny.yaml", "--dtype", "fp16"), "fp16 (slow on a CPU; fp32 is faster)"),
        (("sample", "--dtype", "bf16"), "bf16 computed in fp32 (no products)"),
        (("train", "-c", "configs/train/tiny.yaml", "--dtype", "bf16"), "bf16 computed in fp32"),
        (("plan", "--no-timed"), "fp32"),
    ],
)
def test_device_dtype_and_version_are_one_line(stderr, words, dtype):
    assert f"Device: CPU, {dtype}, MindSpore {backend.ms.__version__}\n" in stderr(*words)


def test_a_device_target_without_its_device_is_one_sentence(stderr):
    lines = stderr("sample", "--device_target", "Ascend").splitlines()
    assert len(lines) == 1
    assert "pixart-nb: device_target is Ascend, but MindSpore was started on CPU" in lines[0]


def test_a_device_target_of_a_file_without_its_device_is_one_sentence_in_a_new_process(tmp_path, project):
    published = (project / "configs/inference/tiny.yaml").read_text()
    (tmp_path / "config.yaml").write_text(f"{published}\ndevice_target: Ascend\n")
    command = [Path(sys.executable).with_name("pixart-nb"), "sample", "-c", tmp_path / "config.yaml"]
    environment = {name: value for name, value in os.environ.items() if name != "PIXART_NB_DEVICE"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("pixart-nb: device Ascend cannot be opened: Unsupported device target Ascend. Run `source ")


def test_bfloat16_is_named_as_such_where_the_processor_computes_it(stderr, monkeypatch):
    monkeypatch.setattr(low_precision, "unsupported", lambda: "")
    assert "Device: CPU, fp16 computed in bf16, MindSpore" in stderr("sample", "--dtype", "fp16")
    assert "Device: CPU, bf16, MindSpore" in stderr("sample", "--dtype", "bf16")
    training = stderr("train", "-c", "configs/train/tiny.yaml", "--dtype", "bf16")  # bfloat16 has no gradient there
    assert "Device: CPU, bf16 computed in fp32, MindSpore" in training


def test_a_device_before_a2_is_refused_by_a_command_in_one_sentence(stderr, monkeypatch):
    monkeypatch.setattr(backend.ms.hal, "get_device_name", lambda number: "Ascend910A")
    with ascend():
        (line,) = stderr("sample").splitlines()
    assert line.startswith("pixart-nb: Ascend910A is not supported: flash attention needs Atlas A2")


def test_mode_0_compiles_the_blocks(stderr):
    try:
        stderr("sample", "--mode", "0")
        assert backend.graph_mode()
    finally:
        backend.set_graph_mode(False)
    stderr("sample")
    assert not backend.graph_mode()


def test_a_cann_that_mindspore_does_not_accept_is_one_sentence(stderr, monkeypatch):
    monkeypatch.setattr(backend, "cann_versions", lambda: ("8.0", ["8.2", "8.3"]))
    monkeypatch.setattr(backend, "check_device", lambda target: None)
    with ascend():
        said = stderr("sample")
    assert "Device: Ascend, fp32" in said
    assert re.search(r"pixart-nb: warning: CANN is 8\.0, and MindSpore .* accepts 8\.2, 8\.3; install one", said)
