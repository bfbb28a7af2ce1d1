"""The audit of a conversion: every tensor accounted for, and sentences on what the user has to know or do."""

import json

import numpy as np
import pytest
from reference_data import OFFICIAL, official

from pixart_nb.core import PixArtConfig
from pixart_nb.core.checkpoints.audit import OUTCOMES, Audit, links_between
from pixart_nb.core.checkpoints.convert import convert, plan_conversion
from pixart_nb.core.checkpoints.files import open_checkpoint
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
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
    """Return the one sentence of an audit that begins so."""
    sentences = [sentence for sentence in audit.sentences if sentence.startswith(beginning)]
    assert len(sentences) == 1, audit.sentences
    return sentences[0]


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


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("F32", "F16", "rounded"),
        ("F32", "BF16", "rounded"),
        ("BF16", "F16", "rounded"),
        ("F16", "BF16", "rounded"),
        ("F16, F32", "F16", "rounded"),
        ("F16", "F32", "without loss"),
        ("BF16", "F32", "without loss"),
        ("F8_E4M3", "F16", "without loss"),
        ("BF16, F32", "F32", "without loss"),
        ("F32", "F32", ""),
        ("F32, I64", "F32", ""),
    ],
)
def test_values_are_called_rounded_only_if_the_target_has_fewer_bits(before, after, expected):
    text = str(Audit("a", "b", ("official", "official"), (before, after), "", {}, []))
    assert [word for word in ("rounded", "without loss") if word in text] == ([expected] if expected else [])
    assert (f"{before} became {after}." in text) == bool(expected)


def test_the_written_audit_lists_the_tensors_by_what_became_of_them(tmp_path):
    tensors = small() | {"stranger.weight": np.ones(7, np.float32), "pos_embed": np.zeros((1, 9, 24), np.float32)}
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
    convert(plan_conversion(tmp_path / "source.safetensors", tmp_path / "folder", PixArtConfig(num_heads=2), 64))
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


# ---- sentences


def sentences_of(*arguments, **options):
    return " ".join(audited(*arguments, **options).sentences)


def test_caption_tokens_show_the_family_and_other_numbers_have_to_be_given(tmp_path):
    for tokens, family in ((120, "alpha"), (300, "sigma")):
        audit = audited(tmp_path, small(model_max_length=tokens), sample_size=64)
        assert (audit.family, audit.sentences) == (family, [])
        assert f"\nPixArt-{family}: " in str(audit)
    audit = audited(tmp_path, small(model_max_length=77))
    assert (audit.family, audit.config["model_max_length"]) == ("", 77)
    assert "set model_max_length 77" in about(audit, "Caption tokens")
    assert audited(tmp_path, small(model_max_length=77, micro_condition=True)).family == "alpha"


def test_without_an_empty_caption_the_pipeline_shows_the_family(tmp_path):
    tensors = small()
    del tensors["y_embedder.y_embedding"]
    audit = audited(tmp_path, tensors)
    assert audit.family == "" and audit.complete
    assert "The family is unknown" in about(audit, "The learned empty caption")
    assert "model_max_length" not in audit.config
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    write_json(folder.parent / "model_index.json", {"_class_name": "PixArtAlphaPipeline"})
    audit = audited(folder, tensors)
    assert (audit.family, audit.config["model_max_length"]) == ("alpha", 120)
    assert "taken to be alpha" in about(audit, "The learned empty caption")


def test_a_training_size_that_is_not_stored_has_to_be_given(tmp_path):
    assert "with another one the positions are wrong" in sentences_of(tmp_path, small())
    audit = audited(tmp_path, small(), sample_size=128)
    assert "The training size is unknown" not in " ".join(audit.sentences)
    assert (audit.config["input_size"], audit.config["pe_interpolation"]) == (128, 2.0)


def test_compression_without_weights_starts_as_an_average_if_it_is_requested(tmp_path):
    assert "KV compression" not in sentences_of(tmp_path, small())
    config = PixArtConfig(num_heads=2, kv_compress_config=COMPRESSION)
    audit = audited(tmp_path, small(), config=config)
    assert "start as averages (1/4 each" in about(audit, "KV compression")
    assert audit.counts["started"] == 4
    convert(plan_conversion(tmp_path / "source.safetensors", tmp_path / "a.pth", config))
    written = open_checkpoint(tmp_path / "a.pth").tensors
    values = {leaf: np.unique(np.asarray(written[f"blocks.1.attn.{leaf}"])) for leaf in ("sr.weight", "sr.bias")}
    assert values == {"sr.weight": 0.25, "sr.bias": 0.0}


def test_compressed_layers_that_mindone_saved_or_cannot_hold_have_a_sentence(tmp_path):
    tensors = small(kv_compress_config=COMPRESSION)
    assert "there they would be ignored" in about(audited(tmp_path, tensors, "a.ckpt"), "KV compression")
    assert "loads in this kit, not there" in sentences_of(tmp_path, tensors, "folder", sample_size=64)
    for leaf in ("sr.bias", "norm.weight", "norm.bias"):
        del tensors[f"blocks.1.attn.{leaf}"]
    audit = audited(tmp_path, tensors)
    assert "came without norm.bias, norm.weight, sr.bias" in about(audit, "KV compression")
    assert audit.complete


def test_compression_that_picks_tokens_has_no_weights_to_convert(tmp_path):
    picking = COMPRESSION | {"sampling": "ave"}
    audit = audited(tmp_path, small(), config=PixArtConfig(num_heads=2, kv_compress_config=picking))
    assert "started" not in audit.counts


def test_two_transformers_are_linked_by_what_they_share(tmp_path):
    alpha, sigma = (
        {name: LazyTensor.of(value, name) for name, value in small(**options).items()}
        for options in ({"model_max_length": 120, "micro_condition": True}, {"model_max_length": 300})
    )
    links = links_between(alpha, sigma)
    assert (("blocks.{i}.attn.qkv",), ("blocks.{i}.attn.qkv",), "same shape") in links
    assert (("y_embedder.y_embedding",), ("y_embedder.y_embedding",), "another shape") in links
    assert (("csize_embedder.mlp.0",), (), "only here") in links
    assert ((), ("ar_embedder.mlp.2",), "only here") in links_between(sigma, alpha)
    assert len(links) == len(set(links))
