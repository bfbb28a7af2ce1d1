"""Training states on the disk: damaged ones, old ones, full disks, and who may write."""

import json
import os
import resource
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from line_training import losses, trainer

from pixart_nb.core.errors import FolderInUseError
from pixart_nb.core.io import CheckpointError, load_metadata, load_tensors, save_tensors
from pixart_nb.core.training.checkpoints import CheckpointFolder, read_state
from pixart_nb.core.training.event_file import EventFile
from pixart_nb.core.training.log import CurveLog

TENSORS = {"model/a": np.arange(12, dtype=np.float32).reshape(3, 4), "model/b": np.full(1, 2.5, np.float32)}


@pytest.fixture
def folder(tmp_path):
    files = CheckpointFolder(tmp_path, keep=3)
    for step in (10, 20, 30):
        files.save(step, {name: value + step for name, value in TENSORS.items()}, {"note": "text"})
    return files


def test_a_state_comes_back_as_it_was(folder):
    state = folder.newest()
    assert (state.step, state.metadata["note"]) == (30, "text")
    assert all(np.array_equal(state.tensors[name], value + 30) for name, value in TENSORS.items())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_state_with_one_wrong_bit_or_cut_short_is_passed_over(folder, position, bit, cut, capsys):
    newest = folder.paths()[-1]
    whole = newest.read_bytes()
    at = int(position * len(whole))
    damaged = whole[:at] if cut else whole[:at] + bytes([whole[at] ^ (1 << bit)]) + whole[at + 1 :]
    newest.write_bytes(damaged)
    try:
        state = folder.newest()
        assert state.step in (20, 30)  # 30 if the bit says nothing, as in the name of the checksums
        expected = {name: value + state.step for name, value in TENSORS.items()}
        assert all(np.array_equal(state.tensors[name], value) for name, value in expected.items())
    finally:
        newest.write_bytes(whole)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_last_whole_states_are_kept_and_damaged_ones_do_not_count(tmp_path, keep):
    files = CheckpointFolder(tmp_path, keep=3)
    for step in (100, 150, 200):
        files.save(step, TENSORS, {})
    damaged = files.path(200)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    again = CheckpointFolder(tmp_path, keep=keep)
    assert again.newest().step == 150
    again.save(180, TENSORS, {})  # resumed, and not yet at the damaged one
    assert again.newest().step == 180
    again.save(300, TENSORS, {})
    assert again.newest().step == 300
    assert [again.path(s).exists() for s in (100, 150, 180)] == [False, False, keep == 2]


def test_states_that_a_killed_training_left_are_removed_when_it_resumes(tmp_path):
    run = trainer(tmp_path)
    run.run(until=30)
    kept = run.checkpoints()
    left = run.files.path(1)
    left.write_bytes(kept[0].read_bytes())
    with trainer(tmp_path).session():
        assert run.checkpoints() == kept


def test_without_a_whole_state_there_is_none(tmp_path):
    (tmp_path / "step-00000005.safetensors").write_bytes(b"nonsense")
    save_tensors(tmp_path / "step-00000006.safetensors", TENSORS, {"not": "a state"})
    assert CheckpointFolder(tmp_path, 2).newest() is None
    with pytest.raises(CheckpointError, match="no training state"):
        read_state(tmp_path / "step-00000006.safetensors")


def test_a_state_of_the_first_version_still_loads(tmp_path):
    """Its metadata was step and options; it knew AdamW alone, and no checksums."""
    run = trainer(tmp_path / "new")
    run.run(until=20)
    path = run.checkpoints()[-1]
    first = {"step": "20", "options": load_metadata(path)["options"]}
    save_tensors(tmp_path / "old" / path.name, load_tensors(path), first)
    again = trainer(tmp_path / "old")
    assert (again.step, again.optimizer.updates, again.ema.updates) == (20, 20, 20)
    again.run()
    run.run()
    assert all(np.array_equal(again.state()[name], value) for name, value in run.state().items())


