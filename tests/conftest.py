"""What every test may rely on."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The first call of a MindSpore operator takes seconds, which says nothing about the code under test.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []


def own_cores() -> None:
    """Give each of several test processes, and what it starts, its share of the cores.

    MindSpore's threads wait by spinning: with more of them than cores, tests take twice as long.
    """
    number = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if 1 < count <= len(CORES):
        os.sched_setaffinity(0, CORES[int(number) :: count])


own_cores()


@pytest.fixture(scope="session")
def all_cores() -> list[int]:
    """The cores that the tests may use together."""
    return CORES


@pytest.fixture(scope="session")
def project() -> Path:
    """The folder that holds pyproject.toml, notebooks/, configs/ and data/."""
    return Path(__file__).resolve().parents[1]
