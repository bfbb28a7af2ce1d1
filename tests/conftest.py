"""What every test may rely on."""

from pathlib import Path

import pytest
from hypothesis import settings

# The first call of a MindSpore operator takes seconds, which says nothing about the code under test.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def project() -> Path:
    """The folder that holds pyproject.toml, notebooks/, configs/ and data/."""
    return Path(__file__).resolve().parents[1]
