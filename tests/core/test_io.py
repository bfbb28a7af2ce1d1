"""Atomic writes, locks of folders, and what dead writers left."""

import os
import platform
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pixart_nb.core.errors import FolderInUseError, WriteError
from pixart_nb.core.io import (
    atomic_write,
    atomic_write_together,
    ensure_writable,
    folder_lock,
    read_json,
    remove_temporaries,
    save_tensors,
    temporary_beside,
    write_json,
    write_once,
)

GONE = 2**22 + 1  # no system has as many processes


def in_process(code: str, *arguments: object) -> subprocess.Popen:
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_files_that_belong_together_appear_together_or_not_at_all(tmp_path):
    paths = [tmp_path / "new" / "deep" / "a.txt", tmp_path / "b.txt"]

    def written(text):
        with atomic_write_together(*paths) as temporaries:
            for temporary in temporaries:
                temporary.write_text(text)
            if text == "bad":
                raise OSError("disk full")

    with pytest.raises(WriteError, match=r"a\.txt could not be written \(disk full\)"):
        written("bad")
    assert os.listdir(tmp_path) == []
    written("good")
    with pytest.raises(WriteError, match="full"):
        written("bad")
    assert [path.read_text() for path in paths] == ["good", "good"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "b.txt", "deep", "new"]


def test_an_error_of_reading_another_file_is_not_an_error_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.txt"):
        Path("/no/such/file").read_bytes()
    assert os.listdir(tmp_path) == []


def test_all_that_a_writer_makes_of_its_own_is_in_its_temporary_folder(tmp_path):
    with atomic_write(tmp_path / "a.safetensors") as temporary:
        save_file({"x": np.ones(3, np.float32)}, temporary)
        (temporary.parent / ".tmpAb12Cd").write_bytes(b"as safetensors leaves when it is killed")
        assert [path.name for path in tmp_path.iterdir()] == [temporary.parent.name]
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX file modes")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
        write_json(tmp_path / "a.json", {})
        write_once(tmp_path / "a.png", b"content")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_what_dead_writers_left_is_removed_and_what_is_being_written_stays(tmp_path):
    host, day = platform.node().replace(".", "-"), 24 * 3600
    left = [
        f".captions.{GONE}.tmp",
        f".a.safetensors.{host}.{GONE}.tmp",
        f".c.other-host.{GONE}.tmp",
        f".d.{host}.{os.getpid()}.tmp",
    ]
    for name in left[:2]:
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpAb12Cd").write_bytes(b"left by safetensors")
    for name in left[2:]:
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / left[3], (1, 1))  # written before this process, which has the number of its dead writer
    living = [temporary_beside(tmp_path / "b.safetensors").name, f".b.other-host.{GONE}.tmp", ".keep.tmp"]
    for name in living:
        (tmp_path / name).write_bytes(b"")
    os.utime(tmp_path / left[2], (time.time() - 2 * day,) * 2)
    remove_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(living)


def test_the_next_write_into_a_folder_removes_what_a_killed_one_left(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from pixart_nb.core.io import atomic_write
with atomic_write(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert in_process(code, tmp_path / "a.txt").wait() == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    write_json(tmp_path / "b.json", {})
    assert os.listdir(tmp_path) == ["b.json"]


HOLDER = """
import sys, time
from pixart_nb.core.io import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_by_one_process_and_free_after_its_death(tmp_path):
    folder = tmp_path / "out"
    holder = in_process(HOLDER, folder)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(FolderInUseError, match=f"process {holder.pid} on .* is writing into .*out"),
            folder_lock(folder),
        ):
            pass
        with folder_lock(folder, name=".a.ckpt.lock"):  # another file of the folder
            pass
    finally:
        holder.kill()
        holder.wait()
    temporary_beside(folder / "x").with_name(f".x.{GONE}.tmp").write_text("left")
    with folder_lock(folder) as held:
        assert held == folder and os.listdir(folder) == [".lock"]
        with pytest.raises(FolderInUseError), folder_lock(folder):
            pass
    assert os.listdir(folder) == []


def test_waiting_for_a_lock_gets_it_when_it_is_free(tmp_path):
    code = HOLDER.replace("sleep(60)", "sleep(1)")
    holder = in_process(code, tmp_path)
    assert holder.stdout.readline() == "held\n"
    with folder_lock(tmp_path, wait=True):
        assert holder.wait() == 0


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX links")
def test_the_file_of_a_lock_whose_holder_was_killed_is_removed_and_no_other(tmp_path):
    code = "import sys, time\nfrom pixart_nb.core.io import folder_lock\nwith folder_lock(sys.argv[1], '.x.lock'):"
    process = in_process(f"{code}\n    print('held', flush=True); time.sleep(600)", tmp_path)
    assert process.stdout.readline() == "held\n"
    foreign = tmp_path / ".editor.lock"
    foreign.write_text("someone else's")
    remove_temporaries(tmp_path)
    assert (tmp_path / ".x.lock").exists()
    process.kill()
    process.wait()
    remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [foreign]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs once the system can fork processes")
def test_a_forked_process_neither_holds_nor_ends_the_lock_of_its_parent(tmp_path):
    with folder_lock(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    with folder_lock(tmp_path):  # though the child lives
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        code = "import os, sys\nfrom pixart_nb.core.io import folder_lock\nwith folder_lock(sys.argv[1]):"
        held = in_process(f"{code}\n    pass", tmp_path)
        assert held.wait() == 1 and "is writing into" in held.stderr.read()
    try:
        with folder_lock(tmp_path):
            if not (child := os.fork()):
                raise SystemExit  # leaves the block
            os.waitpid(child, 0)
            with pytest.raises(FolderInUseError), folder_lock(tmp_path):
                pass
    except SystemExit:
        os._exit(0)


def test_a_lock_does_not_follow_a_link(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(WriteError), folder_lock(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_an_output_folder_is_tried_before_work_begins(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(WriteError, match="could not be written"):
            ensure_writable(folder)
    with pytest.raises(WriteError, match="MB free"):
        ensure_writable(tmp_path, needed=10**18)
    assert ensure_writable(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert os.listdir(tmp_path) == ["file"]


def test_json_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "a.json"
    for content in ("{", "[" * 100_000, "[1]", '{"a": 1' + "0" * 5000 + "}"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"a\.json"):
            read_json(path)
