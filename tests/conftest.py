"""What every test may rely on."""

import os
from collections import Counter
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let several test processes begin with the files that have most heavy tests, so that none works alone at the end.

    xdist by itself begins with the files that have most tests; its option ``--no-loadscope-reorder`` leaves it to this.
    """
    heavy = Counter(item.path for item in items if any(map(item.get_closest_marker, ("notebook", "slow"))))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: -heavy[item.path])


@pytest.fixture(scope="session")
def all_cores() -> list[int]:
    """The cores that the tests may use together."""
    return CORES


@pytest.fixture(scope="session")
def project() -> Path:
    """The folder that holds pyproject.toml, notebooks/, configs/ and data/."""
    return Path(__file__).resolve().parents[1]
