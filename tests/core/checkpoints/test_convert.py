"""Conversion between every two layouts keeps every bit, is verified, and leaves nothing half-written."""

import json
import resource
import shutil
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from reference_data import OFFICIAL, diffusers, official, relative_error
from torch_files import as_saved, write_legacy, write_torch
from typer.testing import CliRunner

from pixart_nb.cli import app
from pixart_nb.core import PixArtConfig, load_transformer
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import convert as conversion
from pixart_nb.core.checkpoints.convert import (
    WRITERS,
    convert,
    outputs,
    plan_conversion,
    tolerance,
    verify,
    write_random,
)
from pixart_nb.core.checkpoints.files import open_checkpoint
from pixart_nb.core.checkpoints.key_maps import to_official_names
from pixart_nb.core.errors import FolderInUseError, WriteError
from pixart_nb.core.io import CheckpointError, folder_lock, read_json, save_tensors, write_json

CASE = "sigma-ms-kvconv4-qknorm"  # has every kind of tensor but micro conditions
SOURCES = ["official.pth", "legacy.pth", "nested.pth", "a.safetensors", "a.ckpt", "folder", "bin", "shards", "pipeline"]
TARGETS = ["target.safetensors", "target.ckpt", "target.pth", "target"]


def converted(source, target, **options):
    plan = plan_conversion(source, target, **options)
    convert(plan)
    return plan


