"""A small pipeline and a trace of it."""

import pytest
from reference_data import diffusers
from traced_models import draw

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core import trace
from pixart_nb.core.backend import ms


@pytest.fixture(scope="module")
def pipe():
    return PixArtSigmaPipeline.from_pretrained(diffusers("sigma")[0], mindspore_dtype=ms.float32)


@pytest.fixture(scope="module")
def traced(pipe):
    with trace(pipe, announce=None) as t:
        draw(pipe)
    return t
