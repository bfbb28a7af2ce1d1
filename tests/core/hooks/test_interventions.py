"""Interventions do what they say, together or alone, and leave no trace in the model."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
from reference_data import relative_error
from test_transformer import small_net
from traced_models import CALL, assert_untouched, compressing, draw, inputs, never

from benchmarks.ascend_stand_ins import ascend
from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core import ablate_heads, compression_loss, replace_compression, reweight_token, swap_prompt, trace
from pixart_nb.core.backend import ms
from pixart_nb.core.fast.cpu import CPUDenoiser
from pixart_nb.core.hooks.hook_points import Hook, HookManager, attached

FIRST = "blocks.0.cross_attn"
SAMPLE = {key: value for key, value in CALL.items() if key not in ("output_type", "use_resolution_binning")}


@pytest.fixture
def net():
    return small_net()


def maps(pipe, *changes, name=FIRST, step=0, **options):
    """Attention of a layer (pictures, heads, queries, keys) under changes, and the latents that came out."""
    with trace(pipe, announce=None, **options) as t:
        out = draw_with(pipe, *changes)
    return np.stack([t.rows(name, step, None, row=row) for row in range(len(t.labels))]), out, t


def draw_with(pipe, *changes):
    if not changes:
        return draw(pipe)
    with changes[0](pipe):
        return draw_with(pipe, *changes[1:])


# ---- heads


@pytest.mark.parametrize(("kind", "part"), [("self", "attn"), ("cross", "cross_attn")])
def test_a_head_that_is_off_gives_what_a_projection_without_it_gives(net, kind, part):
    plain = net(*inputs()).asnumpy()
    with ablate_heads(net, layers=1, heads=1, attention=kind):
        off = net(*inputs()).asnumpy()
    projection = getattr(net.blocks[1], part).proj.weight
    weight = projection.asnumpy().copy()
    weight[:, 12:] = 0  # the second of two heads of 12 numbers
    projection.set_data(ms.Tensor(weight))
    assert relative_error(off, net(*inputs()).asnumpy()) < 1e-6
    assert relative_error(off, plain) > 1e-3


def test_heads_are_off_at_the_chosen_steps_only(pipe):
    before, _, _ = maps(pipe, name="blocks.2.attn", step=1)
    during, _, _ = maps(pipe, lambda p: ablate_heads(p, 0, steps=1), name="blocks.2.attn", step=1)
    first, _, _ = maps(pipe, lambda p: ablate_heads(p, 0, steps=1), name="blocks.2.attn", step=0)
    assert np.abs(during - before).max() > 1e-4
    assert np.array_equal(first, maps(pipe, name="blocks.2.attn")[0])


# ---- words


def test_a_scaled_word_gets_so_much_more_and_rows_still_sum_to_one(pipe):
    before, plain, t = maps(pipe)
    after, out, _ = maps(pipe, lambda p: reweight_token(p, "mushroom", 3.0))
    tokens = list(t.word_tokens()[2].tokens)
    factors = np.ones(before.shape[-1])
    factors[tokens] = 3.0
    expected = before[0] * factors / (before[0] * factors).sum(-1, keepdims=True)
    assert np.allclose(after[0], expected, atol=1e-5)
    assert np.array_equal(after[1], before[1])  # the other prompt has no mushroom
    assert relative_error(out[0], plain[0]) > 1e-3
    assert relative_error(out[1], plain[1]) < 1e-5


def test_rows_without_a_prompt_are_left_alone(pipe):
    before, _, _ = maps(pipe, rows="unconditional")
    after, _, _ = maps(pipe, lambda p: reweight_token(p, "red", 5.0), rows="unconditional")
    assert np.array_equal(before, after)


def test_a_factor_of_zero_takes_a_word_away_and_one_changes_nothing(pipe):
    before, plain, _ = maps(pipe)
    without, _, t = maps(pipe, lambda p: reweight_token(p, "red mushroom", 0))
    tokens = [token for word in t.word_tokens()[1:3] for token in word.tokens]
    assert (without[0][..., tokens] == 0).all()
    assert np.allclose(without.sum(-1), 1, atol=1e-5)
    same, out, _ = maps(pipe, lambda p: reweight_token(p, "red", 1.0))
    assert np.allclose(same, before, atol=1e-6)
    assert relative_error(out, plain) < 1e-5


def test_scaling_is_of_the_chosen_heads_and_layers(pipe):
    before, _, _ = maps(pipe)
    after, _, _ = maps(pipe, lambda p: reweight_token(p, "red", 4.0, layers=0, heads=1))
    assert np.array_equal(after[0][0], before[0][0])
    assert np.abs(after[0][1] - before[0][1]).max() > 1e-2
    later, _, _ = maps(pipe, lambda p: reweight_token(p, "red", 4.0, layers=1))
    assert np.array_equal(later, before)


class Outputs(Hook):
    """Keeps what the first cross-attention gives, and its values."""

    order = 2

    def after(self, call, out):
        if call.name == FIRST and call.run.index == 0:
            self.out, self.v = out.asnumpy(), call.v.asnumpy()
        return out


def test_without_renormalising_the_words_share_of_the_output_is_scaled(pipe):
    plain, scaled = Outputs(), Outputs()
    with attached(pipe, plain):
        before, _, t = maps(pipe)
    with attached(pipe, scaled):
        after, _, _ = maps(pipe, lambda p: reweight_token(p, "grass", -2.0, renormalize=False))
    tokens = list(t.word_tokens()[4].tokens)
    share = before[0][..., tokens] @ plain.v[2][:, tokens]
    assert np.allclose(scaled.out[2] - plain.out[2], -3 * share, atol=1e-4)
    assert np.array_equal(scaled.out[[0, 1, 3]], plain.out[[0, 1, 3]])
    assert np.array_equal(before, after)


def test_a_word_is_scaled_in_the_fused_operator_too(pipe):
    expected, _, _ = maps(pipe, lambda p: reweight_token(p, "grass", 0.25))
    on_the_cpu, on_ascend = Outputs(), Outputs()
    with attached(pipe, on_the_cpu), reweight_token(pipe, "grass", 0.25):
        draw(pipe)
    with ascend(flash_in_float32=True), attached(pipe, on_ascend), reweight_token(pipe, "grass", 0.25):
        draw(pipe)
    assert relative_error(on_ascend.out, on_the_cpu.out) < 1e-4
    assert np.allclose(expected.sum(-1), 1, atol=1e-5)


def test_tokens_are_named_by_number_where_only_embeddings_are_known(net):
    with trace(net, announce=None) as before:
        net(*inputs())
    with reweight_token(net, 1, 0), trace(net, announce=None) as t:
        net(*inputs())
    assert t.word_map(1, layers=0).max() == 0 < before.word_map(1, layers=0).min()


# ---- compression


@pytest.mark.parametrize("operator", ["conv", "ave", "uniform", "mean"])
def test_a_replaced_compression_is_that_of_a_model_which_has_it(net, operator):
    plain = net(*inputs()).asnumpy()
    said = dict(sampling=operator, scale_factor=2, kv_compress_layer=[1])
    other = small_net(kv_compress_config=said)
    mine = dict(net.parameters_and_names())
    for name, weight in other.parameters_and_names():
        if name in mine:
            weight.set_data(mine[name])
        else:  # what training starts from
            start = 0.25 if name.endswith("sr.weight") else float(name.endswith("norm.weight"))
            weight.set_data(ms.Tensor(np.full(weight.shape, start, np.float32)))
    with replace_compression(net, 1, 2, operator), trace(net, announce=None) as t:
        changed = net(*inputs()).asnumpy()
    assert np.array_equal(changed, other(*inputs()).asnumpy())
    assert relative_error(changed, plain) > 1e-4
    assert t.key_grid("blocks.1.attn") == (2, 3)
    assert t.key_grid("blocks.0.attn") == (4, 6)
    assert_untouched(net, list(mine))


def test_ratio_one_takes_a_models_compression_away():
    net, plain = compressing("mean", kept=(1,)), compressing(None)
    with replace_compression(net, ratio=1):
        assert np.array_equal(net(*inputs()).asnumpy(), plain(*inputs()).asnumpy())


def test_a_layers_own_weights_are_used_where_they_fit():
    net = compressing("conv")
    plain = net(*inputs()).asnumpy()
    with replace_compression(net, ratio=2, operator="conv"):
        assert np.array_equal(net(*inputs()).asnumpy(), plain)
    with replace_compression(net, ratio=4, operator="conv"), trace(net, announce=None) as t:
        net(*inputs())
    assert t.key_grid("blocks.0.attn") == (1, 1)


def test_half_precision_models_are_compressed_in_half_precision(net):
    for weight in net.get_parameters():
        weight.set_dtype(ms.float16)
    with replace_compression(net, operator="conv"), trace(net, announce=None) as t:
        out = net(*inputs())
    assert np.isfinite(out.astype(ms.float32).asnumpy()).all()
    assert t.compression("blocks.0.attn") == ("conv", 2)


# ---- prompts


def test_a_prompt_that_is_swapped_at_the_first_step_is_the_prompt(pipe):
    other = ["blue cat", "a red mushroom on grass"]
    expected = draw(pipe, prompt=other)
    with swap_prompt(pipe, 0, other):
        assert relative_error(draw(pipe), expected) < 1e-5
    with swap_prompt(pipe, 0, "green key"):
        assert relative_error(draw(pipe), draw(pipe, prompt=["green key"] * 2)) < 1e-5
    embeds, mask, _, _ = pipe.encode_prompt(other, max_sequence_length=32)
    with swap_prompt(pipe, 0, prompt_embeds=embeds, prompt_attention_mask=mask):
        assert relative_error(draw(pipe), expected) < 1e-5


def test_up_to_the_step_the_first_prompt_holds_and_then_the_other(pipe):
    def latents(*changes):
        seen = []
        draw_with_callback = {"callback": lambda step, timestep, x: seen.append(x)}
        if changes:
            with changes[0](pipe):
                draw(pipe, **draw_with_callback)
        else:
            draw(pipe, **draw_with_callback)
        return seen

    plain, swapped = latents(), latents(lambda p: swap_prompt(p, 2, "green key"))
    assert np.array_equal(swapped[0], plain[0]) and np.array_equal(swapped[1], plain[1])
    assert relative_error(swapped[2], plain[2]) > 1e-5


def test_a_trace_knows_which_prompt_is_in_force(pipe):
    _, _, t = maps(pipe, lambda p: swap_prompt(p, 1, "a very long prompt with a green key in the snow"))
    assert [t.text(1, step).prompt for step in t.steps][:2] == [
        "blue cat",
        "a very long prompt with a green key in the snow",
    ]
    assert t.words(1) == ["blue", "cat", "</s>"]
    assert np.allclose(t.word_map("key"), t.word_map("key", steps=[1, 2]))
    with pytest.raises(ValueError, match="no word 'key'"):
        t.word_map("key", steps=[0, 1])
    with pytest.raises(ValueError, match="the prompt changes"):
        t.word_maps()
    assert np.allclose(t.word_maps(steps=[1, 2], row=1).sum(0), 1, atol=1e-5)
    assert t.changes == ["prompt 'a very long prompt with a green key in the snow' from step 1"]


# ---- together


def everything(pipe):
    return [
        lambda p: reweight_token(p, "key", 2.0),
        lambda p: ablate_heads(p, 2, 0),
        lambda p: swap_prompt(p, 1, "a green key"),
        lambda p: replace_compression(p, [0, 1], 2, "mean"),
        lambda p: reweight_token(p, "green", 0.5, renormalize=False),
        lambda p: reweight_token(p, "a", 0),
    ]


def test_interventions_compose_in_any_order_and_leave_the_model_as_it_was(pipe):
    names = [name for name, _ in pipe.transformer.parameters_and_names()]
    before = draw(pipe)
    changes = everything(pipe)
    there, out, t = maps(pipe, *changes, step=2)
    back, again, _ = maps(pipe, *changes[::-1], step=2)
    assert relative_error(out, again) < 1e-5
    assert np.allclose(there, back, atol=1e-5)
    assert (there[0][..., t.text(0, 2).words[0].tokens] == 0).all()
    assert len(t.changes) == len(changes)
    assert_untouched(pipe.transformer, names)
    assert np.array_equal(draw(pipe), before)


def test_after_an_error_the_model_is_as_it_was(pipe):
    names = [name for name, _ in pipe.transformer.parameters_and_names()]
    before = draw(pipe)

    def stop(step, timestep, latents):
        raise RuntimeError("stop")

    for change in everything(pipe)[1:4]:
        with pytest.raises(RuntimeError, match="stop"), change(pipe):
            draw(pipe, callback=stop)
        assert_untouched(pipe.transformer, names)
    assert np.array_equal(draw(pipe), before)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(
    "change",
    [
        lambda p: reweight_token(p, "red", 2.0),
        lambda p: ablate_heads(p, 2, 0),
        lambda p: swap_prompt(p, 1, "a green key"),
        lambda p: replace_compression(p, [0, 1], 2, "mean"),
        lambda p: trace(p, announce=None),
        lambda p: compression_loss(p, ratio=2, operator="mean"),
    ],
)
def test_no_hook_stays_after_an_interrupted_generator(pipe, change, interrupt):
    names = [name for name, _ in pipe.transformer.parameters_and_names()]
    steps = pipe.sample(**SAMPLE, generator=np.random.default_rng(0))

    def run():
        for index, _ in enumerate(pipe.sample(**SAMPLE, generator=np.random.default_rng(0))):
            if index == 2:
                raise interrupt

    with pytest.raises(interrupt), change(pipe):
        run()
    assert_untouched(pipe.transformer, names)
    assert len(list(steps)) == 4  # the conditioning and three steps


def test_an_interrupt_while_a_hook_is_attached_leaves_nothing(pipe, monkeypatch):
    names = [name for name, _ in pipe.transformer.parameters_and_names()]
    original = HookManager.attach

    def attach(self, hook, tokenizer):
        original(self, hook, tokenizer)
        raise KeyboardInterrupt

    monkeypatch.setattr(HookManager, "attach", attach)
    with pytest.raises(KeyboardInterrupt), ablate_heads(pipe, 0):
        pass
    assert_untouched(pipe.transformer, names)


def test_a_generator_that_outlives_its_block_continues_without_the_hook(pipe):
    steps = pipe.sample(**SAMPLE, generator=[np.random.default_rng(seed) for seed in range(2)])
    with ablate_heads(pipe):
        pass
    *_, last = steps
    assert np.array_equal(last.latents, draw(pipe))
    assert pipe.transformer.hook_manager is None


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: ablate_heads(p, 9), "it has blocks.0 to blocks.2"),
        (lambda p: ablate_heads(p, heads=5), "the model has heads 0 to 1"),
        (lambda p: ablate_heads(p, steps=[3]), r"no steps \[3\]; it has steps 0 to 2"),
        (lambda p: reweight_token(p, "moon", 2), "no word 'moon'; the prompt 'a red mushroom on grass' has 0: 'a'"),
        (lambda p: reweight_token(p, "mushrom", 2), "did you mean 'mushroom'?"),
        (lambda p: ablate_heads(p, "blocks.0.atn"), "did you mean 'blocks.0.attn'?"),
        (lambda p: reweight_token(p, "red", -1), "at least 0"),
        (lambda p: reweight_token(p, "red", float("nan"), renormalize=False), "expected a finite number"),
        (lambda p: replace_compression(p, operator="max"), "'max' is unknown; expected one of conv, ave"),
        (lambda p: replace_compression(p, ratio=0), "expected a whole number from 1"),
        (lambda p: replace_compression(p, ratio=5), "ratio 5 leaves no key of 4x6 tokens; it may be 1 to 4"),
        (
            lambda p: replace_compression(p, "blocks.0.cross_attn"),
            r"\['blocks.0.cross_attn'\].*each with attn; did you mean 'blocks.0.attn'",
        ),
        (lambda p: swap_prompt(p, 3, "a cat"), r"no steps \[3\]; it has steps 0 to 2"),
        (lambda p: swap_prompt(p, -1, "a cat"), "at_step is -1"),
        (lambda p: swap_prompt(p, 1, ["a", "b", "c"]), "3 prompts to swap in for 2 images"),
        (lambda p: swap_prompt(p, 1), "give either a prompt"),
        (lambda p: swap_prompt(p.transformer, 1, "a cat"), "no text encoder or no tokenizer"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_run(pipe, monkeypatch, change, message):
    monkeypatch.setattr(CPUDenoiser, "__call__", never)
    with pytest.raises(ValueError, match=message):  # noqa: SIM117
        with change(pipe):
            draw(pipe)
    assert pipe.transformer.hook_manager is None


def test_a_word_of_a_prompt_without_words_is_refused(pipe):
    with pytest.raises(ValueError, match="the prompt '' has no words, only 0: '</s>'"), reweight_token(pipe, "cat", 2):
        draw(pipe, prompt=["", ""])


assert CALL["height"] == 64  # the token grid of the messages above


# ---- samplers that call the model more than once in a step


@pytest.mark.parametrize("name", ["heun", "kdpm2", "kdpm2-a", "pndm", "dpm++"])
def test_steps_of_a_hook_are_those_of_the_sampler(pipe, name):
    pipe = PixArtSigmaPipeline.from_pipe(pipe)
    call = SAMPLE | {"num_inference_steps": 4, "prompt": "a red cat"}

    def run(*changes, **options):
        pipe.scheduler = name
        with ExitStack() as hooks:
            for change in changes:
                hooks.enter_context(change)
            return list(pipe.sample(**call | {"generator": np.random.default_rng(3)} | options))[1:]

    with trace(pipe, announce=None) as record:
        plain = run()
    assert list(record.steps) == [0, 1, 2, 3]
    np.testing.assert_allclose([record.timestep_of[k] for k in record.steps], [step.timestep for step in plain])
    late = run(ablate_heads(pipe, [0, 1], None, steps=[2]))
    same = [np.array_equal(a.latents, b.latents) for a, b in zip(plain, late, strict=True)]
    assert same == [True, True, False, False]
    other, swapped = run(prompt="a blue cat"), run(swap_prompt(pipe, 0, "a blue cat"))
    assert relative_error(swapped[-1].latents, other[-1].latents) < 1e-4
    assert relative_error(plain[-1].latents, other[-1].latents) > 1e-3
