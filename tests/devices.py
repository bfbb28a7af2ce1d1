"""The paths that give a result: that of the CPU, and those of Ascend with stand-ins for its operators."""

from contextlib import nullcontext
from functools import partial

import pytest

from benchmarks.ascend_stand_ins import ascend

#: ``device`` is a context in which the path is taken. Float32 goes through the fused attention of half precision too.
DEVICES = pytest.mark.parametrize(
    "device", [nullcontext, partial(ascend, flash_in_float32=True)], ids=["CPU", "Ascend"]
)
