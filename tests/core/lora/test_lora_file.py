"""LoRA files of every layout: read to the same modules, written whole, and refused with a reason."""

import json
import math
import re
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_models import CASES, run, trained, transformer
from reference_data import REFERENCE, relative_error
from safetensors.numpy import save_file

from pixart_nb.core.backend import ms
from pixart_nb.core.io import CheckpointError, load_metadata, load_tensors
from pixart_nb.core.lora import Adapters
from pixart_nb.core.lora.config import pattern_value
from pixart_nb.core.lora.files import LoraModule, read_lora, write_lora

TO_Q = "transformer_blocks.0.attn1.to_q"
DOWN = np.arange(6, dtype=np.float32).reshape(2, 3)
UP = np.arange(8, dtype=np.float32).reshape(4, 2)
#: One module of rank 2 and scale 1.5 in every layout that is read.
LAYOUTS = {
    "diffusers": {
        f"transformer.{TO_Q}.lora_A.weight": DOWN,
        f"transformer.{TO_Q}.lora_B.weight": UP,
        f"transformer.{TO_Q}.alpha": np.array(3.0, np.float32),
    },
    "diffusers of old": {
        f"transformer.{TO_Q}.lora.down.weight": DOWN,
        f"transformer.{TO_Q}.lora.up.weight": UP,
        f"transformer.{TO_Q}.alpha": np.array([3.0], np.float32),
    },
    "peft in memory": {
        f"base_model.model.{TO_Q}.lora_A.default.weight": DOWN,
        f"base_model.model.{TO_Q}.lora_B.default.weight": UP,
        f"{TO_Q}.alpha": np.array(3, np.int64),
    },
    "kohya": {
        "lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight": DOWN,
        "lora_unet_transformer_blocks_0_attn1_to_q.lora_up.weight": UP,
        "lora_unet_transformer_blocks_0_attn1_to_q.alpha": np.array(3.0, np.float16),
    },
    "attention processors": {
        f"unet.{TO_Q.replace('to_q', 'processor.to_q_lora')}.down.weight": DOWN,
        f"unet.{TO_Q.replace('to_q', 'processor.to_q_lora')}.up.weight": UP,
        f"{TO_Q}.alpha": np.array(3, np.int64),
    },
    "compiled": {
        f"module._orig_mod.{TO_Q}.lora_A.weight": DOWN,
        f"module._orig_mod.{TO_Q}.lora_B.weight": UP,
        f"model.diffusion_model.{TO_Q}.alpha": np.array(3, np.int64),
    },
    "onetrainer": {
        "lora_transformer_transformer_blocks_0_attn1_to_q.lora_down.weight": DOWN,
        "lora_transformer_transformer_blocks_0_attn1_to_q.lora_up.weight": UP,
        "lora_transformer_transformer_blocks_0_attn1_to_q.alpha": np.array(3.0, np.float32),
    },
}