def bits(path):
    """Official name -> kind, shape and bytes of every tensor of a checkpoint, but for what is recomputed."""
    tensors = to_official_names(open_checkpoint(path)).tensors
    return {name: (t.dtype, t.shape, b"".join(chunk.tobytes() for chunk in t.chunks())) for name, t in tensors.items()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same transformer in every layout that can be read; each with a config.json where one is published."""
    folder = tmp_path_factory.mktemp("sources")
    path, config, _ = official(CASE)
    write_json(folder / "config.json", config)
    tensors = open_checkpoint(path).tensors
    shutil.copy(path, folder / "official.pth")
    arrays = {name: np.asarray(t) for name, t in tensors.items()}
    named, storages = as_saved(arrays)
    write_legacy(folder / "legacy.pth", {"state_dict": named}, storages)
    named, storages = as_saved(arrays, "module.")
    write_torch(folder / "nested.pth", {"epoch": 3, "state_dict": {}, "state_dict_ema": named}, storages)
    for name in ("a.safetensors", "a.ckpt"):
        WRITERS[f".{name.split('.')[1]}"](folder / name, tensors)
    converted(folder / "official.pth", folder / "folder")
    theirs = open_checkpoint(folder / "folder").tensors
    for name in ("bin", "shards", "pipeline/transformer"):
        (folder / name).mkdir(parents=True)
        shutil.copy(folder / "folder" / "config.json", folder / name)
    named, storages = as_saved({name: np.asarray(t) for name, t in theirs.items()})
    write_torch(folder / "bin" / "diffusion_pytorch_model.bin", named, storages)
    places = {name: f"diffusion_pytorch_model-0000{k % 3}-of-3.safetensors" for k, name in enumerate(theirs)}
    for shard in set(places.values()):
        part = {name: t for name, t in theirs.items() if places[name] == shard}
        WRITERS[".safetensors"](folder / "shards" / shard, part)
    write_json(
        folder / "shards" / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": places, "metadata": {}}
    )
    shutil.copy(folder / "folder" / "diffusion_pytorch_model.safetensors", folder / "pipeline" / "transformer")
    write_json(folder / "pipeline" / "model_index.json", {"_class_name": "PixArtSigmaPipeline"})
    return folder


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_layout_becomes_every_other_with_every_bit(sources, tmp_path, source, target):
    plan = converted(sources / source, tmp_path / target)
    assert bits(tmp_path / target) == bits(sources / "official.pth")
    assert all(path.is_file() for path in plan.files)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(plan.files)
    back = converted(tmp_path / target, tmp_path / "back.pth")
    assert bits(tmp_path / "back.pth") == bits(sources / "official.pth")
    assert back.config == plan.config


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("target", TARGETS)
def test_half_precision_is_kept_bit_for_bit(tmp_path, target, kind):
    path, config, _ = official(CASE)
    tensors = {name: t.astype(kind) for name, t in open_checkpoint(path).tensors.items()}
    WRITERS[".pth"](tmp_path / "half.pth", tensors)
    converted(tmp_path / "half.pth", tmp_path / target, config=PixArtConfig(**config))
    found = bits(tmp_path / target)
    assert found == bits(tmp_path / "half.pth")
    assert {dtype for dtype, _, _ in found.values()} == {kind}


@pytest.mark.parametrize("case", OFFICIAL)
def test_a_converted_checkpoint_computes_the_reference(tmp_path, case):
    path, config, arrays = official(case)
    plan = converted(path, tmp_path / "transformer")
    assert verify(plan) == 0.0
    net = load_transformer(tmp_path / "transformer")
    names = ("latents", "timestep", "caption", "mask")
    out = net(*(ms.Tensor(arrays[name]) for name in names))
    assert relative_error(out.asnumpy(), arrays["output"]) < 1e-4
    assert {name: plan.audit.config[name] for name in config if name != "class_name"} == {
        name: value for name, value in config.items() if name != "class_name"
    }


def test_published_diffusers_folders_become_official_files_and_back(tmp_path):
    for name, family in (("alpha", "alpha"), ("sigma", "sigma")):
        folder, _, _ = diffusers(name)
        plan = converted(folder, tmp_path / f"{name}.pth")
        assert plan.audit.family == family
        assert verify(plan) == 0.0
        back = converted(tmp_path / f"{name}.pth", tmp_path / name)
        weights = "diffusion_pytorch_model.safetensors"
        before, after = (open_checkpoint(p / weights).tensors for p in (folder / "transformer", tmp_path / name))
        assert {n: np.asarray(t).tobytes() for n, t in before.items()} == {
            n: np.asarray(t).tobytes() for n, t in after.items()
        }
        assert load_transformer(tmp_path / name).config == load_transformer(folder / "transformer").config
        assert back.audit.of("absent")[0].target == ("y_embedder.y_embedding",)


@pytest.mark.parametrize(("dtype", "kind"), [("fp16", "F16"), ("bf16", "BF16"), ("fp32", "F32")])
def test_another_dtype_is_written_verified_and_said(sources, tmp_path, dtype, kind):
    plan = converted(sources / "official.pth", tmp_path / "a.safetensors", dtype=dtype)
    assert plan.audit.dtypes == ("F32", kind)
    assert {found for found, _, _ in bits(tmp_path / "a.safetensors").values()} == {kind}
    error = verify(plan)
    assert error <= tolerance(plan)
    assert (error > 0) == (kind != "F32")
    assert (f"F32 became {kind}" in str(plan.audit)) == (kind != "F32")


def test_verification_notices_a_target_that_computes_something_else(sources, tmp_path):
    plan = converted(sources / "official.pth", tmp_path / "a.safetensors")
    tensors = open_checkpoint(tmp_path / "a.safetensors").tensors
    arrays = {name: np.array(np.asarray(t)) for name, t in tensors.items()}
    arrays["blocks.1.mlp.fc2.bias"] += 0.1
    save_tensors(tmp_path / "a.safetensors", arrays)
    assert verify(plan) > tolerance(plan)


# ---- bad input


def test_an_incomplete_source_is_audited_and_not_converted(sources, tmp_path):
    tensors = open_checkpoint(sources / "official.pth").tensors
    short = {name: t for name, t in tensors.items() if name != "blocks.1.mlp.fc1.bias"}
    short["final_layer.linear.bias"] = short["final_layer.linear.bias"].rows(0, 3)
    WRITERS[".safetensors"](tmp_path / "short.safetensors", short)
    plan = plan_conversion(tmp_path / "short.safetensors", tmp_path / "out" / "a.ckpt", PixArtConfig(num_heads=2))
    assert [entry.target for entry in plan.audit.of("missing")] == [("blocks.1.mlp.fc1.bias",)]
    assert [(e.source_shapes, e.target_shapes) for e in plan.audit.of("misfit")] == [(((3,),), ((32,),))]
    with pytest.raises(CheckpointError, match=r"not complete: .*blocks\.1\.mlp\.fc1\.bias.*Nothing was written"):
        convert(plan)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("official.pth", "is the source itself"),
        ("a.onnx", "expected a file that ends in .safetensors, .ckpt, .pth, .pt, or a folder"),
        ("pipeline", "give its transformer folder"),
        ("shards", "holds other weights"),
    ],
)
def test_a_target_that_cannot_be_written_is_named_before_anything_is(sources, target, message):
    before = sorted(sources.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(sources / "official.pth", sources / target)
    assert sorted(sources.rglob("*")) == before


def test_a_source_that_does_not_exist_is_named_as_such(sources):
    with pytest.raises(CheckpointError, match=r"none\.ckpt does not exist"):
        plan_conversion(sources / "none.ckpt", sources / "none.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": PixArtConfig(model_max_length=120)}, "alpha's checkpoints have 120 caption tokens, sigma's 300"),
        ({"config": PixArtConfig(micro_condition=True)}, "only alpha-1024 has micro conditions"),
        ({"config": PixArtConfig(kv_compress_config={"scale_factor": 2})}, "shows kv_compress_config"),
        ({"config": PixArtConfig(depth=28)}, "shows depth = 4, but the configuration says 28"),
        ({"sample_size": 64}, "shows input_size = 32, but the configuration says 64"),
        ({"sample_size": 0}, "expected the latent side"),
        ({"dtype": "int4"}, "expected one of keep, fp32, fp16, bf16"),
    ],
)
def test_contradictions_are_named(sources, tmp_path, options, message):
    with pytest.raises(CheckpointError, match=f"(?i){message}"):
        plan_conversion(sources / "official.pth", tmp_path / "a.ckpt", **options)


def without(path, *names):
    """A checkpoint without those tensors and without a configuration beside it."""
    tensors = {name: t for name, t in open_checkpoint(official(CASE)[0]).tensors.items() if name not in names}
    path.parent.mkdir(exist_ok=True)
    WRITERS[path.suffix](path, tensors)
    return path


def test_a_folder_is_not_written_while_the_training_size_is_not_known(tmp_path):
    source, heads = without(tmp_path / "mine.pth", "pos_embed"), PixArtConfig(num_heads=2)
    with pytest.raises(CheckpointError, match=r"does not show its training size.*give --sample_size"):
        plan_conversion(source, tmp_path / "folder", heads)
    plan = converted(source, tmp_path / "folder", config=heads, sample_size=128)
    values = read_json(tmp_path / "folder" / "config.json")
    assert (values["sample_size"], values["interpolation_scale"]) == (128, 2.0)
    assert plan.config.class_name == "PixArtMS"


def test_the_published_name_of_a_file_tells_its_size(tmp_path):
    for name, size, stretch in (
        ("PixArt-Sigma-XL-2-256x256.pth", 32, 0.5),
        ("PixArt-Sigma-XL-2-1024-MS.pth", 128, 2.0),
        ("PixArt-XL-2-256x256.pth", 32, 1.0),
        ("PixArt-Sigma-XL-2-2K-MS.ckpt", 256, 4.0),
    ):
        source = without(
            tmp_path / "models" / name, "pos_embed", "y_embedder.y_embedding"
        )  # its 20 tokens show nothing
        audit = plan_conversion(source, tmp_path / "folder", PixArtConfig(num_heads=2)).audit
        assert (audit.config["input_size"], audit.config["pe_interpolation"]) == (size, stretch)
        assert audit.family == ("sigma" if "Sigma" in name else "alpha")
        assert any(f"latents of {size}, is that of the published file of this name" in s for s in audit.sentences)


def test_heads_that_no_one_tells_are_needed_for_a_folder_and_not_for_a_file(tmp_path):
    source = tmp_path / "mine.pth"
    shutil.copy(official(CASE)[0], source)
    with pytest.raises(CheckpointError, match=r"number of heads is unknown.*--config"):
        plan_conversion(source, tmp_path / "folder")
    plan = converted(source, tmp_path / "a.ckpt")
    assert "num_heads" not in plan.audit.config
    assert any("The number of heads is unknown" in sentence for sentence in plan.audit.sentences)
    assert verify(plan) == 0.0
    with pytest.raises(CheckpointError, match="number of heads is unknown"):
        load_transformer(tmp_path / "a.ckpt")


def test_what_the_audit_says_of_a_converted_file_is_used_when_it_is_loaded(sources, tmp_path):
    plan = converted(sources / "official.pth", tmp_path / "a.ckpt")
    assert load_transformer(tmp_path / "a.ckpt").config == plan.config
    (tmp_path / "a.ckpt.audit.json").unlink()
    with pytest.raises(CheckpointError, match="number of heads"):
        load_transformer(tmp_path / "a.ckpt")


def test_a_config_json_of_something_else_beside_the_file_is_said_and_not_used(tmp_path):
    shutil.copy(official(CASE)[0], tmp_path / "mine.pth")
    write_json(tmp_path / "config.json", {"d_model": 4096})
    plan = plan_conversion(tmp_path / "mine.pth", tmp_path / "a.ckpt")
    assert any("beside the file was not used" in sentence for sentence in plan.audit.sentences)


# ---- a disk that fills up


@contextmanager
def files_limited_to(size):
    """The system itself refuses to write files further than this, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("room", [0, 20_000])
def test_a_disk_that_fills_up_leaves_nothing_and_an_older_target_whole(sources, tmp_path, target, room):
    assert (sources / "official.pth").stat().st_size > 20_000
    plan = plan_conversion(sources / "official.pth", tmp_path / "new" / target)
    with pytest.raises(WriteError, match="no incomplete file is left"), files_limited_to(room):
        convert(plan)
    assert list(tmp_path.iterdir()) == []
    plan = converted(sources / "official.pth", tmp_path / target)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(WriteError, match="could not be written"), files_limited_to(room):
        convert(plan)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


KILLED = """
import os, sys
from pixart_nb.core import io
io._sync = lambda path: os._exit(137)
from pixart_nb.cli import app
app(sys.argv[1:])
"""


@pytest.mark.parametrize("target", ["a.ckpt", "folder"])
def test_what_killed_conversions_left_is_removed_by_the_next(sources, tmp_path, target):
    words = ["convert", "--source", str(sources / "folder"), "--target", str(tmp_path / target)]
    assert subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True).returncode == 137
    assert any(path.suffix == ".tmp" for path in tmp_path.rglob(".*"))
    assert CliRunner().invoke(app, words).exit_code == 0
    assert [path.name for path in tmp_path.rglob(".*")] == []


