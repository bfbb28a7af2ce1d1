"""Parameters and MACs are counted from the shapes, and equal what the networks compute."""

from dataclasses import replace

import numpy as np
import pytest
from counted_macs import counted
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import SMALL, TINY_T5

from pixart_nb.core.backend import ms
from pixart_nb.core.cost import caption_macs, decode_macs, empty_network, encode_macs, parameters, step_cost, step_macs
from pixart_nb.core.fast import denoiser
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae_blocks import VAEConfig


def zero_network(config):
    net = empty_network(config)
    for parameter in net.get_parameters():
        parameter.init_data()
    return net.set_train(False)


def random(*shape):
    return ms.Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def test_parameters_are_those_of_the_published_networks():
    assert parameters(PixArtConfig()) == 612_084_896  # with the empty caption of 300 tokens
    assert parameters(T5Config()) == 4_762_310_656
    assert parameters(VAEConfig()) == 83_653_863


@settings(max_examples=12)
@given(
    height=st.integers(2, 7),
    width=st.integers(2, 7),
    caption=st.integers(1, 16),
    layers=st.sets(st.integers(0, 2)),
    operator=st.sampled_from(["conv", "mean", "ave"]),
    micro=st.booleans(),
)
def test_macs_of_a_guided_step_are_those_that_are_computed(height, width, caption, layers, operator, micro):
    compression = {"sampling": operator, "scale_factor": 2, "kv_compress_layer": sorted(layers)}
    config = replace(SMALL.transformer, micro_condition=micro, kv_compress_config=compression if layers else None)
    both = random(2, caption, 24)
    latents = random(2, 4, 2 * height, 2 * width)
    with counted() as first:  # the first step prepares the captions
        step = denoiser(zero_network(config), both, np.ones((2, caption), bool))
        step(latents, 5.0)
    with counted() as later:
        step(latents, 5.0)
    planned = step_macs(config, 16 * height, 16 * width, [caption, caption])
    assert sum(later) == sum(planned.values()) - planned["compression"]  # compression is element-wise arithmetic
    assert sum(first) - sum(later) == 2 * caption_macs(config, caption)


def test_the_blocks_of_a_step_have_the_cost_that_compression_is_compared_by():
    cost = step_cost(SMALL.transformer, 96, 64, 30)
    macs = step_macs(SMALL.transformer, 96, 64, [30])
    assert sum(count for name, count in macs.items() if name not in ("patches", "timestep")) == cost.macs


@settings(max_examples=6)
@given(tokens=st.integers(1, 12))
def test_macs_of_the_text_encoder_are_those_that_are_computed(tokens):
    net = zero_network(TINY_T5)
    with counted() as macs:
        net(np.ones((1, tokens)), np.ones((1, tokens)))
    mask = TINY_T5.num_layers * TINY_T5.num_heads * tokens**2  # a column that is not counted
    assert sum(macs) == encode_macs(TINY_T5, tokens) + mask


@settings(max_examples=6)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    widths=st.sampled_from([(8, 16, 16), (4, 8, 8, 8)]),
    layers=st.integers(1, 2),
    attention=st.booleans(),
)
def test_macs_of_the_decoder_are_those_that_are_computed(height, width, widths, layers, attention):
    config = VAEConfig(
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=4,
        mid_block_add_attention=attention,
        use_post_quant_conv=attention,
    )
    net, factor = zero_network(config), 2 ** (len(widths) - 1)
    with counted() as macs:
        net.decode(random(1, 4, height, width))
    assert sum(macs) == sum(decode_macs(config, factor * height, factor * width).values())


def test_a_size_that_is_no_multiple_of_a_token_is_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        step_cost(SMALL.transformer, 100, 64)
