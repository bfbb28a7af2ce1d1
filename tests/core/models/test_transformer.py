"""The transformer computes what the official implementation computes."""

import numpy as np
import pytest
from reference_data import FORWARD, OFFICIAL, official, relative_error

from pixart_nb.core import PixArtConfig, load_transformer
from pixart_nb.core.backend import ms
from pixart_nb.core.models import transformer
from pixart_nb.core.models.embeddings import sincos_positions
from pixart_nb.core.models.transformer import PixArt

SMALL = dict(hidden_size=24, num_heads=2, depth=2, caption_channels=12, input_size=8, model_max_length=6)


def small_net(**changes) -> PixArt:
    """A small net with weights in which every part shows: nothing is zero."""
    net = PixArt(PixArtConfig(**SMALL | changes))
    rng = np.random.default_rng(3)
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor((0.3 * rng.standard_normal(parameter.shape)).astype(np.float32)))
    return net


def inputs(height=8, width=12, rows=2, tokens=6):
    rng = np.random.default_rng(4)
    latents = ms.Tensor(rng.standard_normal((rows, 4, height, width), dtype=np.float32))
    caption = ms.Tensor(rng.standard_normal((rows, tokens, 12), dtype=np.float32))
    return latents, ms.Tensor(np.array([37.0, 811.0][:rows], np.float32)), caption


@pytest.mark.parametrize("case", OFFICIAL)
def test_one_forward_equals_the_official_one(case):
    path, config, arrays = official(case)
    net = load_transformer(path, PixArtConfig(**config))
    out = net(*(ms.Tensor(arrays[name]) for name in ("latents", "timestep", "caption", "mask")))
    assert relative_error(out.asnumpy(), arrays["output"]) < FORWARD


def test_every_kind_of_reference_is_there():
    configs = [official(case)[1] for case in OFFICIAL]
    operators = {(c.get("kv_compress_config") or {}).get("sampling") for c in configs}
    assert operators == {None, "conv", "ave", "uniform"}
    assert {(c.get("kv_compress_config") or {}).get("scale_factor") for c in configs} == {None, 2, 4}
    assert any(c.get("micro_condition") for c in configs)
    assert any(a["latents"].shape[2] != a["latents"].shape[3] for a in (official(case)[2] for case in OFFICIAL))
    assert any(not a["mask"].all() for a in (official(case)[2] for case in OFFICIAL))


def test_masked_caption_tokens_change_nothing():
    net = small_net()
    latents, timestep, caption = inputs()
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]], bool)
    changed = caption.asnumpy().copy()
    changed[~mask] = 100.0
    before = net(latents, timestep, caption, mask).asnumpy()
    assert np.array_equal(before, net(latents, timestep, ms.Tensor(changed), mask).asnumpy())
    assert relative_error(before, net(latents, timestep, caption, None).asnumpy()) > 1e-3


def test_rows_with_prompts_of_different_length_are_as_if_alone():
    net = small_net()
    latents, timestep, caption = inputs()
    mask = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], bool)
    together = net(latents, timestep, caption, mask).asnumpy()
    alone = net(latents[1:], timestep[1:], caption[1:, :2], mask[1:, :2]).asnumpy()
    assert relative_error(together[1:], alone) < 1e-5


def test_a_mask_without_any_token_is_refused():
    mask = np.array([[1, 1, 0, 0, 0, 0], [0] * 6], bool)
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        small_net()(*inputs(), mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, t, c: (x[:, :3], t, c), r"\(N, 4, H, W\)"),
        (lambda x, t, c: (x[:, :, :, :7], t, c), "multiples of 2"),
        (lambda x, t, c: (x, t, c[:, :, :5]), r"\(2, T, 12\)"),
        (lambda x, t, c: (x, t, c[:1]), r"shape \(1, 6, 12\); expected \(2, T, 12\)"),
    ],
)
def test_inputs_of_a_wrong_shape_say_what_was_expected(change, message):
    with pytest.raises(ValueError, match=message):
        small_net()(*change(*inputs()))


def test_mean_compression_averages_cells_and_differs_from_picking():
    compress = dict(scale_factor=2, kv_compress_layer=[0, 1])
    mean, ave, plain = (
        small_net(kv_compress_config=compress | {"sampling": name} if name else None)(*inputs()).asnumpy()
        for name in ("mean", "ave", None)
    )
    assert relative_error(mean, ave) > 1e-4
    assert relative_error(mean, plain) > 1e-4


def test_compression_of_a_constant_grid_by_picking_or_mean_is_exact(monkeypatch):
    latents = ms.Tensor(np.ones((1, 4, 8, 8), np.float32))
    args = (latents, ms.Tensor(np.array([5.0], np.float32)), inputs(rows=1)[2])
    outs = []
    zeros = np.zeros((16, SMALL["hidden_size"]), np.float32)
    monkeypatch.setattr(transformer, "sincos_positions", lambda *_: zeros)
    for name in ("mean", "ave", "uniform"):
        net = small_net(kv_compress_config=dict(sampling=name, scale_factor=2, kv_compress_layer=[0]))
        outs.append(net(*args).asnumpy())
    assert relative_error(outs[0], outs[1]) < 1e-5
    assert np.array_equal(outs[1], outs[2])


def test_positions_of_a_larger_image_interpolate_those_of_the_smaller():
    small = sincos_positions(24, 8, 8, base_size=8, pe_interpolation=1.0).reshape(8, 8, 24)
    large = sincos_positions(24, 16, 16, base_size=8, pe_interpolation=1.0).reshape(16, 16, 24)
    assert np.allclose(large[::2, ::2], small, atol=1e-6)
    scaled = sincos_positions(24, 16, 16, base_size=16, pe_interpolation=2.0).reshape(16, 16, 24)
    assert np.allclose(scaled, large, atol=1e-6)


def test_recompute_gives_the_same_gradients():
    latents, timestep, caption = inputs()

    def gradients(net):
        def loss(x):
            return (net(x, timestep, caption) ** 2).mean()

        return ms.grad(loss)(latents).asnumpy()

    plain, recomputed = small_net(), small_net()
    for block in recomputed.blocks:
        block.recompute()
    assert relative_error(gradients(recomputed), gradients(plain)) < 1e-6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(class_name="DiT"), "expected 'PixArt' or 'PixArtMS'"),
        (dict(hidden_size=26), "multiple of 4"),
        (dict(kv_compress_config=dict(sampling="max", scale_factor=2, kv_compress_layer=[0])), "expected one of conv"),
        (dict(kv_compress_config=dict(sampling="conv", scale_factor=2, kv_compress_layer=[2])), "layers 0 to 1"),
        (dict(hidden_size=20, micro_condition=True), "divisible by 3"),
    ],
)
def test_configurations_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PixArtConfig(**SMALL | values)


def test_an_unknown_configuration_field_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"hidden_sise.*hidden_size"):
        PixArtConfig.from_dict({"hidden_sise": 24})


def test_positions_are_kept_for_a_few_sizes_only():
    net = small_net()
    first = net.positions(8, 8)
    assert net.positions(8, 8) is first
    for side in range(2, 42, 2):
        net.positions(side, 8)
    cached = [value for value in vars(net).values() if isinstance(value, dict) and (8, 8, net.dtype) in value]
    assert not cached
    assert np.array_equal(net.positions(8, 8).asnumpy(), first.asnumpy())