def test_two_conversions_into_one_target_are_not_made_at_once(sources, tmp_path):
    plan = plan_conversion(sources / "official.pth", tmp_path / "a.ckpt")
    with folder_lock(tmp_path, name=".a.ckpt.lock"), pytest.raises(FolderInUseError, match="is writing into"):
        convert(plan)
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path, name=".b.ckpt.lock"):
        convert(plan)


def test_a_disk_without_room_is_named_before_anything_is_written(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("pixart_nb.core.io.shutil.disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(WriteError, match=r"needs 0\.2 MB and has 0\.0 MB free; free space"):
        converted(sources / "official.pth", tmp_path / "new" / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


# ---- the command


def run(*words):
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def test_the_command_prints_the_table_and_verifies(sources, tmp_path):
    result = run("--source", sources / "official.pth", "--target", tmp_path / "a.ckpt", "--verify")
    assert result.exit_code == 0, result.output
    assert "blocks.{i}.attn.qkv.weight" in result.stdout
    assert "0 missing - needed, but not in the source" in result.stdout
    assert "relative error of one forward pass: 0.0e+00" in result.stdout
    assert json.loads((tmp_path / "a.ckpt.audit.json").read_text())["complete"]
    assert str(tmp_path / "a.ckpt") in result.stdout.splitlines()


def test_the_command_takes_mindones_short_options_and_its_default_target(sources, tmp_path):
    shutil.copy(sources / "official.pth", tmp_path / "mine.pth")
    result = run("-s", tmp_path / "mine.pth")
    assert result.exit_code == 0, result.output
    assert bits(tmp_path / "mine.ckpt") == bits(sources / "official.pth")
    assert run("-s", tmp_path / "mine.pth").exit_code == 0  # its own conversion
    assert run("-s", tmp_path / "mine.pth", "-t", tmp_path / "b.pth").exit_code == 0
    result = run("-s", sources / "folder")
    assert result.exit_code == 2
    assert "give --target" in result.stderr


def test_the_folder_of_another_network_is_not_a_target(project, sources, tmp_path):
    for name in ("vae", "text_encoder"):
        folder = shutil.copytree(project / "data" / "tiny-sigma" / name, tmp_path / name)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        result = run("-s", sources / "official.pth", "-t", folder, "--sample_size", 16)
        assert result.exit_code == 2 and str(folder) in result.stderr
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_where_the_default_target_would_be_is_not_replaced(sources, tmp_path):
    shutil.copy(sources / "official.pth", tmp_path / "mine.pth")
    (tmp_path / "mine.ckpt").write_bytes(b"mindone's")
    result = run("-s", tmp_path / "mine.pth")
    assert result.exit_code == 2 and "give --target to replace it" in result.stderr
    assert (tmp_path / "mine.ckpt").read_bytes() == b"mindone's"
    assert run("-s", tmp_path / "mine.pth", "-t", tmp_path / "mine.ckpt").exit_code == 0


def test_the_command_fails_where_verification_does(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "verify", lambda plan: float("nan"))
    result = run("--source", sources / "official.pth", "--target", tmp_path / "a.ckpt", "--verify")
    assert result.exit_code == 1
    assert "does not compute what" in result.stderr


def test_the_command_takes_a_configuration_in_any_of_its_forms(sources, tmp_path):
    source = without(tmp_path / "x" / "mine.pth", "pos_embed")
    for config in (sources / "config.json", sources / "folder" / "config.json", sources / "folder.audit.json"):
        result = run("--source", source, "--target", tmp_path / "folder", "--config", config)
        assert result.exit_code == 0, result.output
        assert read_json(tmp_path / "folder" / "config.json") == read_json(sources / "folder" / "config.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "none.pth", "--target", "a.ckpt"], "none.pth does not exist"),
        (["--source", "README.md", "--target", "a.ckpt"], "unknown ending '.md'"),
        (["--source", "data/tiny-sigma/vae", "--target", "a.ckpt"], "is no PixArt transformer: it has no tensor"),
        (["--source", "data/pixelart", "--target", "a.ckpt"], "holds no weights"),
    ],
)
def test_a_source_that_is_no_checkpoint_is_one_line(project, monkeypatch, words, message):
    monkeypatch.chdir(project)
    result = run(*words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (project / "a.ckpt").exists()


def test_a_random_checkpoint_is_one_that_converts_and_computes(tmp_path):
    config = PixArtConfig(
        hidden_size=72, depth=2, num_heads=1, caption_channels=16, input_size=128, pe_interpolation=2.0
    )
    write_random(tmp_path / "a.pth", config, seed=3)
    plan = converted(tmp_path / "a.pth", tmp_path / "folder")
    assert (plan.audit.dtypes, plan.audit.family) == (("F32", "F32"), "sigma")
    assert (plan.config.input_size, plan.config.pe_interpolation) == (128, 2.0)
    expected, found = outputs(plan)
    assert np.array_equal(expected, found)
    assert expected.std() > 0
    write_random(tmp_path / "b.pth", config, seed=4)
    assert bits(tmp_path / "a.pth") != bits(tmp_path / "b.pth")


@pytest.mark.parametrize("target", TARGETS)
def test_conversion_copies_a_part_of_the_weights_at_a_time(tmp_path, target):
    config = PixArtConfig(hidden_size=576, num_heads=8, depth=6, caption_channels=64)
    write_random(tmp_path / "a.pth", config, dtype="fp16")
    tracemalloc.start()
    converted(tmp_path / "a.pth", tmp_path / target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a.pth").stat().st_size > 65e6
    assert peak < 20e6
