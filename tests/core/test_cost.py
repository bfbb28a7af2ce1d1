"""Parameters and MACs are counted from the shapes, and equal what the networks compute."""

from dataclasses import replace

import numpy as np
import pytest
from counted_macs import counted
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import SMALL, TINY_T5

from pixart_nb.core.backend import ms
from pixart_nb.core.cost import (
    caption_macs,
    decode_macs,
    empty_network,
    encode_image_macs,
    encode_macs,
    parameters,
    step_cost,
    step_macs,
)
from pixart_nb.core.fast import denoiser
from pixart_nb.core.models.controlnet import Controlled
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.run_plan import RunSettings, plan_run
from pixart_nb.core.sampling.guidance import Perturbation, guided_model
from pixart_nb.core.sampling.text import Conditioning


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


def test_a_controlnet_has_the_parameters_of_its_copies_and_projections():
    width, copies = 1152, 13
    block = 16 * width**2 + 19 * width  # qkv, proj, q, kv, proj, fc1, fc2 and the six rows of modulation
    added = copies * block + (copies + 1) * (width**2 + width)
    assert parameters(PixArtConfig(copy_blocks_num=copies)) == parameters(PixArtConfig()) + added


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


@pytest.mark.parametrize(
    ("guided", "layers", "compressed"), [(True, (1,), ()), (True, (0, 2), (2,)), (False, (1,), ())]
)
def test_macs_of_perturbed_attention_guidance_are_those_that_are_computed(guided, layers, compressed):
    compression = {"sampling": "mean", "scale_factor": 2, "kv_compress_layer": list(compressed)}
    config = replace(SMALL.transformer, kv_compress_config=compression if compressed else None)
    text, mask = random(1, 7, 24), np.ones((1, 7), bool)
    condition = Conditioning(text, mask, *((2 * text, mask) if guided else (None, None)))
    with counted() as first:
        predict = guided_model(zero_network(config), condition, 4.5, 64, 96, perturbation=Perturbation(layers, 3.0))
        predict(random(1, 4, 8, 12).asnumpy(), 5.0)
    with counted() as later:
        predict(random(1, 4, 8, 12).asnumpy(), 4.0)
    run = RunSettings(64, 96, guided=guided, steps=3, caption_tokens=7, negative_tokens=7, perturbed=layers)
    plan = plan_run(replace(SMALL, transformer=config), run)
    assert sum(later) == sum(plan.step_macs.values()) - plan.step_macs["compression"]
    assert sum(first) - sum(later) == plan.stages[1].macs - 3 * sum(plan.step_macs.values())


@pytest.mark.parametrize(("copies", "compressed", "micro"), [(1, (), False), (2, (0, 2), True)])
def test_macs_with_a_controlnet_are_those_that_are_computed(copies, compressed, micro):
    compression = {"sampling": "mean", "scale_factor": 2, "kv_compress_layer": list(compressed)}
    config = replace(SMALL.transformer, copy_blocks_num=copies, micro_condition=micro)
    config = replace(config, kv_compress_config=compression if compressed else None)
    latents, acting = random(2, 4, 8, 12), np.array([0.5, 0.0])
    net = Controlled(zero_network(config), latents[:1], np.array([5.0, 4.0]), acting)
    step = denoiser(net, random(2, 7, 24), np.ones((2, 7), bool))
    steps = []
    for timestep in (5.0, 5.0, 4.0):
        with counted() as macs:
            step(latents, timestep)
        steps.append(sum(macs))
    planned = [step_macs(config, 64, 96, [7, 7], control=scale > 0) for scale in acting]
    first, *later = steps
    assert later == [sum(macs.values()) - macs["compression"] for macs in planned]
    run = RunSettings(64, 96, steps=2, caption_tokens=7, negative_tokens=7, controlled_steps=1, images=1)
    plan = plan_run(replace(SMALL, transformer=config), run)
    assert plan.stages[1].macs == first - later[0] + sum(sum(macs.values()) for macs in planned)
    guessed = plan_run(plan.networks, replace(run, guess_mode=True))
    assert guessed.step_macs["controlnet"] == plan.step_macs["controlnet"] / 2
    assert guessed.step_macs["mlp"] == plan.step_macs["mlp"]
    assert guessed.stages[1].activations < plan.stages[1].activations
    assert plan.networks.parameters()["controlnet"] == sum(p.size for p in net.net.controlnet.get_parameters())
    without_image = plan_run(plan.networks, replace(run, images=0)).stages[0].macs
    assert plan.stages[0].macs - without_image == encode_image_macs(SMALL.vae, 64, 96)


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
    assert sum(macs) == encode_macs(TINY_T5, tokens)


@settings(max_examples=6)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    widths=st.sampled_from([(8, 16, 16), (4, 8, 8, 8)]),
    layers=st.integers(1, 2),
    attention=st.booleans(),
)
def test_macs_of_the_autoencoder_are_those_that_are_computed(height, width, widths, layers, attention):
    config = VAEConfig(
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=4,
        mid_block_add_attention=attention,
        use_post_quant_conv=attention,
        use_quant_conv=attention,
    )
    net, factor = zero_network(config), 2 ** (len(widths) - 1)
    with counted() as macs:
        net.decode(random(1, 4, height, width))
    assert sum(macs) == sum(decode_macs(config, factor * height, factor * width).values())
    with counted() as macs:
        net.encode(random(1, 3, factor * height, factor * width))
    assert sum(macs) == encode_image_macs(config, factor * height, factor * width)


def test_a_size_that_is_no_multiple_of_a_token_is_refused():
    with pytest.raises(ValueError, match="multiples of 16"):
        step_cost(SMALL.transformer, 100, 64)
