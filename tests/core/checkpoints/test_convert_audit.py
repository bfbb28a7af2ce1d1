"""The audit of a conversion: every tensor accounted for, and a sentence for each thing that people stumble over."""

import json

import numpy as np
import pytest
from reference_data import OFFICIAL, official

from pixart_nb.core import PixArtConfig
from pixart_nb.core.checkpoints.audit import OUTCOMES, links_between
from pixart_nb.core.checkpoints.convert import convert, plan_conversion
from pixart_nb.core.checkpoints.files import open_checkpoint
from pixart_nb.core.checkpoints.lazy_tensor import Stored
from pixart_nb.core.checkpoints.load import shapes_of
from pixart_nb.core.io import save_tensors, write_json

COMPRESSION = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [1]}


def small(**options):
    config = PixArtConfig(hidden_size=24, num_heads=2, depth=2, caption_channels=8, **options)
    return {name: np.ones(shape, np.float32) for name, shape in shapes_of(config).items()}


def audited(folder, tensors, target="a.safetensors", **options):
    save_tensors(folder / "source.safetensors", tensors)
    given = options.pop("config", PixArtConfig(num_heads=2))
    return plan_conversion(folder / "source.safetensors", folder / target, given, **options).audit


def about(audit, beginning):
    """The one sentence of an audit that begins so."""
    found = [sentence for sentence in audit.sentences if sentence.startswith(beginning)]
    assert len(found) == 1, audit.sentences
    return found[0]


@pytest.mark.parametrize("target", ["a.ckpt", "folder"])
@pytest.mark.parametrize("case", OFFICIAL)
def test_every_tensor_of_source_and_target_is_accounted_for_once_with_its_shape(tmp_path, case, target):
    path, _, _ = official(case)
    plan = plan_conversion(path, tmp_path / target)
    audit = convert(plan)
    before, after = (open_checkpoint(p).tensors for p in (path, tmp_path / target))
    sources = [pair for e in audit.entries for pair in zip(e.source, e.source_shapes, strict=True)]
    targets = [pair for e in audit.entries for pair in zip(e.target, e.target_shapes, strict=True)]
    assert sorted(sources) == sorted((name, t.shape) for name, t in before.items())
    assert sorted(targets) == sorted((name, t.shape) for name, t in after.items())
    assert audit.counts == {"mapped": len(before) - 1, "recomputed": 1, "missing": 0, "unexpected": 0}
    assert audit.of("recomputed")[0].source == ("pos_embed",)


def test_the_written_audit_lists_the_tensors_by_what_became_of_them(tmp_path):
    tensors = small() | {
        "stranger.weight": np.ones(7, np.float32),
        "pos_embed": np.zeros((1, 9, 24), np.float32),
    }
    save_tensors(tmp_path / "source.safetensors", tensors)
    plan = plan_conversion(tmp_path / "source.safetensors", tmp_path / "a.ckpt", PixArtConfig(num_heads=2))
    convert(plan)
    written = json.loads((tmp_path / "a.ckpt.audit.json").read_text())
    assert written["counts"] == {"mapped": len(small()), "recomputed": 1, "missing": 0, "unexpected": 1}
    assert written["tensors"]["unexpected"] == [
        {
            "outcome": "unexpected",
            "source": ["stranger.weight"],
            "source_shapes": [[7]],
            "target": [],
            "target_shapes": [],
        }
    ]
    assert [entry["source"] for entry in written["tensors"]["recomputed"]] == [["pos_embed"]]
    assert len(written["tensors"]["mapped"]) == len(small())
    assert written["family"] == "sigma"
    assert written["config"]["hidden_size"] == 24
    assert written["sentences"] == plan.audit.sentences
    assert "stranger.weight" not in open_checkpoint(tmp_path / "a.ckpt").tensors


