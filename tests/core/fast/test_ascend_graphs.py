"""Graphs with the branches of Ascend pass MindSpore's front end; what fails is the missing kernel of the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ascend_graphs import CASES

#: What the CPU's back end says of an operator of Ascend, and of bfloat16.
OPERATORS = "LayerNormExt|GeluExt|AddcmulExt|Conv2DExt|FlashAttentionScore"
MISSING = re.compile(
    rf"Kernel select failed: -+ (Unsupported op \[({OPERATORS})\] on CPU|Select CPU .*input\[BFloat16)"
)


def messages(*cases):
    """The error of each case, compiled in a process of its own."""
    script = Path(__file__).parents[2] / "ascend_graphs.py"
    environment = os.environ | {"PIXART_NB_PIN_THREADS": "0", "PIXART_NB_DEVICE": "CPU"}
    done = subprocess.run(
        [sys.executable, script, *cases], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(cases))


@pytest.mark.slow
def test_training_passes_the_front_end_in_every_dtype_with_recomputation_compression_and_lora():
    errors = messages(*(f"train {case}" for case in CASES))
    assert len(errors) == len(CASES)
    for case, message in errors.items():
        assert MISSING.search(message), f"{case}: {message}"


@pytest.mark.slow
def test_a_block_of_the_inference_path_passes_the_front_end():
    operators = "none", "conv", "mean", "ave", "identity"
    cases = [f"infer {dtype} {operator}" for dtype in ("fp16", "bf16") for operator in operators]
    errors = messages(*cases)
    assert len(errors) == len(cases)
    for case, message in errors.items():
        assert MISSING.search(message), f"{case}: {message}"
