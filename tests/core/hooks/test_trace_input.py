"""What a run or a trace does not have is refused, with what it has."""

from __future__ import annotations

import numpy as np
import pytest
from traced_models import NAMES, compressing, draw, inputs

from pixart_nb.core import trace


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 7}, r"no layers \['blocks.7.attn', 'blocks.7.cross_attn'\]; it has blocks.0 to blocks.2"),
        ({"layers": "blocks.0.mlp"}, r"blocks.0.mlp.*each with attn and cross_attn"),
        ({"layers": ()}, "none was given"),
        ({"heads": [0, 9]}, r"heads is \[0, 9\]; the model has heads 0 to \d"),
        ({"attention": ("self", "both")}, r"expected 'self', 'cross' or both"),
        ({"steps": 8}, r"no steps \[8\]; it has steps 0 to 2"),
        ({"steps": -1}, "counted from 0"),
        ({"timesteps": [998.0]}, r"does not visit timesteps \[998.0\]; it visits \[999.0, "),
        ({"steps": 0, "timesteps": [999.0]}, "give one of them"),
        ({"rows": "both"}, "conditional, unconditional, all"),
    ],
)
def test_what_a_run_does_not_have_is_refused_with_what_it_has(pipe, options, message):
    with pytest.raises(ValueError, match=message), trace(pipe, announce=None, **options):
        draw(pipe)
    assert pipe.transformer.hook_manager is None


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda t: t.rows("blocks.5.attn", 0, 0), r"no layer 'blocks.5.attn'; it has blocks.0.attn, "),
        (lambda t: t.rows(NAMES[0], 3, 0), r"no step 3; it has \[0, 1, 2\]"),
        (lambda t: t.rows(NAMES[0], 0, 0, heads=99), r"no head \[99\]; it has \[0, 1"),
        (lambda t: t.rows(NAMES[0], 0, 24), r"numbers 0 to 23 of \(4, 6\) patches"),
        (lambda t: t.rows(NAMES[0], 0, np.zeros((4, 6), bool)), "at least one True"),
        (lambda t: t.rows(NAMES[0], 0, 0, row=2), "no image 2; it has 0: conditional 0, 1: conditional 1"),
        (lambda t: t.word_map("moon"), r"no word 'moon'; the prompt 'a red mushroom on grass' has 0: 'a', 1: 'red'"),
        (lambda t: t.word_map("grass red"), "no word 'grass red'"),
        (lambda t: t.word_map("gras"), "did you mean 'grass'?"),
        (lambda t: t.rows("blocks.0.atn", 0, 0), "did you mean 'blocks.0.attn'?"),
        (lambda t: t.word_map(6), "no word number 6"),
        (lambda t: t.word_map("red", layers=4), r"no layer 4; it has blocks.0.cross_attn, "),
        (lambda t: t.word_map("red", steps=[]), "no step"),
        (lambda t: setattr(t, "images", [np.zeros((4, 4, 3), np.uint8)]), "expected 2 images"),
    ],
)
def test_what_a_trace_does_not_have_is_refused_with_what_it_has(traced, ask, message):
    with pytest.raises(ValueError, match=message):
        ask(traced)


def test_a_prompt_without_words_says_so(pipe):
    with trace(pipe, announce=None) as t:
        draw(pipe, prompt=["", "   "])
    assert t.words() == ["</s>"]
    with pytest.raises(ValueError, match=r"no word 'cat'; the prompt '' has no words, only 0: '</s>'"):
        t.word_map("cat")


def test_a_second_run_needs_a_trace_of_its_own(pipe):
    with trace(pipe, announce=None) as t:
        draw(pipe)
        with pytest.raises(ValueError, match="already holds a run"):
            draw(pipe)
    assert t.steps == [0, 1, 2]


def test_a_block_in_which_nothing_ran_says_so(pipe):
    with pytest.warns(UserWarning, match="nothing was traced"), trace(pipe, announce=None):
        pass


def test_steps_that_never_came_are_named():
    net = compressing(None)
    with pytest.raises(ValueError, match=r"never reached \[4\]"), trace(net, steps=[0, 4], announce=None):
        net(*inputs())


def test_what_is_no_model_is_refused():
    with pytest.raises(ValueError, match="got dict"), trace({}):
        pass


def test_numbers_that_are_not_finite_are_named():
    net = compressing(None)
    weight = net.blocks[1].attn.qkv.weight
    weight.set_data(weight * np.inf)
    with pytest.raises(ValueError, match=r"blocks.1.attn at step 0: row 0, head 0: .*not finite"):  # noqa: SIM117
        with trace(net, announce=None):
            net(*inputs())
    with trace(net, layers=0, announce=None) as t:
        net(*inputs())
    assert t.steps == [0]
