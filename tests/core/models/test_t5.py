"""The text encoder gives the reference's embeddings."""

import numpy as np
import pytest
from reference_data import FORWARD, diffusers, relative_error

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import LOADERS
from pixart_nb.core.models.low_precision import for_inference
from pixart_nb.core.models.t5 import T5Config, T5Encoder, relative_position_buckets


def encoder(name="sigma"):
    return LOADERS["text_encoder"](diffusers(name)[0] / "text_encoder", ms.float32)


@pytest.mark.parametrize("name", ["sigma", "alpha"])
def test_embeddings_equal_the_reference_at_every_position(name):
    _, _, golden = diffusers(name)
    out = encoder(name)(golden["input_ids"], golden["prompt_mask"]).asnumpy()
    assert relative_error(out, golden["prompt_embeds"]) < FORWARD


def test_tokens_after_the_longest_prompt_need_not_be_computed():
    _, _, golden = diffusers("sigma")
    ids, mask = golden["input_ids"][:1], golden["prompt_mask"][:1]
    length = int(mask.sum())
    net = encoder()
    short = net(ids[:, :length], mask[:, :length]).asnumpy()
    assert relative_error(short, net(ids, mask).asnumpy()[:, :length]) < 1e-6


def test_position_buckets_grow_logarithmically_and_know_the_direction():
    buckets = relative_position_buckets(300, 32, 128)
    assert buckets[0, 0] == 0
    assert buckets[0, :8].tolist() == [0, 17, 18, 19, 20, 21, 22, 23]
    assert buckets[:8, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert buckets[0, 299] == 31
    assert buckets[299, 0] == 15
    assert (np.diff(buckets[0, 1:]) >= 0).all()


def test_half_precision_weights_stay_close():
    _, _, golden = diffusers("sigma")
    net = LOADERS["text_encoder"](diffusers("sigma")[0] / "text_encoder", ms.float16)
    out = net(golden["input_ids"], golden["prompt_mask"])
    assert relative_error(out.astype(ms.float32).asnumpy(), golden["prompt_embeds"]) < 1e-2


def test_token_ids_of_another_tokenizer_are_refused():
    with pytest.raises(ValueError, match=r"ids 0\.\.190"):
        encoder()(np.array([[191]]), np.array([[1]]))


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        encoder()(np.array([[1, 1]]), np.array([[0, 0]]))


def test_another_feed_forward_is_refused():
    with pytest.raises(ValueError, match="gated-gelu"):
        T5Config(feed_forward_proj="relu")


def test_the_configuration_of_another_network_is_named():
    with pytest.raises(ValueError, match="vae: it is the configuration of 'AutoencoderKL'; expected that of a T5"):
        T5Config.from_dict({"_class_name": "AutoencoderKL", "latent_channels": 4}, "vae")


def test_the_defaults_are_those_of_xxl():
    config = T5Config()
    per_layer = 4 * 4096 * config.num_heads * config.d_kv + 3 * 4096 * config.d_ff
    assert 4.7e9 < config.num_layers * per_layer + config.vocab_size * config.d_model < 4.8e9


def test_a_fresh_encoder_gives_finite_embeddings_of_unit_size():
    net = T5Encoder(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2))
    net.initialize(np.random.default_rng(0))
    out = net(np.arange(12).reshape(2, 6), np.ones((2, 6))).asnumpy()
    assert abs(np.sqrt((out**2).mean()) - 1) < 0.05


def test_half_precision_weights_do_not_overflow_where_float32_does_not():
    golden = diffusers("sigma")[2]
    outputs = []
    for dtype in (ms.float32, ms.float16):
        net = LOADERS["text_encoder"](diffusers("sigma")[0] / "text_encoder", dtype)
        feed_forward = net.encoder.block[0].layer[1].DenseReluDense
        for weight, factor in ((feed_forward.wi_1.weight, 300), (feed_forward.wo.weight, 3000)):
            weight.set_data(ms.Tensor(weight.asnumpy().astype(np.float32) * factor).astype(dtype))
        outputs.append(net(golden["input_ids"], golden["prompt_mask"]).astype(ms.float32).asnumpy())
    assert np.isfinite(outputs[1]).all()
    assert relative_error(outputs[1], outputs[0]) < 1e-2


@pytest.mark.parametrize("dtype", [ms.float32, ms.bfloat16])
def test_arrays_give_the_embeddings_of_the_layers(dtype):
    net = for_inference(
        T5Encoder(T5Config(vocab_size=50, d_model=48, d_kv=16, d_ff=80, num_heads=4, num_layers=3)), dtype
    )
    net.initialize(np.random.default_rng(0))
    ids, mask = np.random.default_rng(1).integers(0, 50, (3, 9)), np.ones((3, 9), bool)
    mask[0, 4:], mask[1, 2:5] = False, False
    layers = net.forward(ms.Tensor(ids.astype(np.int32)), ms.Tensor(mask), net.buckets(9)).asnumpy()
    arrays, ids[0, 4:] = net(ids, mask).asnumpy(), 7
    assert relative_error(arrays, layers) < (2e-6 if dtype == ms.float32 else 1e-2)
    assert np.array_equal(net(ids, mask).asnumpy()[0, :4], arrays[0, :4])  # what is masked does not matter


def test_compiled_it_gives_the_same_embeddings():
    golden = diffusers("sigma")[2]
    net = encoder()
    ids, mask = ms.Tensor(golden["input_ids"].astype(np.int32)), ms.Tensor(golden["prompt_mask"].astype(bool))
    buckets = net.buckets(ids.shape[1])

    def forward(ids, mask):
        return net.forward(ids, mask, buckets)

    assert relative_error(ms.jit(forward)(ids, mask).asnumpy(), golden["prompt_embeds"]) < FORWARD


def test_the_gradient_predicts_the_change_of_the_output():
    golden = diffusers("sigma")[2]
    net = encoder()
    ids, mask = ms.Tensor(golden["input_ids"].astype(np.int32)), ms.Tensor(golden["prompt_mask"].astype(bool))
    buckets, goal = net.buckets(ids.shape[1]), ms.Tensor(golden["negative_embeds"])

    def loss(ids, mask):
        return (net.forward(ids, mask, buckets) * goal).mean()

    weight = net.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    slope = ms.grad(loss, None, weight)(ids, mask).asnumpy().astype(np.float64)
    before, direction = weight.asnumpy().copy(), slope / np.linalg.norm(slope)
    values = []
    for step in (0.05, -0.05):
        weight.set_data(ms.Tensor((before + step * direction).astype(np.float32)))
        values.append(float(loss(ids, mask)))
    assert (values[0] - values[1]) / 0.1 == pytest.approx(np.linalg.norm(slope), rel=0.02)
