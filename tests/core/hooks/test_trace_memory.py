"""What benchmarks/trace_memory.py shows at 4K, in small."""

import subprocess
import sys


def test_a_trace_is_announced_bounded_and_changes_no_bit(project):
    options = ["--side", "256", "--width", "48", "--heads", "2", "--ways", "plain", "traced", "on disk"]
    command = [sys.executable, "benchmarks/trace_memory.py", *options]
    run = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "the latents are the same, bit for bit" in run.stdout
    assert run.stdout.count("trace: ") == run.stdout.count("a row in ") == 2
