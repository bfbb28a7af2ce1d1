"""Images decoded in tiles look as if they were decoded whole."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_data import diffusers, relative_error

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import LOADERS
from pixart_nb.core.data.images import to_signed
from pixart_nb.core.models import tiling
from pixart_nb.core.models.layers import GroupNorm, norm_statistics
from pixart_nb.core.sampling.images import to_uint8
from pixart_nb.core.training.validation import psnr
from pixart_nb.pixelart.scenes import draw
from pixart_nb.pixelart.split import held_out_scenes

TINY = Path(__file__).parents[3] / "data" / "tiny-sigma"


@pytest.fixture(scope="module")
def trained():
    return LOADERS["vae"](TINY / "vae", ms.float32)


def pixels(decoded):
    return to_uint8(decoded[0].asnumpy().transpose(0, 2, 3, 1) / 2 + 0.5)


@given(st.integers(1, 300), st.integers(2, 40), st.integers(0, 39), st.integers(1, 8))
def test_tiles_have_one_size_cover_the_axis_and_their_weights_sum_to_one(length, tile, overlap, factor):
    if overlap >= tile:
        with pytest.raises(ValueError, match="0 <= overlap < tile"):
            tiling.axis_tiles(length, tile, overlap)
        return
    parts = tiling.axis_tiles(length, tile, overlap, factor)
    total = np.zeros(length * factor)
    for part, weight in parts:
        assert part.stop - part.start == min(tile, length)
        assert weight.min() >= 0
        total[part.start * factor : part.stop * factor] += weight
    assert np.allclose(total, 1, atol=1e-5)
    cores = tiling.axis_cores([part for part, _ in parts])
    assert all(0 <= low < high <= 1 for low, high in cores)
    assert sum(high - low for low, high in cores) * min(tile, length) == pytest.approx(length)


def test_slices_give_the_numbers_of_the_batch():
    _, _, golden = diffusers("sigma")
    net = LOADERS["vae"](diffusers("sigma")[0] / "vae", ms.float32)
    latents = ms.Tensor(golden["dpm++2m/trajectory"][-1]) / net.config.scaling_factor
    together = net.decode(latents)[0].asnumpy()
    net.enable_slicing()
    assert relative_error(net.decode(latents)[0].asnumpy(), together) < 1e-5
    net.disable_slicing()
    assert np.array_equal(net.decode(latents)[0].asnumpy(), together)


def test_a_tiled_image_equals_the_whole_one_within_a_few_levels(trained):
    scene = held_out_scenes(8)[5]
    image = to_signed(draw(scene, np.random.default_rng(3), 256, 384)[None])
    latents = trained.encode(ms.Tensor(image))[0].mean
    whole = pixels(trained.decode(latents))
    trained.enable_tiling(128)
    tiled, encoded = pixels(trained.decode(latents)), trained.encode(ms.Tensor(image))[0].mean
    trained.disable_tiling()
    assert psnr(tiled, whole) > 50
    assert np.abs(tiled.astype(int) - whole).max() <= 6
    assert relative_error(encoded.asnumpy(), latents.asnumpy()) < 0.02
    assert np.array_equal(pixels(trained.decode(latents)), whole)


def test_a_sample_of_the_tiles_leaves_no_seams(trained, monkeypatch):
    monkeypatch.setattr(tiling, "SAMPLE_CELLS", 2 * 128**2)
    scene = held_out_scenes(8)[5]
    image = to_signed(draw(scene, np.random.default_rng(3), 256, 384)[None])
    latents = trained.encode(ms.Tensor(image))[0].mean
    whole = pixels(trained.decode(latents)).astype(int)
    trained.enable_tiling(128)
    difference = pixels(trained.decode(latents)).astype(int) - whole
    trained.disable_tiling()
    steps = np.abs(np.diff(difference, axis=2)).mean((0, 1, 3))
    edges = [8 * edge for part, _ in tiling.axis_tiles(48, 16, 4) for edge in (part.start, part.stop)]
    seams = [edge - 1 for edge in edges if 0 < edge < 384]
    assert len(seams) >= 4
    # the drawing's own edges lie on such columns too: a seam would stand out among them
    assert np.median(steps[seams]) < np.percentile(steps[7::8], 75)


def test_what_is_smaller_than_a_tile_is_not_cut(trained):
    latents = ms.Tensor(np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32))
    whole = trained.decode(latents)[0].asnumpy()
    trained.enable_tiling(128)
    assert np.array_equal(trained.decode(latents)[0].asnumpy(), whole)
    trained.disable_tiling()


def test_norms_are_their_own_again_after_an_error():
    norm = GroupNorm(1, 2)
    with pytest.raises(RuntimeError, match="stop"), norm_statistics([norm], [None]):
        raise RuntimeError("stop")
    assert norm.statistics is None


@pytest.mark.parametrize("arguments", [(100, 0.25), (8, 0.25), (128, 1.0), (128, -0.1)])
def test_impossible_tiles_are_refused(trained, arguments):
    with pytest.raises(ValueError, match="expected a multiple of 8"):
        trained.enable_tiling(*arguments)
    assert not trained.use_tiling