def same_modules(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, module in ours.items():
        other = theirs[name]
        assert np.array_equal(module.down, other.down) and np.array_equal(module.up, other.up), name
        assert module.scale == pytest.approx(other.scale, rel=1e-7), name
        assert (module.magnitude is None) == (other.magnitude is None), name
        assert module.magnitude is None or np.array_equal(module.magnitude, other.magnitude), name
    return True


# ---- reading


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_module(layout, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(LAYOUTS[layout], path)
    for source in (path, tmp_path, LAYOUTS[layout], {k: ms.Tensor(v) for k, v in LAYOUTS[layout].items()}):
        (module,) = read_lora(source).modules.values()
        assert np.array_equal(module.down, DOWN) and np.array_equal(module.up, UP)
        assert module.scale == 1.5 and module.magnitude is None
        assert module.down.dtype == np.float32


@pytest.mark.parametrize("form", ["transformer_blocks_{}_attn1_to_q", "transformer_blocks.{}.attn1.to_q"])
def test_names_with_underscores_find_their_layers(form):
    net = transformer()
    size = net.config.hidden_size
    tensors = {}
    for block in range(3):
        name = f"lora_unet_{form.format(block)}"
        tensors[f"{name}.lora_down.weight"] = np.ones((2, size), np.float32)
        tensors[f"{name}.lora_up.weight"] = np.ones((size, 2), np.float32)
        tensors[f"{name}.alpha"] = np.array(2.0, np.float32)
    own = {
        key.replace("transformer_blocks_", "blocks_").replace("attn1_to_q", "cross_attn_proj"): value
        for key, value in tensors.items()
    }
    file = read_lora(tensors)
    assert set(Adapters.of(net).load("a", file).branches) == {f"transformer_blocks.{k}.attn1.to_q" for k in range(3)}
    if "_attn1" in form:
        assert set(Adapters.of(net).load("b", read_lora(own)).branches) == {
            f"transformer_blocks.{k}.attn2.to_out.0" for k in range(3)
        }


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("key", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale"])
def test_magnitudes_of_dora_in_every_form(key, shape):
    magnitude = np.arange(1, 5, dtype=np.float32)
    tensors = LAYOUTS["diffusers"] | {f"transformer.{TO_Q}.{key}": magnitude.reshape(shape)}
    assert np.array_equal(read_lora(tensors).modules[TO_Q].magnitude, magnitude)


def test_the_alpha_beside_the_weights_goes_before_the_configuration(tmp_path):
    tensors = {k: v for k, v in LAYOUTS["diffusers"].items() if "alpha" not in k}
    described = {"transformer.lora_alpha": 8, "transformer.r": 2, "transformer.alpha_pattern": {"attn9": 1}}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(described)})
    assert read_lora(tmp_path).modules[TO_Q].scale == 4.0
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(described | {"transformer.use_rslora": True})})
    assert read_lora(tmp_path).modules[TO_Q].scale == pytest.approx(8 / math.sqrt(2))
    save_file(LAYOUTS["diffusers"], path, {"lora_adapter_metadata": json.dumps(described)})
    assert read_lora(tmp_path).modules[TO_Q].scale == 1.5


def test_an_alpha_that_nobody_says_is_the_rank_with_a_warning():
    tensors = {k: v for k, v in LAYOUTS["diffusers"].items() if "alpha" not in k}
    with pytest.warns(UserWarning, match=rf"holds no alpha for 1 modules \({TO_Q}\)"):
        assert read_lora(tensors).modules[TO_Q].scale == 1.0


