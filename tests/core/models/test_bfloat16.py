"""bfloat16 layers on the CPU: the products of the rounded inputs, in float32."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_data import relative_error
from safetensors.numpy import load_file
from test_transformer import inputs, small_net

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core import load_controlnet, load_transformer, onednn, trace
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.controlnet import save_controlnet
from pixart_nb.core.checkpoints.load import load_t5
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.fast import denoiser
from pixart_nb.core.lora import Adapters, LoraConfig
from pixart_nb.core.models import low_precision
from pixart_nb.core.models.controlnet import Controlled, PixArtControlNet
from pixart_nb.core.models.layers import Embedding, Linear
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.onednn import linear

needs_products = pytest.mark.skipif(
    bool(low_precision.unsupported()), reason=f"needs bfloat16 products: {low_precision.unsupported()}"
)


def rounded(x):
    """Values rounded to the 8 leading bits of their mantissa, halves to even."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(mantissa * 256), exponent - 8).astype(np.float32)


def bits(x):
    return ms.Tensor(rounded(x)).astype(ms.bfloat16).asnumpy().view(np.uint16)


def copied(source, target):
    """Give ``target`` the weights of ``source``."""
    weights = dict(source.parameters_and_names())
    for name, parameter in target.parameters_and_names():
        parameter.set_data(weights[name].astype(parameter.dtype))
    return target.set_train(False)


BUNDLED = Path(__file__).parents[3] / "data/tiny-sigma"


def predicted(net):
    """Predict the noise of fixed latents and captions, by the denoiser."""
    rng = np.random.default_rng(1)
    caption = ms.Tensor(rng.standard_normal((2, 5, net.config.caption_channels), dtype=np.float32))
    latents = ms.Tensor(rng.standard_normal((2, 4, 16, 16), dtype=np.float32))
    return denoiser(net, caption, None)(latents, 500.0).asnumpy()


@needs_products
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 70), st.integers(1, 300), st.booleans())
def test_a_product_equals_that_of_the_rounded_matrices(rows, inner, columns, with_bias):
    rng = np.random.default_rng(rows * inner + columns)
    x, weight = (rng.standard_normal(shape, dtype=np.float32) for shape in ((rows, inner), (columns, inner)))
    bias = rng.standard_normal(columns, dtype=np.float32) if with_bias else None
    out = linear(x, bits(weight), bias)
    expected = rounded(x).astype(np.float64) @ rounded(weight).astype(np.float64).T + (bias if with_bias else 0)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, atol=1e-4, rtol=1e-4)


@needs_products
def test_infinity_and_nan_are_passed_on():
    x = np.array([[np.inf, 1.0], [np.nan, 1.0], [1.0, 1.0]], np.float32)
    out = linear(x, bits(np.ones((1, 2), np.float32)))
    assert np.isinf(out[0, 0])
    assert np.isnan(out[1, 0])
    assert out[2, 0] == 2


@needs_products
def test_no_bits_of_nan_become_a_number_and_large_values_stay_finite():
    x = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000], np.uint32).view(np.float32).reshape(-1, 1)
    assert np.isnan(linear(x, bits(np.ones((2, 1), np.float32)))).all()
    beyond_float16 = linear(np.full((2, 1), 1e6, np.float32), bits(np.full((2, 1), 1e6, np.float32)))
    np.testing.assert_allclose(beyond_float16, 1e12, rtol=1e-2)


@needs_products
def test_a_transformer_predicts_within_the_rounding_of_its_weights():
    net = small_net(hidden_size=48, depth=3)
    narrow = copied(net, low_precision.to_bfloat16(PixArt(net.config)))
    latents, timestep, caption = inputs()
    error = relative_error(narrow(latents, timestep, caption).asnumpy(), net(latents, timestep, caption).asnumpy())
    assert 1e-4 < error < 4e-2


def test_weights_take_two_bytes_and_the_rest_stays_float32():
    net = low_precision.to_bfloat16(PixArt(small_net().config))
    dtypes = {parameter.dtype for name, parameter in net.parameters_and_names() if name.endswith("qkv.weight")}
    assert dtypes == {ms.bfloat16}
    assert net.x_embedder.proj.weight.dtype == ms.float32
    assert net.dtype == ms.float32


@needs_products
def test_embeddings_are_the_rounded_rows():
    table = np.random.default_rng(0).standard_normal((7, 5), dtype=np.float32)
    layer = low_precision.BFloat16Embedding(7, 5)
    layer.weight.set_data(ms.Tensor(rounded(table)).astype(ms.bfloat16))
    ids = np.array([[6, 0], [3, 3]], np.int32)
    assert np.array_equal(layer(ms.Tensor(ids)).asnumpy(), rounded(table)[ids])


