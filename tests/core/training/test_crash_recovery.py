"""Long commands that are killed with SIGKILL, also while they write, lose nothing."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs once the system can fork processes")
@pytest.mark.parametrize("command", [pytest.param("train", marks=pytest.mark.slow), "convert"])
def test_a_command_that_is_killed_comes_to_the_same_files(project, command):
    words = [sys.executable, "benchmarks/crash_recovery.py", "--kills", "3", "--only", command]
    done = subprocess.run(words, cwd=project, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] >= 3
    assert report["while writing"] >= 1
    assert report["different"] == report["left"] == []