def test_the_file_of_a_folder_is_found_or_asked_for(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file(LAYOUTS["diffusers"], tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several files.*a\.safetensors.*weight_name"):
        read_lora(tmp_path)
    assert read_lora(tmp_path, "b.safetensors").source.endswith("b.safetensors")
    save_file(LAYOUTS["kohya"], tmp_path / "pytorch_lora_weights.safetensors")
    assert "transformer_blocks_0_attn1_to_q" in read_lora(tmp_path).modules


# ---- LoKr and LoHa

RNG = np.random.default_rng(7)


def factors(**shapes):
    return {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def kronecker(w1, w2):
    """Return W1 (a, c) x W2 (b, d, ...) as (a b, c d ...), from the definition of the product."""
    product = np.einsum("ac,bdk->abcdk", w1, w2.reshape(*w2.shape[:2], -1))
    return product.reshape(w1.shape[0] * w2.shape[0], -1)


LYCORIS = {
    "lokr, whole": (
        TO_Q,
        factors(lokr_w1=(4, 3), lokr_w2=(6, 8)),
        lambda lokr_w1, lokr_w2: kronecker(lokr_w1, lokr_w2),
    ),
    "lokr, both in factors": (
        TO_Q,
        factors(lokr_w1_a=(3, 2), lokr_w1_b=(2, 3), lokr_w2_a=(8, 2), lokr_w2_b=(2, 8)),
        lambda lokr_w1_a, lokr_w1_b, lokr_w2_a, lokr_w2_b: (
            3.5 * kronecker(lokr_w1_a @ lokr_w1_b, lokr_w2_a @ lokr_w2_b)
        ),
    ),
    "lokr of a convolution": (
        "pos_embed.proj",
        factors(lokr_w1=(4, 2), lokr_w2_a=(6, 5), lokr_w2_b=(5, 2, 2, 2)),
        lambda lokr_w1, lokr_w2_a, lokr_w2_b: (
            1.4 * kronecker(lokr_w1, np.einsum("br,rdij->bdij", lokr_w2_a, lokr_w2_b))
        ),
    ),
    "loha": (
        "transformer_blocks.1.attn2.to_k",
        factors(hada_w1_a=(24, 4), hada_w1_b=(4, 24), hada_w2_a=(24, 4), hada_w2_b=(4, 24)),
        lambda hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b: (
            1.75 * np.einsum("or,ri,os,si->oi", hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b)
        ),
    ),
}


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "transformer."])
@pytest.mark.parametrize("case", LYCORIS)
def test_lokr_and_loha_change_the_weights_by_their_definition(case, prefix, tmp_path):
    name, parts, expected = LYCORIS[case]
    stem = prefix + (name if prefix.endswith(".") else name.replace(".", "_"))
    tensors = {f"{stem}.{part}": value for part, value in parts.items()} | {f"{stem}.alpha": np.array(7, np.float32)}
    save_file(tensors, tmp_path / "a.safetensors")
    net = transformer()
    adapters, before = Adapters.of(net), run(net)
    layer = adapters.layers.targets[name]
    weight = adapters.layers.cells[layer.layer].weight
    original = weight.asnumpy().copy()
    adapter = adapters.load("style", read_lora(tmp_path / "a.safetensors"))
    adapters.activate(["style"], 0.5)
    beside = run(net)
    assert relative_error(beside, before) > 1e-3
    adapters.fuse()
    change = (weight.asnumpy().astype(np.float64) - original)[layer.start : layer.stop]
    wanted = 0.5 * expected(**{part: value.astype(np.float64) for part, value in parts.items()})
    np.testing.assert_allclose(change, wanted.reshape(change.shape), atol=1e-5)
    assert relative_error(run(net), beside) < 1e-5
    adapters.unfuse()
    assert np.array_equal(weight.asnumpy(), original) and np.array_equal(run(net), beside)
    with pytest.raises(ValueError, match="no factors to save"):
        adapter.save(tmp_path)


def test_lokr_and_loha_of_peft_have_the_scale_of_their_configuration(tmp_path):
    _, parts, expected = LYCORIS["lokr, whole"]
    tensors = {f"base_model.model.{TO_Q}.{part}": value for part, value in parts.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LOKR", "r": 8, "alpha": 6, "rank_pattern": {"to_q": 4}, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    module = read_lora(tmp_path).modules[TO_Q]
    np.testing.assert_allclose(module.scale * module.delta, 1.5 * expected(**parts), rtol=1e-5)


@pytest.mark.parametrize(
    "shapes",
    [
        {"lokr_w1": (2, 2)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (2, 2)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": (3, 2)},
        {"lokr_w1": (2, 2), "lokr_w1_a": (2, 2), "lokr_w1_b": (2, 2), "lokr_w2": (2, 2)},
        {"lokr_w1": (10**4, 1), "lokr_w2": (1, 10**5)},
        {"lokr_w1": (2, 2), "lokr_w2": (2, 2), "dora_scale": (4, 1)},
        {"lokr_w1": (2, 2), "hada_w2_a": (2, 2), "hada_w2_b": (2, 2)},
        {"lokr_w1": (2,), "lokr_w2": (2, 2)},
        {"lokr_w1": (0, 2), "lokr_w2": (2, 2)},
        {"hada_w1_a": (2, 1), "hada_w1_b": (1, 2), "hada_w2_a": (3, 1), "hada_w2_b": (1, 2)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 2), "lora_down.weight": (2, 2)},
    ],
)
def test_factors_of_lokr_and_loha_that_do_not_fit_are_refused(shapes):
    tensors = {f"lycoris_x.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(CheckpointError, match=r"x has .*expected the factors"):
        read_lora(tensors)


def test_tucker_decompositions_are_refused_by_name():
    for part, shape in (("lora_mid.weight", (2, 2, 2, 2)), ("lokr_t2", (2, 2, 2, 2)), ("hada_t1", (2, 2, 2, 2))):
        with pytest.raises(CheckpointError, match=rf"x\.{part}.*without the Tucker decompositions"):
            read_lora(LAYOUTS["kohya"] | {f"lora_unet_x.{part}": np.ones(shape, np.float32)})


# ---- parts of other networks, patterns, initial values


@pytest.mark.parametrize(
    "other",
    [
        "lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        "text_encoder_2.x.lora_A.weight",
        "bundle_emb.word.string_to_param.*",
    ],
)
def test_parts_of_text_encoders_and_bundled_embeddings_are_left_out_and_named(other):
    tensors = LAYOUTS["onetrainer"] | {other: DOWN}
    with pytest.warns(UserWarning, match=r"the 1 tensors of text encoders or embeddings .* were left out"):
        file = read_lora(tensors)
    same_modules(file.modules, read_lora(LAYOUTS["onetrainer"]).modules)
    with pytest.raises(CheckpointError, match="it holds no part of a transformer"):
        read_lora({other: DOWN})


def read_with(config, tmp_path, tensors=None):
    tensors = tensors or {k: v for k, v in LAYOUTS["diffusers"].items() if "alpha" not in k}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return read_lora(tmp_path)


@pytest.mark.parametrize("initial", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", ["pissa"], 3])
def test_initial_values_that_change_the_model_are_refused(initial, tmp_path):
    with pytest.raises(CheckpointError, match="path_initial_model_for_weight_conversion"):
        read_with({"lora_alpha": 4, "init_lora_weights": initial}, tmp_path)


@pytest.mark.parametrize("initial", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_initial_values_that_leave_the_model_alone_are_read(initial, tmp_path):
    assert read_with({"lora_alpha": 4, "init_lora_weights": initial}, tmp_path).modules[TO_Q].scale == 2.0


@pytest.mark.parametrize("setting", [{"fan_in_fan_out": True}, {"lora_bias": True}, {"use_qalora": True}])
def test_settings_that_are_not_implemented_are_refused(setting, tmp_path):
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        read_with({"lora_alpha": 4} | setting, tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [
        "attn1.to_q",
        r"transformer_blocks\.0\.attn1\.to_q",
        "^transformer_blocks.0.attn1.to_q$",
        r"transformer_blocks.\d+.attn1.to_q",
        ".*to_q",
        "(to_k|to_q)",
        r"transformer_blocks\.[0-9]+\..+",
    ],
)
def test_an_alpha_pattern_matches_names_and_simple_expressions(pattern, tmp_path):
    assert read_with({"lora_alpha": 4, "alpha_pattern": {pattern: 6}}, tmp_path).modules[TO_Q].scale == 3.0
    assert read_with({"lora_alpha": 4, "alpha_pattern": {"o_q": 6, "attn1": 6}}, tmp_path).modules[TO_Q].scale == 2.0


def test_an_alpha_pattern_cannot_hang_the_reader(tmp_path):
    name = "transformer_blocks." + "a" * 400
    tensors = {f"transformer.{name}.lora_A.weight": DOWN, f"transformer.{name}.lora_B.weight": UP}
    started = time.process_time()
    with pytest.raises(CheckpointError, match="is not understood as a pattern"):
        read_with({"lora_alpha": 4, "alpha_pattern": {"(a+)+b": 1, "(.*)*x": 2}}, tmp_path, tensors)
    pattern = ".*a" * 60 + "b"
    assert read_with({"lora_alpha": 4, "alpha_pattern": {pattern: 1}}, tmp_path, tensors).modules[name].scale == 2.0
    assert time.process_time() - started < 2


@given(
    st.lists(st.sampled_from(["a", "b", "0", r"\.", ".*", ".+", r"\d+", "ab"]), min_size=1, max_size=6).map("".join),
    st.text("ab0.", max_size=7),
)
def test_patterns_mean_what_they_mean_to_peft(pattern, name):
    expected = re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    assert pattern_value({pattern: True}, name, False) == expected


# ---- writing


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
@pytest.mark.parametrize("case", CASES)
def test_what_peft_saved_is_the_same_when_it_is_saved_again(case, layout, tmp_path):
    source = REFERENCE / "lora" / case
    file, net = read_lora(source), transformer()
    Adapters.of(net).load(case, file).save(tmp_path, layout)
    same_modules(read_lora(tmp_path).modules, file.modules)
    if layout == "peft":
        ours, theirs = (load_tensors(p / "adapter_model.safetensors") for p in (tmp_path, source))
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        wanted = json.loads((source / "adapter_config.json").read_text())
        assert set(config) <= set(wanted)
        assert config["use_dora"] == wanted["use_dora"]


def test_a_rank_stabilised_adapter_keeps_its_alpha(tmp_path):
    net = transformer()
    adapter = trained(net, r=3, lora_alpha=7, use_rslora=True, lora_dropout=0.25, rank_pattern={"attn2.to_q": 5})
    expected = run(net)
    adapter.save(tmp_path, "peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["lora_dropout"]) == (3, 7, True, 0.25)
    assert config["alpha_pattern"] == {} and set(config["rank_pattern"].values()) == {5}
    for layout in ("peft", "diffusers"):
        again = transformer()
        Adapters.of(again).load("x", read_lora(adapter.save(tmp_path / layout, layout)))
        assert relative_error(run(again), expected) < 1e-6


names = st.sampled_from([f"transformer_blocks.{k}.{end}" for k in range(3) for end in ("attn1.to_q", "ff.net.2")])
numbers = st.floats(-1e3, 1e3, width=32)


@st.composite
def lora_modules(draw):
    rank, rows, size = (draw(st.integers(1, 4)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    down, up = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, size), (rows, rank)))
    magnitude = rng.random(rows).astype(np.float32) if draw(st.booleans()) else None
    alpha = draw(st.sampled_from([1, 4, 0.3, 7.25, 16]) | st.floats(0.01, 100))
    return LoraModule(down, up, alpha / rank, magnitude)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, lora_modules(), min_size=1), st.sampled_from(["peft", "diffusers"]))
def test_what_is_written_is_read_again(tmp_path, modules, layout):
    path = write_lora(tmp_path, modules, layout)
    assert path.is_file() and load_metadata(path)["format"] == "pt"
    same_modules(read_lora(path).modules, modules)
    assert not [part for part in tmp_path.iterdir() if part.name.startswith(".")]


def test_a_program_that_reads_only_the_metadata_finds_every_alpha(tmp_path):
    net = transformer()
    ranks, alphas = {"attn2.to_q": 5}, {"attn1.to_k": 9.5}
    adapter = trained(net, r=3, lora_alpha=7, use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas)
    path = adapter.save(tmp_path)
    tensors = {k: v for k, v in load_tensors(path).items() if not k.endswith(".alpha")}
    save_file(tensors, path, load_metadata(path))
    same_modules(read_lora(path).modules, adapter.modules())


def test_an_unknown_layout_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="diffusers, peft"):
        write_lora(tmp_path / "new", {TO_Q: LoraModule(DOWN, UP, 1.0)}, "webui")
    assert not (tmp_path / "new").exists()


# ---- bad input


def changed(**parts):
    return LAYOUTS["diffusers"] | {f"transformer.{TO_Q}.{k.replace('__', '.')}": v for k, v in parts.items()}


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({}, "it is empty"),
        ({"transformer.x.weight": DOWN}, r"1 tensors are no part of one \(transformer\.x\.weight\)"),
        (changed() | {"unet.layer.lora_A.bias": DOWN}, r"unet\.layer"),
        ({f"transformer.{TO_Q}.lora_A.weight": DOWN}, "has no up"),
        ({f"transformer.{TO_Q}.alpha": np.ones(1)}, "no down and no up"),
        (changed(lora_B__weight=np.ones((4, 3), np.float32)), r"\(2, 3\) and \(4, 3\)"),
        (changed(lora_A__weight=np.ones(3, np.float32)), "expected"),
        (changed(lora_A__weight=np.ones((0, 3), np.float32)), "expected"),
        (changed(lora_A__weight=np.array(1.0, np.float32)), "expected"),
        (changed(lora_A__weight=DOWN.astype(np.int8)), "down of int8"),
        (changed(lora_A__weight=DOWN * np.nan), "not finite"),
        (changed(alpha=np.array(np.inf)), "not finite"),
        (changed(alpha=np.ones(2)), "expected a number"),
        (changed(lora_magnitude_vector=np.ones(3, np.float32)), "4 numbers"),
        (changed(dora_scale=np.ones((1, 4), np.float32)), "4 numbers"),
        (changed(lora_B__weight=UP[:1], dora_scale=np.array(1.0, np.float32)), "1 numbers"),
        (changed() | {f"base_model.model.{TO_Q}.lora_A.weight": DOWN}, "the down of .*attn1.to_q twice"),
    ],
)
def test_tensors_that_are_no_lora_are_refused_with_a_reason(tensors, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        read_lora(tensors)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"alpha_pattern": [1]}, "alpha_pattern is"),
        ({"alpha_pattern": {"to_(q": 1}}, "is not understood as a pattern"),
        ({"use_dora": True, "lora_alpha": 1}, "no lora_magnitude_vector"),
        ("text", "expected an object"),
        (None, "not valid JSON"),
    ],
)
def test_a_configuration_that_does_not_describe_a_lora_is_refused(config, complaint, tmp_path):
    tensors = {k: v for k, v in LAYOUTS["diffusers"].items() if "alpha" not in k}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    text = "{" if config is None else json.dumps(config)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=complaint):
        read_lora(tmp_path)
    save_file(tensors, tmp_path / "other.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=complaint):
        read_lora(tmp_path / "other.safetensors")


def test_what_is_missing_or_damaged_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; expected a LoRA's file or its folder"):
        read_lora(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no LoRA.*pytorch_lora_weights\.safetensors"):
        read_lora(tmp_path)
    with pytest.raises(CheckpointError, match=r"mine\.safetensors does not exist"):
        read_lora(tmp_path, "mine.safetensors")
    (tmp_path / "notes.txt").write_text("no")
    with pytest.raises(CheckpointError, match=r"unknown ending '\.txt'"):
        read_lora(tmp_path / "notes.txt")
    path = tmp_path / "cut.safetensors"
    save_file(LAYOUTS["diffusers"], path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        read_lora(path)


keys = st.text(max_size=12) | st.sampled_from([*LAYOUTS["diffusers"], *LAYOUTS["kohya"], TO_Q + ".dora_scale"])
arrays = st.builds(
    lambda shape, kind: np.ones(shape, kind),
    st.lists(st.integers(0, 3), max_size=5).map(tuple),
    st.sampled_from([np.float16, np.float32, np.float64, np.int32, np.bool_]),
)


@settings(max_examples=200)
@given(st.dictionaries(keys, arrays, max_size=5))
@pytest.mark.filterwarnings("ignore:.*holds no alpha")
def test_any_tensors_are_read_or_refused(tensors):
    try:
        file = read_lora(LAYOUTS["diffusers"] | tensors)
    except CheckpointError:
        return
    assert all(m.down.shape[0] == m.up.shape[1] for m in file.modules.values())