@needs_products
def test_training_is_refused():
    layer = low_precision.BFloat16Linear(4, 3).set_train()
    with pytest.raises(PixArtNBError, match="no gradient on the CPU: train with dtype fp32"):
        layer(ms.Tensor(np.ones((2, 4), np.float32)))


def test_another_layer_is_left_alone():
    class Other(Linear):
        """A layer with a method of its own."""

    net = PixArt(small_net().config)
    net.final_layer.linear = Other(24, 32)
    low_precision.to_bfloat16(net)
    assert type(net.final_layer.linear) is Other
    assert not isinstance(Embedding(2, 2), low_precision.BFloat16Embedding)


@needs_products
def test_a_checkpoint_loads_in_half_the_memory_and_encodes_and_denoises(tmp_path):
    bundled = Path(__file__).parents[3] / "data/tiny-sigma"
    exact, narrow = (load_t5(bundled / "text_encoder", dtype) for dtype in (ms.float32, ms.bfloat16))
    sizes = [sum(p.nbytes for p in net.get_parameters()) for net in (exact, narrow)]
    assert sizes[1] < 0.52 * sizes[0]
    ids, mask = np.array([[5, 9, 1]], np.int32), np.ones((1, 3), bool)
    assert relative_error(narrow(ids, mask).asnumpy(), exact(ids, mask).asnumpy()) < 3e-2
    exact, narrow = (load_transformer(bundled / "transformer", dtype=dtype) for dtype in (ms.float32, ms.bfloat16))
    rng, config = np.random.default_rng(1), exact.config
    caption = ms.Tensor(rng.standard_normal((2, 5, config.caption_channels), dtype=np.float32))
    latents = ms.Tensor(rng.standard_normal((2, 4, 16, 16), dtype=np.float32))
    outputs = [denoiser(net, caption, None)(latents, 500.0).asnumpy() for net in (narrow, exact)]
    assert 1e-5 < relative_error(*outputs) < 3e-2


def test_a_processor_without_the_products_computes_in_float32_and_says_so(monkeypatch):
    monkeypatch.setattr(low_precision, "unsupported", lambda: "this processor has neither AVX512-BF16 nor AMX-BF16")
    bundled = Path(__file__).parents[3] / "data/tiny-sigma"
    with pytest.warns(UserWarning, match="computed in float32: this processor has neither"):
        net = load_transformer(bundled / "transformer", dtype=ms.bfloat16)
    assert {parameter.dtype for parameter in net.get_parameters()} == {ms.float32}


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_half_precision_without_the_products_is_float32_bit_for_bit(monkeypatch, dtype):
    monkeypatch.setattr(low_precision, "unsupported", lambda: "no products")
    with pytest.warns(
        UserWarning, match=rf"{str(dtype).lower()} weights are kept and computed in float32: no products"
    ):
        pipe = PixArtSigmaPipeline.from_pretrained(BUNDLED, dtype, text_encoder=None, tokenizer=None, vae=None)
    assert pipe.dtype == ms.float32
    exact = load_transformer(BUNDLED / "transformer")
    assert np.array_equal(predicted(pipe.transformer), predicted(exact))


@needs_products
def test_float16_on_a_cpu_is_computed_in_bfloat16_and_says_so():
    with pytest.warns(UserWarning, match="float16 weights are rounded to bfloat16, which this processor multiplies"):
        pipe = PixArtSigmaPipeline.from_pretrained(BUNDLED, ms.float16, text_encoder=None, tokenizer=None, vae=None)
    assert pipe.dtype == ms.bfloat16
    assert pipe.to(ms.float16) is pipe
    assert pipe.to(ms.bfloat16) is pipe
    with pytest.raises(ValueError, match="the weights are BFloat16"):
        pipe.to(ms.float32)
    same = load_transformer(BUNDLED / "transformer", dtype=ms.bfloat16)
    assert np.array_equal(predicted(pipe.transformer), predicted(same))


@needs_products
def test_a_trace_of_bfloat16_changes_nothing_and_has_the_maps_of_float32():
    latents, maps = [], []
    for dtype in ("fp32", "fp16"):
        pipe = PixArtSigmaPipeline.from_pretrained(BUNDLED, mindspore_dtype=dtype, vae=None)
        options = {"prompt": "a red mushroom on grass", "num_inference_steps": 2, "guidance_scale": 1.0}
        *_, plain = pipe.sample(**options, generator=np.random.default_rng(1))
        with trace(pipe, [0, 1]) as recorded:
            *_, last = pipe.sample(**options, generator=np.random.default_rng(1))
        assert relative_error(last.latents, plain.latents) < 1e-5
        maps.append(recorded.rows(recorded.names[0], recorded.steps[0], 0))
        latents.append(last.latents)
    assert relative_error(*maps[::-1]) < 3e-2
    assert relative_error(*latents[::-1]) < 5e-2