def test_the_table_folds_the_blocks_and_says_how_tensors_were_mapped(tmp_path):
    audit = audited(tmp_path, small(), "folder", sample_size=64)
    rows = {row["source"]: row for row in audit.rows()}
    assert rows["blocks.{i}.attn.qkv.weight"] == {
        "source": "blocks.{i}.attn.qkv.weight",
        "shape": "72x24",
        "target": "transformer_blocks.{i}.attn1.(to_q|to_k|to_v).weight",
        "becomes": "24x24 x3",
        "outcome": "split in 3",
        "blocks": "2",
    }
    assert rows["t_block.1.bias"]["outcome"] == "renamed"
    assert rows["t_block.1.bias"]["blocks"] == ""
    assert len(audit.rows(folded=False)) == len(audit.entries)
    lines = audit.table().splitlines()
    assert len(lines) == 1 + len(rows)
    assert len({line.index("split in") for line in lines if "split in" in line}) == 1
    convert(
        plan_conversion(tmp_path / "source.safetensors", tmp_path / "folder", PixArtConfig(num_heads=2), 64)
    )
    back = plan_conversion(tmp_path / "folder", tmp_path / "b.ckpt").audit
    ways = {row["target"]: row["outcome"] for row in back.rows()}
    assert ways["blocks.{i}.attn.qkv.weight"] == "stacked of 3"
    assert ways["blocks.{i}.cross_attn.kv_linear.bias"] == "stacked of 2"


def test_every_outcome_is_explained_in_the_summary(tmp_path):
    tensors = small(kv_compress_config=COMPRESSION)
    for name in ("blocks.1.attn.sr.bias", "y_embedder.y_embedding", "t_block.1.bias"):
        del tensors[name]
    tensors |= {"pos_embed": np.zeros((1, 9, 24), np.float32), "a.b": np.ones(1, np.float32)}
    tensors["final_layer.linear.bias"] = np.ones(3, np.float32)
    audit = audited(tmp_path, tensors)
    assert set(audit.counts) == set(OUTCOMES)
    assert not audit.complete
    for outcome, names in {
        "missing": "t_block.1.bias",
        "unexpected": "a.b",
        "started": "blocks.1.attn.sr.bias",
        "absent": "y_embedder.y_embedding",
        "misfit": "final_layer.linear.bias",
        "recomputed": "pos_embed",
    }.items():
        assert f"     1 {outcome} - {OUTCOMES[outcome]}: {names}\n" in str(audit)


# ---- what people stumble over


@pytest.mark.parametrize(
    ("tokens", "family", "other"),
    [
        (120, "alpha", "A sigma configuration, which says 300"),
        (300, "sigma", "An alpha configuration, which says 120"),
    ],
)
def test_caption_tokens_tell_alpha_from_sigma(tmp_path, tokens, family, other):
    audit = audited(tmp_path, small(model_max_length=tokens))
    assert audit.family == family
    expected = f"Caption tokens: {tokens}, so this is PixArt-{family}. {other}, does not fit it."
    assert about(audit, "Caption tokens") == expected
    assert f"\nPixArt-{family}: " in str(audit)


def test_other_numbers_of_caption_tokens_are_said_and_micro_conditions_tell_alpha(tmp_path):
    audit = audited(tmp_path, small(model_max_length=77))
    assert "neither alpha's 120 nor sigma's 300; say model_max_length 77" in about(audit, "Caption tokens")
    assert (audit.family, audit.config["model_max_length"]) == ("", 77)
    assert audited(tmp_path, small(model_max_length=77, micro_condition=True)).family == "alpha"


def test_without_an_empty_caption_the_pipeline_around_tells_the_family(tmp_path):
    tensors = small()
    del tensors["y_embedder.y_embedding"]
    audit = audited(tmp_path, tensors)
    assert audit.family == ""
    assert "its kind is not known" in about(audit, "Caption tokens")
    assert "model_max_length" not in audit.config
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    write_json(folder.parent / "model_index.json", {"_class_name": "PixArtAlphaPipeline"})
    audit = audited(folder, tensors)
    assert (audit.family, audit.config["model_max_length"]) == ("alpha", 120)
    assert "taken to be PixArt-alpha" in about(audit, "Caption tokens")


def test_the_empty_caption_has_a_sentence_wherever_it_is_kept_or_absent(tmp_path):
    tensors = small()
    assert "is kept" in about(audited(tmp_path, tensors), "y_embedding")
    folder = audited(tmp_path, tensors, "folder", sample_size=64)
    assert "as caption_projection.y_embedding" in about(folder, "y_embedding")
    del tensors["y_embedder.y_embedding"]
    absent = audited(tmp_path, tensors)
    assert "is not in the source" in about(absent, "y_embedding")
    assert "convert the official checkpoint" in about(absent, "y_embedding")
    assert absent.complete


