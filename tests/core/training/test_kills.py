"""Trainings that are killed with SIGKILL, also while they write, lose nothing."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs once the system can fork processes")
def test_a_training_that_is_killed_comes_to_the_same_numbers(project):
    command = [sys.executable, "benchmarks/kills.py", "--kills", "6", "--steps", "60", "--longest", "0.5"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == 6
    assert report["while writing"] >= 1
    assert report["steps"] == 60
    assert report["tensors"] == 4 * 45
    assert report["different tensors"] == report["left behind"] == []
    assert report["different losses"] == 0
