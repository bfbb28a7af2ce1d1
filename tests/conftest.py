"""What every test may rely on."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The first call of a MindSpore operator takes seconds, which says nothing about the code under test.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def own_cores() -> None:
    """Give each of several test processes, and what it starts, its share of the cores.

    MindSpore's threads wait by spinning: with more of them than cores, tests take twice as long.
    """
    number, count = (
        os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:],
        int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)),
    )
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    if 1 < count <= len(cores):
        os.sched_setaffinity(0, cores[int(number) :: count])


own_cores()


@pytest.fixture(scope="session")
def project() -> Path:
    """The folder that holds pyproject.toml, notebooks/, configs/ and data/."""
    return Path(__file__).resolve().parents[1]
