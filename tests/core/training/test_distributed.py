"""Several workers train what one would; real processes that msrun starts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from line_training import losses, trainer
from msrun import BIN, logs, msrun
from small_pipeline import train_options, write_small_pipeline
from two_workers import GRADIENTS, RUNS
from typer.testing import CliRunner

from pixart_nb.cli import app
from pixart_nb.core.io import load_tensors

pytestmark = pytest.mark.slow
needs_msrun = pytest.mark.skipif(
    not (shutil.which("msrun", path=BIN) or shutil.which("msrun")), reason="runs once there is MindSpore's msrun"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of what two workers trained and averaged, and of the graphs that MindSpore compiled, in ``graphs``."""
    folder = tmp_path_factory.mktemp("two_workers")
    command, environment = msrun(folder / "log", Path(__file__).parents[2] / "two_workers.py", folder)
    graphs = {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": str(folder / "graphs")}
    done = subprocess.run(command, env=environment | graphs, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-1000:] + logs(folder / "log")
    return folder


@needs_msrun
def test_two_workers_with_half_the_batch_are_one_with_the_whole(trained, tmp_path):
    kept = [json.loads((trained / f"keeps-{rank}.json").read_text()) for rank in (0, 1)]
    for name, options in RUNS.items():
        options = dict(steps=8, save_every=3, start_learning_rate=0.01) | options
        alone = trainer(tmp_path / name, **options)
        alone.run()
        assert np.allclose(losses(trained / name), losses(tmp_path / name), rtol=1e-5)
        weights = [json.loads((trained / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert weights[0] == weights[1]  # the same weights, bit for bit
        for parameter, master in alone.masters.items():
            assert np.allclose(weights[0][parameter], master.asnumpy(), atol=1e-5)
        if "shard_threshold" in options:  # the bias, of two numbers, is everyone's
            assert "map.bias" in kept[0][name] and "map.bias" in kept[1][name]
        assert set(kept[0][name] + kept[1][name]) == set(alone.masters)
        assert sum(map(len, (kept[0][name], kept[1][name]))) == 2 + ("shard_threshold" in options)
        whole = load_tensors(trained / name / "step-00000008.safetensors")
        expected = alone.state()
        assert set(whole) == set(expected)  # one state, as one worker writes it
        assert all(np.allclose(whole[key], value, atol=1e-4) for key, value in expected.items())


@needs_msrun
def test_mindspore_joins_the_collectives_of_many_gradients_with_the_same_means(trained):
    counts = {path.name: path.read_text().count(" AllReduce(%") for path in (trained / "graphs/rank_0").glob("*.ir")}
    assert max(counts.values()) == GRADIENTS
    final = [count for name, count in counts.items() if name.startswith("graph_build") or "_graph_build" in name]
    assert max(final) == 3  # a graph of the trainings has two gradients


SCRIPT = Path(sys.executable).with_name("pixart-nb")
COMMON = {"tensorboard": False, "feature_dtype": "fp32"}


def train_alone(*task, **changes):
    """Train with one worker, in this process, and the whole batch; return the losses."""
    result = CliRunner().invoke(app, ["train", *train_options(*task, batch_size=4, **COMMON | changes)])
    assert result.exit_code == 0, result.output
    return losses(task[-1])


@needs_msrun
def test_the_command_distils_with_two_workers_what_it_distils_with_one(project, tmp_path):
    """The target of a distillation, a moving average, is on both workers."""
    model = write_small_pipeline(tmp_path / "model", project, final_layer=0.1)
    changes = {"objective": "lcm", "w_max": 8.0, "feature_cache": tmp_path / "features"}
    halves = train_options(project, model, tmp_path / "two", batch_size=2, **COMMON | changes)
    command, environment = msrun(tmp_path / "log", SCRIPT, "train", *halves, "--use_parallel", "True")
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:] + logs(tmp_path / "log")
    assert (tmp_path / "two" / "pipeline" / "model_index.json").is_file()
    assert len(list((tmp_path / "features").iterdir())) == 2  # latents of one worker, captions of the other
    assert "features" in (tmp_path / "log" / "worker_1.log").read_text()
    one = train_alone(project, model, tmp_path / "one", **changes | {"feature_cache": tmp_path / "features-one"})
    assert np.allclose(losses(tmp_path / "two"), one, rtol=2e-4)


@needs_msrun
def test_two_workers_train_what_one_does_and_leave_a_whole_checkpoint_when_one_is_killed(project, tmp_path):
    """The run ends with a message."""
    model = write_small_pipeline(tmp_path / "model", project)
    output = tmp_path / "out"
    options = train_options(project, model, output, batch_size=2, steps=100_000, **COMMON)
    command, environment = msrun(tmp_path / "log", SCRIPT, "train", *options, "--use_parallel", "True")
    with (tmp_path / "output.log").open("w") as log:
        run = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log)
    try:
        wait_for(lambda: len(list(output.glob("step-*.safetensors"))) > 1, run)
        workers = [p for p in psutil.Process(run.pid).children(recursive=True) if "train" in p.cmdline()]
        second = next(p for p in workers if p.environ().get("RANK_ID") == "1")
        os.kill(second.pid, signal.SIGKILL)
        assert run.wait(timeout=900) != 0
    finally:
        for process in [*psutil.Process(run.pid).children(recursive=True)] if run.poll() is None else []:
            process.kill()
        run.kill()
    message = (tmp_path / "output.log").read_text(errors="replace")
    print(message[-3000:])
    newest = sorted(output.glob("step-*.safetensors"))[-1]
    assert load_tensors(newest)
    assert "another worker" in message
    one = train_alone(project, model, tmp_path / "one")
    assert np.allclose(losses(output)[: len(one)], one, rtol=2e-4)


def wait_for(condition, run, seconds=1800):
    end = time.monotonic() + seconds
    while not condition():
        assert run.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.2)
