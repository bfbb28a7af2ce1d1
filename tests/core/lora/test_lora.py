"""Adapters of a transformer: what they compute, alone and together, beside the weights and fused into them."""

import numpy as np
import pytest
from lora_models import (
    CASES,
    EVERYTHING,
    LYCORIS_CASES,
    TRANSFORMER,
    inputs,
    run,
    same_weights,
    trained,
    transformer,
    weights,
)
from mindspore import mint
from reference_data import FORWARD, REFERENCE, relative_error

from pixart_nb.core.backend import ms
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.lora import Adapters, LoraConfig
from pixart_nb.core.lora.files import LoraFile, LoraModule, read_lora
from pixart_nb.core.lora.layers import AdaptedLayer, DoraBranch, LoraBranch
from pixart_nb.core.models.layers import Linear

KINDS = {"lora": {}, "rslora": {"use_rslora": True, "lora_alpha": 2}, "dora": {"use_dora": True}}


@pytest.fixture
def net():
    return transformer()


# ---- what it computes


@pytest.mark.parametrize("case", [*CASES, *LYCORIS_CASES])
def test_an_adapter_of_peft_and_lycoris_computes_what_they_compute(net, case):
    with np.load(REFERENCE / "lora" / case / "io.npz") as io:
        plain, expected = io["plain"], io["adapted"]
    before, adapters = run(net), Adapters.of(net)
    assert relative_error(before, plain) < FORWARD < relative_error(plain, expected)
    adapters.load(case, read_lora(REFERENCE / "lora" / case))
    assert relative_error(run(net), expected) < FORWARD
    adapters.fuse()
    assert relative_error(run(net), expected) < FORWARD
    adapters.unfuse()
    adapters.clear()
    assert np.array_equal(run(net), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_no_bit(net, kind):
    before = run(net)
    adapter = Adapters.of(net).add("new", LoraConfig(target_modules=EVERYTHING, **KINDS[kind]))
    assert any(branch.down.asnumpy().any() for branch in adapter.branches.values())
    assert np.array_equal(run(net), before)


def test_queries_keys_and_values_are_blocks_of_the_fused_projection(net):
    before = weights(net)
    adapter = trained(net, target_modules=["to_q", "to_v"], lora_alpha=6, r=3)
    Adapters.of(net).fuse()
    size = net.config.hidden_size
    for block in range(net.config.depth):
        name = f"blocks.{block}.attn.qkv.weight"
        after = net.blocks[block].attn.qkv.weight.asnumpy()
        for place, part in enumerate("qkv"):
            rows = slice(place * size, (place + 1) * size)
            expected = before[name][rows].astype(np.float64)
            if part != "k":
                branch = adapter.branches[f"transformer_blocks.{block}.attn1.to_{part}"]
                expected = expected + 2.0 * branch.up.asnumpy().astype(np.float64) @ branch.down.asnumpy()
            assert np.array_equal(after[rows], expected.astype(np.float32))


def test_a_fused_target_is_one_adapter_that_is_saved_as_its_parts(net, tmp_path):
    adapter = trained(net, target_modules=["attn.qkv", "cross_attn.kv_linear"], use_dora=True)
    assert adapter.branches["blocks.0.attn.qkv"].down.shape == (4, net.config.hidden_size)
    expected = run(net)
    adapter.save(tmp_path, "peft")
    names = set(read_lora(tmp_path).modules)
    assert {f"transformer_blocks.0.attn1.to_{part}" for part in "qkv"} < names
    assert len(names) == 5 * net.config.depth
    adapters = Adapters.of(net)
    adapters.clear()
    adapters.load("again", read_lora(tmp_path))
    assert relative_error(run(net), expected) < 1e-6


def wide(values):
    return ms.Parameter(ms.Tensor(np.asarray(values, np.float64)))


@pytest.mark.parametrize("dora", [False, True])
def test_merged_and_unmerged_are_one_function_in_float64(dora):
    rng = np.random.default_rng(0)
    layer = Linear(10, 12)
    layer.weight, layer.bias = wide(rng.standard_normal((12, 10))), wide(rng.standard_normal(12))
    strength = wide([0.7])
    parts = []
    for start, stop in ((0, 8), (8, 12)):
        down, up = rng.standard_normal((3, 10)), rng.standard_normal((stop - start, 3))
        common = ("x", down, up, 1.5, strength)
        branch = DoraBranch(*common, magnitude=rng.random(stop - start) + 1) if dora else LoraBranch(*common)
        parts.append((start, stop, branch))
    x = rng.standard_normal((2, 5, 10))
    unmerged = AdaptedLayer(layer, [parts])(ms.Tensor(x)).asnumpy()
    weight = layer.weight.asnumpy()
    change = np.concatenate([branch.exact_update(weight[start:stop]) for start, stop, branch in parts])
    merged = x @ (weight + 0.7 * change).T + layer.bias.asnumpy()
    assert unmerged.dtype == np.float64
    np.testing.assert_allclose(unmerged, merged, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_weights_draw_the_same_and_are_given_back_bit_for_bit(net, kind):
    before, adapters = weights(net), Adapters.of(net)
    trained(net, target_modules=EVERYTHING, **KINDS[kind])
    assert same_weights(net, before)  # beside the weights, under no name of theirs
    unmerged = run(net)
    adapters.fuse()
    assert not same_weights(net, before)
    assert relative_error(run(net), unmerged) < 1e-5
    adapters.unfuse()
    assert same_weights(net, before)
    assert np.array_equal(run(net), unmerged)


def test_fusing_leaves_the_file_of_the_model_alone(net):
    path = TRANSFORMER / "diffusion_pytorch_model.safetensors"
    before = path.read_bytes()
    trained(net)
    Adapters.of(net).fuse()
    assert path.read_bytes() == before


def test_the_rows_of_a_fused_dora_have_its_magnitudes(net):
    adapter = trained(net, target_modules=["attn1.to_k", "ff.net.2", "pos_embed.proj"], use_dora=True)
    Adapters.of(net).fuse()
    size = net.config.hidden_size
    weight = net.blocks[1].attn.qkv.weight.asnumpy()[size : 2 * size]
    patches = net.x_embedder.proj.weight.asnumpy()
    for matrix, module in (
        (weight, "transformer_blocks.1.attn1.to_k"),
        (net.blocks[1].mlp.fc2.weight.asnumpy(), "transformer_blocks.1.ff.net.2"),
        (patches.reshape(len(patches), -1), "pos_embed.proj"),
    ):
        norms = np.linalg.norm(matrix.astype(np.float64), axis=1)
        np.testing.assert_allclose(norms, adapter.branches[module].magnitude.asnumpy(), rtol=1e-6)


# ---- several at once


@pytest.mark.parametrize("kinds", [("lora", "lora"), ("lora", "dora"), ("dora", "dora")])
def test_several_adapters_add_up_with_their_weights(net, kinds):
    adapters, before = Adapters.of(net), weights(net)
    first = trained(net, "first", target_modules=["to_q", "to_k"], **KINDS[kinds[0]])
    second = trained(net, "second", seed=1, target_modules=["attn.qkv", "ff.net.2"], **KINDS[kinds[1]])
    assert adapters.active == ["second"]
    adapters.activate(["first", "second"], [0.5, -2.0])
    together = run(net)
    adapters.fuse(scale=1.0)
    weight = before["blocks.0.attn.qkv.weight"].astype(np.float64)
    expected = weight + 0.5 * first.change("blocks.0.attn.qkv", weight)
    expected -= 2.0 * second.change("blocks.0.attn.qkv", weight)
    np.testing.assert_allclose(net.blocks[0].attn.qkv.weight.asnumpy(), expected, atol=1e-6)
    assert relative_error(run(net), together) < 1e-5
    adapters.unfuse()
    assert np.array_equal(run(net), together)


def test_a_weight_scales_the_whole_change_and_zero_is_off(net):
    adapters, before = Adapters.of(net), run(net)
    trained(net, "style", use_dora=True)
    adapters.activate(["style"], 0.0)
    assert np.array_equal(run(net), before)
    adapters.activate(["style"])
    assert not np.array_equal(run(net), before)
    adapters.fuse(scale=0.0)
    assert np.array_equal(run(net), before)


def test_switched_off_deleted_and_cleared_adapters_leave_the_model_as_it_was(net):
    before, layer, adapters = run(net), net.blocks[0].attn.qkv, Adapters.of(net)
    trained(net, "one")
    changed = run(net)
    trained(net, "two", seed=5)
    adapters.enable(False)
    assert adapters.active == [] and np.array_equal(run(net), before)
    adapters.enable(True)
    assert adapters.active == ["two"]
    adapters.delete(["two"])
    assert np.array_equal(run(net), before)
    adapters.activate(["one"])
    assert np.array_equal(run(net), changed)
    adapters.clear()
    assert net.blocks[0].attn.qkv is layer
    assert adapters.adapters == {} and np.array_equal(run(net), before)


def test_fused_weights_stay_when_the_adapters_are_forgotten(net):
    adapters = Adapters.of(net)
    trained(net)
    adapters.fuse()
    fused = run(net)
    adapters.clear()
    assert np.array_equal(run(net), fused)
    trained(net, seed=3)
    assert not np.array_equal(run(net), fused)


@pytest.mark.slow
def test_a_compiled_graph_sees_new_weights_of_adapters_and_fused_ones(net):
    io, adapters = inputs(), Adapters.of(net)
    trained(net, "style", target_modules=EVERYTHING)
    arguments = [ms.Tensor(io[name]) for name in ("latents", "timestep", "caption", "mask")]
    positions = net.positions(16, 16)

    def step(*tensors):
        return net.forward(*tensors, positions)

    compiled = ms.jit(step, jit_level="O0")
    full = compiled(*arguments).asnumpy()
    assert relative_error(full, run(net)) < 1e-6
    adapters.activate(["style"], 0.25)
    quarter = compiled(*arguments).asnumpy()
    assert relative_error(quarter, run(net)) < 1e-6 < relative_error(quarter, full)
    adapters.fuse()
    assert relative_error(compiled(*arguments).asnumpy(), quarter) < 1e-5
    adapters.unfuse()
    assert np.array_equal(compiled(*arguments).asnumpy(), quarter)


def test_adapters_of_half_precision_weights_are_computed_in_float32():
    layer = Linear(8, 8)
    rng = np.random.default_rng(0)
    layer.weight = ms.Parameter(ms.Tensor(rng.standard_normal((8, 8)).astype(np.float16)))
    layer.bias = ms.Parameter(ms.Tensor(np.zeros(8, np.float16)))
    down, up = (rng.standard_normal((8, 8)).astype(np.float32) for _ in range(2))
    branch = LoraBranch("x", down, up, 1.0, ms.Parameter(ms.Tensor(np.ones(1, np.float32))))
    x = ms.Tensor(rng.standard_normal((3, 8)).astype(np.float16))
    out = AdaptedLayer(layer, [[(0, 8, branch)]])(x)
    assert out.dtype == ms.float16
    expected = x.asnumpy().astype(np.float64) @ (layer.weight.asnumpy().astype(np.float64) + up @ down).T
    np.testing.assert_allclose(out.asnumpy(), expected, rtol=2e-3, atol=2e-2)


# ---- sizes, ranks, names


def test_ranks_and_alphas_of_patterns(net):
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=("to_q", "ff.net.2"),
        rank_pattern={"attn2.to_q": 5, "transformer_blocks.0.attn1.to_q": 1},
        alpha_pattern={"ff.net.2": 8},
    )
    branches = Adapters.of(net).add("x", config).branches
    found = {name: (branch.down.shape[0], branch.scale) for name, branch in branches.items()}
    assert found["transformer_blocks.0.attn1.to_q"] == (1, 3.0)
    assert found["transformer_blocks.1.attn1.to_q"] == (2, 1.5)
    assert found["transformer_blocks.1.attn2.to_q"] == (5, 0.6)
    assert found["transformer_blocks.2.ff.net.2"] == (2, 4.0)


def test_the_size_counts_what_is_trained(net):
    size, depth = net.config.hidden_size, net.config.depth
    adapters = Adapters.of(net)
    assert adapters.add("apart", LoraConfig(r=3, target_modules="to_q")).size == depth * 2 * 3 * 2 * size
    assert adapters.add("fused", LoraConfig(r=3, target_modules="attn.qkv")).size == depth * 3 * 4 * size
    dora = adapters.add("dora", LoraConfig(r=3, target_modules="attn.qkv", use_dora=True))
    assert dora.size == depth * (3 * 4 * size + 3 * size)


def test_the_same_seed_starts_the_same_adapter_and_another_one_another(net):
    adapters = Adapters.of(net)
    starts = [
        adapters.add(str(k), LoraConfig(init_lora_weights=start), seed).parameters()
        for k, (seed, start) in enumerate([(1, "kaiming"), (1, "kaiming"), (2, "kaiming"), (1, "gaussian")])
    ]
    first, same, other, gaussian = ([p.asnumpy() for p in start.values()] for start in starts)
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert np.abs(first[0]).max() <= net.config.hidden_size**-0.5 < np.abs(gaussian[0]).max()


def test_the_official_meaning_of_proj_is_diffusers(net):
    names = set(Adapters.of(net).add("x", LoraConfig(target_modules="proj")).branches)
    assert names == {"pos_embed.proj", *(f"transformer_blocks.{k}.ff.net.0.proj" for k in range(3))}
    own = set(Adapters.of(net).add("y", LoraConfig(target_modules=["attn.proj", "mlp.fc1"])).branches)
    expected = ("attn1.to_out.0", "ff.net.0.proj")
    assert own == {f"transformer_blocks.{k}.{end}" for k in range(3) for end in expected}


# ---- bad input


def test_a_target_that_is_no_layer_is_told_the_known_ones(net):
    for target, hint in (("to_queue", "attn"), ("proj_in", "proj_out"), ("attn.qvk", "attn.qkv")):
        with pytest.raises(ValueError, match=rf"ends with '{target}'.*the ends are: .*attn1\.to_q.*{hint}"):
            Adapters.of(net).add("x", LoraConfig(target_modules=["to_q", target]))
    assert Adapters.of(net).adapters == {}


def test_targets_that_overlap_are_refused(net):
    with pytest.raises(ValueError, match=r"to_k.*attn\.qkv|attn\.qkv.*to_k"):
        Adapters.of(net).add("x", LoraConfig(target_modules=["attn1.to_k", "attn.qkv"]))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"r": 0}, "rank is 0"),
        ({"r": 2.0}, "rank is 2.0"),
        ({"r": True}, "rank is True"),
        ({"rank_pattern": {"to_q": -1}}, "rank is -1"),
        ({"lora_alpha": 0}, "alpha is 0"),
        ({"lora_alpha": float("nan")}, "alpha is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [3]}, "target_modules"),
        ({"init_lora_weights": "orthogonal"}, "kaiming"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(values, complaint):
    with pytest.raises(ValueError, match=complaint):
        LoraConfig(**values)


def module(rows, size, rank=2):
    return LoraModule(np.ones((rank, size), np.float32), np.ones((rows, rank), np.float32), 1.0)


def test_a_lora_for_another_model_is_refused_with_what_differs(net):
    before, adapters = run(net), Adapters.of(net)
    trained(net, "kept")
    kept = run(net)
    file = LoraFile(
        {
            "transformer_blocks.0.attn1.to_q": module(24, 24),
            "transformer_blocks.0.attn1.to_v": module(1152, 1152),
            "transformer_blocks.27.attn1.to_q": module(24, 24),
            "single_transformer_blocks.0.attn.to_q": module(24, 24),
        },
        "flux.safetensors",
    )
    with pytest.raises(CheckpointError) as error:
        adapters.load("other", file)
    text = str(error.value)
    assert "flux.safetensors is a LoRA for another model: of its 4 modules 1 are of another shape" in text
    assert "transformer_blocks.0.attn1.to_v: LoRA (1152, 1152), model (24, 24)" in text
    assert "2 are not in the model (transformer_blocks.27.attn1.to_q, single_transformer_blocks" in text
    assert "3 blocks of width 24" in text
    assert list(adapters.adapters) == ["kept"] and np.array_equal(run(net), kept)
    adapters.clear()
    assert np.array_equal(run(net), before)


def test_names_that_are_taken_unknown_or_no_names_are_refused(net):
    adapters = Adapters.of(net)
    trained(net, "style")
    with pytest.raises(ValueError, match="'style' already"):
        adapters.add("style", LoraConfig())
    with pytest.raises(ValueError, match="expected a text"):
        adapters.add("", LoraConfig())
    with pytest.raises(ValueError, match=r"'stile'; there are \['style'\]"):
        adapters.activate(["stile"])
    with pytest.raises(ValueError, match="named twice"):
        adapters.activate(["style", "style"])
    for wrong in ([1.0, 2.0], [float("inf")], "much"):
        with pytest.raises(ValueError, match=r"weight"):
            adapters.activate(["style"], wrong)
    assert adapters.active == ["style"]


def test_what_cannot_be_done_to_fused_adapters_is_refused_with_the_way_out(net):
    adapters = Adapters.of(net)
    for wrong, complaint in ((adapters.fuse, "no adapter is active"), (adapters.unfuse, "nothing to take out")):
        with pytest.raises(ValueError, match=complaint):
            wrong()
    trained(net, "style")
    trained(net, "other", seed=2)
    with pytest.raises(ValueError, match="'style' is not active"):
        adapters.fuse(names=["style"])
    adapters.fuse()
    for forbidden in (
        adapters.fuse,
        lambda: adapters.activate(["style"]),
        lambda: adapters.delete(["style"]),
        lambda: adapters.enable(False),
        lambda: adapters.add("third", LoraConfig()),
    ):
        with pytest.raises(ValueError, match="unfuse_lora"):
            forbidden()


def test_gradients_of_dora_take_the_norm_as_a_constant():
    rng = np.random.default_rng(4)
    weight, x, seen = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 5), (7, 5), (7, 6)))
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 5), (6, 2)))
    magnitude = (rng.random(6) + 1).astype(np.float32)
    branch = DoraBranch("x", down, up, 0.5, ms.Parameter(ms.Tensor(np.ones(1, np.float32))), None, magnitude)

    def loss(x, weight, seen):
        return mint.sum(branch(x, weight) * seen)

    parts = list(branch.parameters().values())
    gradients = ms.grad(loss, None, parts)(ms.Tensor(x), ms.Tensor(weight), ms.Tensor(seen))
    turned = weight + 0.5 * up @ down
    norms = np.linalg.norm(turned, axis=1)
    outer = seen.T @ x  # the gradient of the weight
    towards = 0.5 * (magnitude / norms)[:, None] * outer
    expected = (up.T @ towards, towards @ down.T, (outer * turned).sum(1) / norms)
    for found, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found.asnumpy(), wanted, rtol=1e-4, atol=1e-5)