def test_columns_that_came_later_do_not_shift_an_old_log(tmp_path):
    (tmp_path / "curve.csv").write_text("step,loss\n1,0.5\n2,0.4\n")
    log = CurveLog(tmp_path, step=1)
    log.write({"step": 2, "loss": 0.25, "images_per_second": 3.0})
    assert (tmp_path / "curve.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n"


@pytest.mark.parametrize("left", ["", "step,lo", "step,loss\n", "step,loss\n1,0.5\n2,0."])
def test_a_log_cut_anywhere_goes_on(tmp_path, left):
    (tmp_path / "curve.csv").write_text(left)
    log = CurveLog(tmp_path, step=1)
    log.write({"step": 2, "loss": 0.25})
    rows = (tmp_path / "curve.csv").read_text().splitlines()
    assert rows[0] == "step,loss"
    assert rows[-1] == "2,0.25"
    assert len(rows) == 2 + ("1,0.5" in left)


def test_copies_of_states_are_neither_removed_nor_resumed(tmp_path):
    files = CheckpointFolder(tmp_path, keep=1)
    files.save(10, TENSORS, {})
    names = ("step-00000010-good.safetensors", "step-00000010 (1).safetensors", "step-best.safetensors")
    for name in names:
        (tmp_path / name).write_bytes(files.path(10).read_bytes())
    files.save(20, TENSORS, {})
    assert {path.name for path in tmp_path.iterdir()} == {*names, "step-00000020.safetensors"}
    assert files.newest().step == 20
    files.save(10**8, TENSORS, {})  # more digits than names are padded to
    assert files.newest().step == 10**8 and files.paths() == [files.path(10**8)]


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    half = tmp_path / f".step-00000010.safetensors.{os.getpid()}.tmp"
    run = trainer(tmp_path)
    half.mkdir()
    (half / ".tmpAb12Cd").write_bytes(b"half")
    os.utime(half, (1, 1))  # its writer had the process id that this process has now
    run.run(until=2)
    assert not half.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.csv", "step-00000002.safetensors"]


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    first, second = trainer(tmp_path), trainer(tmp_path)
    rows = first.steps()
    list(islice(rows, 15))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FolderInUseError, match=f"process {os.getpid()} .*is writing into"):
        second.run()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    rows.close()
    second.run()  # resumes from what the first one saved meanwhile
    whole = trainer(tmp_path / "whole")
    whole.run()
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_disk_that_is_full_keeps_what_was_there(tmp_path):
    """In a process of its own, which may write files of 1,500 bytes: a log, but no second state."""
    run = trainer(tmp_path)
    run.run(until=10)
    size = run.checkpoints()[-1].stat().st_size
    assert size > 1500
    code = f"""
import resource, signal
from line_training import trainer
run = trainer({str(tmp_path)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, {resource.RLIM_INFINITY}))
run.run()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "could not be written" in done.stderr and "Free space" in done.stderr
    assert not list(tmp_path.glob(".step-*"))
    again = trainer(tmp_path)
    assert again.step == 10
    again.run()
    whole = trainer(tmp_path / "whole")
    whole.run()
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_events_are_written_for_tensorboard(tmp_path):
    run = trainer(tmp_path, more={"tensorboard": True}, steps=6)
    with run.session():
        run.run(until=4)
        run.log.images(4, ["a red cup"], np.zeros((1, 8, 8, 3), np.uint8))
    trainer(tmp_path, more={"tensorboard": True}, steps=6).run()
    seen = {}
    for path in sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        for step, tag, value in events(path):
            seen[step, tag] = value
    assert [seen[step, "loss"] for step in range(1, 7)] == pytest.approx(losses(tmp_path), rel=1e-6)
    assert seen[4, "a_red_cup"] == "image"


def test_a_full_disk_is_an_error_of_the_event_file_for_tensorboard(tmp_path):
    board = EventFile(tmp_path / "tensorboard", 0, "")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            list(map(board.scalar, range(2000), ["loss"] * 2000, [1.0] * 2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def events(path):
    """(step, tag, value) of an event file: records of length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        for value in event.summary.value:
            yield event.step, value.tag, "image" if value.HasField("image") else value.simple_value


def test_options_are_written_with_a_state(tmp_path):
    trainer(tmp_path, max_grad_norm=None).run(until=1)
    metadata = load_metadata(tmp_path / "step-00000001.safetensors")
    assert json.loads(metadata["options"])["max_grad_norm"] is None
