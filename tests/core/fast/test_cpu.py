"""The way that samplers take through the transformer computes what ``PixArt.denoise`` computes."""

import numpy as np
import pytest
from reference_data import OFFICIAL, official, relative_error

from pixart_nb.core import PixArtConfig, load_transformer
from pixart_nb.core.backend import ms
from pixart_nb.core.fast import cpu, denoiser
from pixart_nb.core.fast.cross_attention import OneTokenAttention, caption_groups, merge_small_groups
from pixart_nb.core.models.kv_compression import compress_tokens
from pixart_nb.core.models.transformer import PixArt, trim_caption

SMALL = dict(hidden_size=48, num_heads=2, depth=2, caption_channels=12, input_size=8, model_max_length=40)
CLOSE = 2e-6


def small_net(**changes) -> PixArt:
    """A small net with weights in which every part shows: nothing is zero."""
    net = PixArt(PixArtConfig(**SMALL | changes))
    rng = np.random.default_rng(3)
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor((0.2 * rng.standard_normal(parameter.shape)).astype(np.float32)))
    return net


def both_ways(net, lengths, height=8, width=12, timestep=811.0, seed=4):
    """The prediction by ``denoise`` and by ``Denoiser`` for captions of these lengths."""
    rng = np.random.default_rng(seed)
    rows, longest = len(lengths), max(lengths)
    latents = ms.Tensor(rng.standard_normal((rows, 4, height, width), dtype=np.float32))
    caption = ms.Tensor(rng.standard_normal((rows, longest, net.config.caption_channels), dtype=np.float32))
    mask = np.arange(longest)[None] < np.array(lengths)[:, None]
    time = ms.Tensor(np.full(rows, timestep, np.float32))
    micro, positions = net.micro_conditions(latents), net.positions(height, width)
    trimmed, seen = trim_caption(caption, mask)
    slow = net.denoise(latents, time, net.caption_keys_values(trimmed), seen, positions, micro)
    return slow.asnumpy(), denoiser(net, caption, mask)(latents, timestep).asnumpy()


@pytest.mark.parametrize(
    "lengths", [(1, 7), (1, 1), (7, 7), (3, 30), (1, 30, 5), (24, 1), (1, 1, 1, 9, 3, 5), (5, 26, 30, 4), (2,)]
)
def test_captions_of_any_length_give_the_numbers_of_denoise(lengths):
    slow, fast = both_ways(small_net(), lengths)
    assert relative_error(fast, slow) < CLOSE


VARIANTS = pytest.mark.parametrize(
    "changes",
    [
        dict(qk_norm=True),
        dict(micro_condition=True),
        *(
            dict(kv_compress_config=dict(sampling=name, scale_factor=2, kv_compress_layer=[1]), qk_norm=normed)
            for name in ("conv", "ave", "uniform", "mean")
            for normed in (False, True)
        ),
    ],
)


@VARIANTS
def test_every_variant_of_attention_gives_the_numbers_of_denoise(changes):
    slow, fast = both_ways(small_net(**changes), (1, 7), height=12, width=20)
    assert relative_error(fast, slow) < CLOSE


def test_large_cells_are_averaged_in_steps():
    cells = dict(sampling="mean", scale_factor=6, kv_compress_layer=[0, 1])
    slow, fast = both_ways(small_net(kv_compress_config=cells), (1, 7), height=28, width=52)
    assert relative_error(fast, slow) < CLOSE
    tokens = np.random.default_rng(0).standard_normal((2, 14, 26, 5)).astype(np.float32)
    shrunk = compress_tokens(ms.Tensor(tokens.reshape(2, -1, 5)), 14, 26, 6, "mean")
    means = tokens[:, :12, :24].reshape(2, 2, 6, 4, 6, 5).mean((2, 4)).reshape(2, 8, 5)
    assert relative_error(shrunk.asnumpy(), means) < CLOSE


@pytest.mark.parametrize("case", OFFICIAL)
def test_official_models_give_the_numbers_of_denoise(case):
    path, config, arrays = official(case)
    net = load_transformer(path, PixArtConfig(**config))
    slow, fast = both_ways(net, (1, 5), *arrays["latents"].shape[2:])
    assert relative_error(fast, slow) < 1e-5