def test_positions_are_recomputed_whether_they_are_there_or_not(tmp_path):
    without = about(audited(tmp_path, small()), "pos_embed")
    assert (
        without
        == "pos_embed is not in the source, as in many checkpoints; it is recomputed, and nothing is lost."
    )
    audit = audited(tmp_path, small() | {"pos_embed": np.zeros((1, 9, 24), np.float32)})
    assert "it is not written, and nothing is lost" in about(audit, "pos_embed")


def test_a_training_size_that_is_not_stored_is_asked_for_where_it_is_loaded(tmp_path):
    assert "at another one the positions are wrong" in about(audited(tmp_path, small()), "The training size")
    audit = audited(tmp_path, small(), sample_size=128)
    assert not any(sentence.startswith("The training size") for sentence in audit.sentences)
    assert (audit.config["input_size"], audit.config["pe_interpolation"]) == (128, 2.0)


def test_micro_conditions_have_a_sentence_there_and_not_there(tmp_path):
    there = audited(tmp_path, small(micro_condition=True))
    assert "are there: of the published models, in alpha-1024 alone" in about(there, "Micro conditions")
    assert "use_additional_conditions on does not fit" in about(
        audited(tmp_path, small()), "Micro conditions"
    )


def test_weights_of_compression_that_are_absent_are_said_and_made_when_asked_for(tmp_path):
    assert "as in every published checkpoint" in about(audited(tmp_path, small()), "KV compression")
    config = PixArtConfig(num_heads=2, kv_compress_config=COMPRESSION)
    audit = audited(tmp_path, small(), config=config)
    assert "start as averages (1/4 each" in about(audit, "KV compression")
    assert audit.counts["started"] == 4
    convert(plan_conversion(tmp_path / "source.safetensors", tmp_path / "a.pth", config))
    written = open_checkpoint(tmp_path / "a.pth").tensors
    values = {
        name: np.unique(np.asarray(written[f"blocks.1.attn.{name}"])) for name in ("sr.weight", "sr.bias")
    }
    assert values == {"sr.weight": 0.25, "sr.bias": 0.0}


def test_compressed_layers_as_mindone_saves_them_lack_a_bias_and_that_is_said(tmp_path):
    tensors = small(kv_compress_config=COMPRESSION)
    trained = about(audited(tmp_path, tensors, "a.ckpt"), "KV compression")
    assert trained == "KV compression: layers [1] shrink by 2, with their trained weights."
    assert "there they would be ignored" in about(audited(tmp_path, tensors, "a.ckpt"), "mindone's model")
    for name in ("sr.bias", "norm.weight", "norm.bias"):
        del tensors[f"blocks.1.attn.{name}"]
    audit = audited(tmp_path, tensors)
    said = about(audit, "KV compression")
    assert said == (
        "KV compression: layers [1] came without norm.bias, norm.weight, sr.bias, as mindone saves them; these are 0 "
        "(biases) and 1 (norm), which changes nothing."
    )
    assert audit.complete
    folder = audited(tmp_path, tensors, "folder", sample_size=64)
    assert "loads in this kit, not there" in about(folder, "diffusers itself")


def test_compression_that_picks_tokens_has_no_weights_to_convert(tmp_path):
    picking = COMPRESSION | {"sampling": "ave"}
    audit = audited(tmp_path, small(), config=PixArtConfig(num_heads=2, kv_compress_config=picking))
    assert (
        about(audit, "KV compression")
        == "KV compression: 'ave' in layers [1], ratio 2, which has no weights."
    )
    assert "started" not in audit.counts


def test_two_transformers_are_linked_by_what_they_share(tmp_path):
    alpha, sigma = (
        {name: Stored.of(value, name) for name, value in small(**options).items()}
        for options in ({"model_max_length": 120, "micro_condition": True}, {"model_max_length": 300})
    )
    links = links_between(alpha, sigma)
    assert (("blocks.{i}.attn.qkv",), ("blocks.{i}.attn.qkv",), "same shape") in links
    assert (("y_embedder.y_embedding",), ("y_embedder.y_embedding",), "another shape") in links
    assert (("csize_embedder.mlp.0",), (), "only here") in links
    assert ((), ("ar_embedder.mlp.2",), "only here") in links_between(sigma, alpha)
    assert len(links) == len(set(links))
