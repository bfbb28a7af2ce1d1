"""Seams are told from a picture's own lines, also where those are stronger at coarse cells."""

import numpy as np
import pytest

from pixart_nb.core.sampling.upscaling import measure_tile_artifacts, tile_edges


def grown(side, seed=0):
    """Noise in cells of every power of two, the coarse ones stronger, as in a picture that was enlarged by twos."""
    rng, total = np.random.default_rng(seed), np.full((side, side, 3), 128.0)
    for cell in (8, 16, 32, 64, 128):
        cells = rng.normal(0, cell / 16, (side // cell, side // cell, 3))
        total += cells.repeat(cell, 0).repeat(cell, 1)
    return total


def pixels(picture):
    return picture.round().clip(0, 255).astype(np.uint8)


def test_a_picture_without_seams_has_none():
    found = measure_tile_artifacts(pixels(grown(2048)), 512)
    assert len(found.jumps) == 2 * len(tile_edges(2048, 512)) > 8
    assert found.ratio == pytest.approx(1, abs=0.15)
    assert 0.35 < found.rank < 0.65


def test_tiles_of_another_tone_are_found():
    picture = grown(2048)
    for number, edge in enumerate(tile_edges(2048, 512)):
        tone = 15 * (-1) ** number
        picture[edge:] += tone
        picture[:, edge:] += tone
    found = measure_tile_artifacts(pixels(picture), 512)
    assert found.ratio > 1.1
    assert found.rank < 0.2


def test_a_picture_of_one_tile_has_no_edges():
    found = measure_tile_artifacts(pixels(grown(256)), 512)
    assert (len(found.jumps), found.ratio, found.rank) == (0, 1.0, 0.5)