def test_images_of_the_same_prompts_give_the_numbers_of_denoise():
    """Two rows of each caption, side by side, as with several images for a prompt."""
    net, rng = small_net(), np.random.default_rng(5)
    caption = rng.standard_normal((3, 6, 12)).astype(np.float32).repeat(2, 0)
    mask = (np.arange(6)[None] < np.array([1, 6, 4])[:, None]).repeat(2, 0)
    latents = ms.Tensor(rng.standard_normal((6, 4, 8, 8)).astype(np.float32))
    denoise = denoiser(net, ms.Tensor(caption), mask)
    together = denoise(latents, 300.0).asnumpy()
    assert [len(layer.captions) for layer in denoise.plan.cross_attentions[0][1:]] == [2]
    assert isinstance(denoise.plan.cross_attentions[0][0], OneTokenAttention)
    alone = [
        denoiser(net, ms.Tensor(caption[i : i + 1]), mask[i : i + 1])(latents[i : i + 1], 300.0).asnumpy()
        for i in range(6)
    ]
    assert relative_error(together, np.concatenate(alone)) < CLOSE


def test_neighbours_of_few_rows_go_together_and_captions_of_one_token_stay_alone():
    lengths = [1, 3, 4, 30, 31, 1]
    caption = np.random.default_rng(0).standard_normal((6, 31, 3)).astype(np.float32)
    mask = np.arange(31)[None] < np.array(lengths)[:, None]
    groups = caption_groups(ms.Tensor(caption), mask)
    result = merge_small_groups(groups, 64, 24, 128)
    assert [(g.start, g.stop, g.tokens, g.mask.sum()) for g in result] == [
        (0, 1, 1, 1), (1, 3, 4, 7), (3, 5, 31, 61), (5, 6, 1, 1)
    ]  # fmt: skip
    assert [(g.start, g.stop) for g in merge_small_groups(groups, 65, 24, 128)] == [(i, i + 1) for i in range(6)]


def test_a_denoiser_serves_images_of_another_size():
    net, rng = small_net(), np.random.default_rng(6)
    caption, mask = ms.Tensor(rng.standard_normal((2, 5, 12)).astype(np.float32)), np.ones((2, 5), bool)
    denoise = denoiser(net, caption, mask)
    for height, width in ((8, 8), (4, 12)):
        latents = ms.Tensor(rng.standard_normal((2, 4, height, width)).astype(np.float32))
        fresh = denoiser(net, caption, mask)(latents, 7.0).asnumpy()
        assert np.array_equal(denoise(latents, 7.0).asnumpy(), fresh)


def test_parts_of_the_rows_give_the_numbers_of_the_whole(monkeypatch):
    net = small_net()
    _, whole = both_ways(net, (1, 7, 30))
    monkeypatch.setattr(cpu, "MICRO_BATCH", 5)
    _, parts = both_ways(net, (1, 7, 30))
    assert relative_error(parts, whole) < CLOSE


@VARIANTS
def test_queries_keys_and_values_of_micro_batches_are_those_of_one(monkeypatch, changes):
    net = small_net(**changes)
    _, together = both_ways(net, (1, 7), height=12, width=20)
    monkeypatch.setattr(cpu, "MICRO_BATCH", 50)
    _, apart = both_ways(net, (1, 7), height=12, width=20)
    assert relative_error(apart, together) < CLOSE


def test_neighbours_with_the_same_tokens_are_one_group():
    caption = np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)
    caption[1, :2] = caption[0, :2]
    caption[4] = caption[3]
    mask = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    groups = caption_groups(ms.Tensor(caption), mask)
    assert [(g.start, g.stop, g.tokens) for g in groups] == [(0, 2, 2), (2, 3, 2), (3, 5, 4)]


def test_a_mask_with_gaps_leaves_out_what_it_hides():
    caption = np.random.default_rng(0).standard_normal((1, 4, 3)).astype(np.float32)
    (group,) = caption_groups(ms.Tensor(caption), np.array([[1, 0, 1, 0]], bool))
    assert np.array_equal(group.caption.asnumpy(), caption[:, [0, 2]])