@needs_products
def test_a_controlnet_in_half_precision_keeps_its_copies_in_bfloat16(tmp_path):
    rng, outputs = np.random.default_rng(1), []
    net = PixArtControlNet.from_transformer(load_transformer(BUNDLED / "transformer"), 2)
    weights = {
        name: (p.asnumpy() + 0.02 * rng.standard_normal(p.shape)).astype(np.float32)
        for name, p in net.parameters_and_names()
        if name.startswith("controlnet.")
    }
    save_controlnet(tmp_path, weights)
    control = ms.Tensor(rng.standard_normal((1, 4, 16, 16), dtype=np.float32))
    for dtype in (ms.float16, ms.float32):
        base = load_transformer(BUNDLED / "transformer", dtype=dtype)
        controlled = load_controlnet(tmp_path, None, dtype, base)
        outputs.append(predicted(Controlled(controlled, control, np.ones(1), np.ones(1))))
        kept = {p.dtype for name, p in controlled.parameters_and_names() if name.endswith("after_proj.weight")}
        assert kept == {ms.bfloat16 if dtype == ms.float16 else ms.float32}
    assert 1e-5 < relative_error(*outputs) < 3e-2
    assert relative_error(predicted(base), outputs[1]) > 3e-2


@needs_products
def test_a_pipeline_with_damaged_weights_names_the_stage():
    pipe = PixArtSigmaPipeline.from_pretrained(BUNDLED, mindspore_dtype="bf16", vae=None)
    weight = pipe.transformer.blocks[0].mlp.fc1.weight
    weight.set_data(ms.Tensor(np.full(weight.shape, np.nan, np.float32)).astype(ms.bfloat16))
    with pytest.raises(PixArtNBError, match="the output of the transformer at timestep"):
        pipe("a red mushroom on grass", num_inference_steps=1, output_type="latent")


@pytest.mark.parametrize(
    ("flags", "function", "reason"),
    [
        ("sse avx2", None, "this processor has neither AVX512-BF16 nor AMX-BF16"),
        ("sse avx512_bf16", None, "ships no oneDNN 2 library with dnnl_gemm_bf16bf16f32"),
        ("amx_bf16", lambda *arguments: 3, r"oneDNN refused a product of \d+ x 64 x \d+ \(status 3\)"),
        ("avx512_bf16", lambda *arguments: 0, "oneDNN's bfloat16 product is wrong by .* in a test"),
    ],
)
def test_the_reason_why_a_machine_has_no_products_is_a_sentence(monkeypatch, tmp_path, flags, function, reason):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(low_precision, "Path", lambda name: tmp_path / "cpuinfo")
    monkeypatch.setattr(onednn, "function", lambda name: function)
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, 7, dtype))
    assert re.search(reason, low_precision.unsupported.__wrapped__())


@needs_products
def test_a_pipeline_in_bfloat16_draws_the_image_of_float32_and_is_saved_for_everyone(tmp_path):
    bundled = Path(__file__).parents[3] / "data/tiny-sigma"
    images = []
    for dtype in ("fp32", "bf16"):
        pipe = PixArtSigmaPipeline.from_pretrained(bundled, mindspore_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 4, "output_type": "np", "generator": np.random.default_rng(1)}
        images.append(pipe("a red mushroom on grass", **options)[0])
    assert 0 < np.sqrt(np.mean((images[0] - images[1]) ** 2)) < 0.06
    pipe.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors")
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}


@needs_products
@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_works_beside_bfloat16_weights_and_leaves_them_as_they_were(config):
    bundled = Path(__file__).parents[3] / "data/tiny-sigma/transformer"
    exact, net = (load_transformer(bundled, dtype=dtype) for dtype in (ms.float32, ms.bfloat16))
    before, results = predicted(net), []
    for each in (exact, net):
        adapters = Adapters.of(each)
        adapter = adapters.add("style", LoraConfig(init_lora_weights="gaussian", **config))
        for parameter in adapter.parameters().values():
            parameter.set_data(parameter + 0.02)
        results.append(predicted(each))
    assert relative_error(results[1], results[0]) < 3e-2 < relative_error(before, results[0])
    adapters.fuse()
    assert relative_error(predicted(net), results[0]) < 3e-2
    adapters.unfuse()
    adapters.delete(["style"])
    assert np.array_equal(predicted(net), before)
