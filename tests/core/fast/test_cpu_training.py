"""Training steps on the CPU: the loss and gradients of ``models/``, by faster blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_nb.core import onednn
from pixart_nb.core.backend import ms
from pixart_nb.core.fast import chunks, cpu_operators
from pixart_nb.core.fast.cpu_training import use_fast_blocks
from pixart_nb.core.fast.recompute import RecomputedBlock, recompute_activations
from pixart_nb.core.lora import Adapters, LoraConfig
from pixart_nb.core.models.controlnet import PixArtControlNet
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.training.divergence import find_divergence
from pixart_nb.core.training.loss import coefficients, control_loss, diffusion_loss

COMPRESSION = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [1]}
QK_NORM_AND_COMPRESSION = {"qk_norm": True, "kv_compress_config": COMPRESSION}


def network(seed=0, **changes):
    values = dict(hidden_size=48, num_heads=3, depth=2, caption_channels=32, input_size=16) | changes
    net, rng = PixArt(PixArtConfig(**values)), np.random.default_rng(seed)
    net.initialize(rng, zero_cross_attention=False)
    for parameter in net.get_parameters():  # nothing is zero
        parameter.set_data(parameter + ms.Tensor(0.05 * rng.standard_normal(parameter.shape).astype(np.float32)))
    return net.set_train(True)


def batch(net, height=12, width=20, count=3, tokens=7):
    rng = np.random.default_rng(1)
    latents, noise = rng.standard_normal((2, count, 4, height, width), dtype=np.float32)
    timesteps, mask = rng.integers(0, 1000, count), np.arange(tokens) < rng.integers(1, tokens + 1, (count, 1))
    captions = rng.standard_normal((count, tokens, 32), dtype=np.float32)
    arrays = latents, noise, coefficients(timesteps), timesteps.astype(np.float32), captions, mask
    weights = np.ones(count, np.float32)
    return [*map(ms.Tensor, arrays), ms.Tensor(weights), net.positions(height, width)]


def gradients(loss, net, tensors):
    parameters = {name: p for name, p in net.parameters_and_names() if "y_embedding" not in name}
    values, found = ms.value_and_grad(loss, None, list(parameters.values()), has_aux=True)(*tensors)
    return float(values[0].asnumpy()), {n: g.asnumpy().copy() for n, g in zip(parameters, found, strict=True)}


def assert_same_training(loss, net, tensors):
    expected_loss, expected = gradients(loss, net, tensors)
    use_fast_blocks(net, True)
    found_loss, found = gradients(loss, net, tensors)
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    scale = max(np.abs(g).max() for g in expected.values())
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=2e-5, atol=3e-7 * scale, err_msg=name)


@pytest.mark.parametrize("size", [(12, 20), (4, 4), (48, 40)], ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"qk_norm": True, "kv_compress_config": COMPRESSION}], ids=["plain", "compressed"]
)
def test_gradients_are_those_of_mindspores_operators(size, changes):
    net = network(**changes)
    assert_same_training(diffusion_loss(net), net, batch(net, *size))


def test_gradients_of_a_controlnet_are_those_of_mindspores_operators():
    base = network(depth=3)
    net = PixArtControlNet.from_transformer(base, 2).set_train(True)
    for copy in net.controlnet:
        copy.after_proj.weight.set_data(ms.Tensor(np.full((48, 48), 0.01, np.float32)))
    tensors = batch(base)
    assert_same_training(control_loss(net), net, [*tensors, tensors[1]])


def trained_with_recomputed(recompute, lora=False, **changes):
    """Return loss and gradients of the network, or of a LoRA."""
    net = network(**changes)
    adapter = Adapters.of(net).add("style", LoraConfig(target_modules=["qkv", "fc2"]), seed=1) if lora else None
    use_fast_blocks(net.set_train(True), True)
    recompute_activations(net.blocks if recompute else ())
    assert isinstance(net.blocks[0].fast, RecomputedBlock) == (recompute and not changes)
    if not lora:
        return gradients(diffusion_loss(net), net, batch(net))
    parameters = adapter.parameters()
    values, found = ms.value_and_grad(diffusion_loss(net), None, list(parameters.values()), has_aux=True)(*batch(net))
    return float(values[0].asnumpy()), {name: g.asnumpy() for name, g in zip(parameters, found, strict=True)}


@pytest.mark.parametrize("case", [{}, {"lora": True}, QK_NORM_AND_COMPRESSION], ids=["plain", "lora", "compressed"])
def test_gradients_with_recomputed_activations_are_the_same(case):
    (loss, found), (other, expected) = (trained_with_recomputed(recompute, **case) for recompute in (True, False))
    assert loss == other
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        np.testing.assert_array_equal(found[name], gradient, err_msg=name)


def test_the_same_step_gives_the_same_bits_whichever_thread_is_first():
    net = network()
    use_fast_blocks(net, True)
    runs = [gradients(diffusion_loss(net), net, batch(net, 48, 40))[1] for _ in range(3)]
    for name, gradient in runs[0].items():
        assert all(np.array_equal(gradient, other[name]) for other in runs[1:]), name


def test_a_block_with_hooks_or_in_half_precision_goes_back_to_mindspores_operators():
    net = network()
    use_fast_blocks(net, True)
    fast, x = net.blocks[0].fast, ms.Tensor(np.zeros((1, 4, 48), np.float32))
    assert fast.supports(x)
    assert not fast.supports(x.astype(ms.float16))
    net.blocks[0].attn.hook_point = object()
    assert not fast.supports(x)
    use_fast_blocks(net, False)
    assert net.blocks[0].fast is None


def test_the_search_for_values_that_are_not_finite_looks_into_the_blocks():
    net = network()
    use_fast_blocks(net, True)
    weight, fast = net.blocks[1].mlp.fc1.weight, net.blocks[1].fast
    weight.set_data(ms.Tensor(np.full(weight.shape, 3e38, np.float32)))
    assert "layer blocks.1.mlp.fc1 (Linear)" in find_divergence(diffusion_loss(net), batch(net), {}, {}, net)
    assert net.blocks[1].fast is fast is not None


@given(st.integers(1, 9), st.integers(1, 700))
def test_chunks_hold_every_token_once_and_few_at_a_time(images, tokens):
    counts = np.zeros((images, tokens), int)
    for chunk in chunks.chunks_of(images, tokens):
        counts[chunk.images, chunk.tokens] += 1
        assert counts[chunk.images, chunk.tokens].size <= chunks.CHUNK
    assert (counts == 1).all()


@given(st.integers(1, 5), st.integers(1, 17), st.integers(1, 5000), st.integers(1, 5000))
def test_groups_hold_every_head_once(images, heads, queries, keys):
    counts = np.zeros((images, heads), int)
    for image, group in cpu_operators.groups(images, heads, queries, keys):
        counts[image, group] += 1
    assert (counts == 1).all()


@pytest.mark.parametrize("library", [True, False], ids=["onednn", "numpy"])
@given(data=st.data())
@settings(max_examples=30)
def test_products_of_parts_and_transposes_are_those_of_numpy(library, data):
    with pytest.MonkeyPatch.context() as patch:
        if not library:
            patch.setattr(onednn, "function", lambda name: None)
        rows, inner, columns = (data.draw(st.integers(1, 20)) for _ in range(3))
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        transposed = data.draw(st.tuples(st.booleans(), st.booleans()))
        count = data.draw(st.sampled_from([None, 1, 3]))
        lead = () if count is None else (count,)

        def matrix(first, second, is_transposed):
            shape = (second, first) if is_transposed else (first, second)
            array = rng.standard_normal((*lead, *(side + 3 for side in shape)), dtype=np.float32)
            array = array[..., 1 : 1 + shape[0], 2 : 2 + shape[1]]
            return array.swapaxes(-1, -2) if is_transposed else array

        a, b = matrix(rows, inner, transposed[0]), matrix(inner, columns, transposed[1])
        out = rng.standard_normal((*lead, rows, columns + 2), dtype=np.float32)[..., 1 : columns + 1]
        add = data.draw(st.booleans())
        expected = 0.5 * np.matmul(a.astype(float), b.astype(float)) + add * out
        onednn.multiply(a, b, out, scale=0.5, add=add)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_a_matrix_without_a_contiguous_axis_is_refused():
    scattered = np.zeros((4, 6), np.float32)[::2, ::2]
    with pytest.raises(onednn.PixArtNBError, match="contiguous axis"):
        onednn.multiply(scattered, np.zeros((3, 2), np.float32), np.zeros((2, 2), np.float32))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=["lora", "dora", "dropout"])
def test_gradients_of_an_adapter_are_those_of_mindspores_operators(config):
    net = network()
    adapter = Adapters.of(net).add("style", LoraConfig(init_lora_weights="gaussian", **config))
    for parameter in adapter.parameters().values():
        parameter.set_data(parameter + 0.1)
    net.set_train(True)
    loss, tensors, weights = diffusion_loss(net), batch(net), list(adapter.parameters().values())
    expected = ms.value_and_grad(loss, None, weights, has_aux=True)(*tensors)
    use_fast_blocks(net, True)
    assert net.blocks[0].fast.supports(ms.Tensor(np.zeros((1, 4, 48), np.float32))) == ("lora_dropout" not in config)
    found = ms.value_and_grad(loss, None, weights, has_aux=True)(*tensors)
    for a, b in zip(expected[1], found[1], strict=True):
        np.testing.assert_allclose(b.asnumpy(), a.asnumpy(), rtol=1e-4, atol=1e-6)
