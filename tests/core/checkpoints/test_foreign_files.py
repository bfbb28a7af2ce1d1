"""Files as users bring them: variants, training states, pointers, wrong paths, damaged bytes, hostile numbers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from reference_data import diffusers, official
from safetensors.numpy import load_file, save_file

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core import PixArtConfig, load_transformer
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import (
    LOADERS,
    T5EncoderModel,
    component_paths,
    load_components,
    write_transformer,
)
from pixart_nb.core.checkpoints.convert import WRITERS, convert, plan_conversion
from pixart_nb.core.checkpoints.files import open_checkpoint, read_tensors
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor, same_bits
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import CheckpointError, load_tensors, read_json, save_tensors, write_json


@pytest.fixture
def folder(tmp_path):
    """A copy of the reference pipeline."""
    return shutil.copytree(diffusers("sigma")[0], tmp_path / "pipeline", ignore=shutil.ignore_patterns("golden*"))


# ---- variants


def store_as_variant(folder, shards):
    for path in [*folder.glob("*/*.safetensors")]:
        tensors = {name: value.astype(np.float16) for name, value in load_file(path).items()}
        path.unlink()
        if not shards:
            save_file(tensors, path.with_name(f"{path.stem}.fp16.safetensors"))
            continue
        files = [f"{path.stem}.fp16-0000{k + 1}-of-00002.safetensors" for k in range(2)]
        weight_map = {name: files[number % 2] for number, name in enumerate(sorted(tensors))}
        for file in files:
            save_file({n: tensors[n] for n in tensors if weight_map[n] == file}, path.with_name(file))
        write_json(path.with_name(f"{path.stem}.safetensors.index.fp16.json"), {"weight_map": weight_map})


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("options", [{"variant": "fp16"}, {}])
def test_variants_are_read_single_and_in_shards(folder, shards, options):
    names = ("transformer", "text_encoder", "vae")
    expected = load_components(folder, names, ms.float32)
    store_as_variant(folder, shards)
    loaded = load_components(folder, names, ms.float32, **options)
    for name in names:
        for (key, one), (_, other) in zip(
            expected[name].parameters_and_names(), loaded[name].parameters_and_names(), strict=True
        ):
            assert np.array_equal(one.asnumpy().astype(np.float16), other.asnumpy().astype(np.float16)), key
    notes = open_checkpoint(folder / "vae", **options).notes
    assert notes == ([] if options else ["The weights are those of the variant 'fp16'."])


def test_the_requested_variant_is_preferred_and_otherwise_the_plain_file(tmp_path):
    for name, value in (("model", 0), ("model.fp16", 1), ("model.ema", 2)):
        save_tensors(tmp_path / f"{name}.safetensors", {"w": np.full(2, value, np.float32)})
    assert [read_tensors(tmp_path, variant=variant)["w"][0] for variant in (None, "fp16", "ema")] == [0, 1, 2]
    with pytest.warns(UserWarning, match="has no variant 'bf16'; the others are read"):
        assert read_tensors(tmp_path, variant="bf16")["w"][0] == 0


def test_use_safetensors_chooses_the_format(tmp_path):
    save_tensors(tmp_path / "model.safetensors", {"w": np.zeros(2, np.float32)})
    WRITERS[".pth"](tmp_path / "pytorch_model.bin", {"w": LazyTensor.of(np.ones(2, np.float32))})
    assert [read_tensors(tmp_path, use_safetensors=use)["w"][0] for use in (None, True, False)] == [0, 0, 1]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_tensors(tmp_path, use_safetensors=True)


# ---- training states


def training_state(path, config, groups):
    net = load_transformer(official("sigma-256")[0], PixArtConfig(**config))
    tensors = {}
    for number, group in enumerate(groups):
        for name, parameter in net.parameters_and_names():
            if name != "y_embedder.y_embedding":  # which training does not change
                tensors[f"{group}/{name}"] = parameter.asnumpy() + number
    save_tensors(path, tensors, {"identity": json.dumps({"architecture": net.config.to_dict()}), "step": "3"})
    return net


def test_a_training_state_loads_and_converts_with_its_ema_weights(tmp_path):
    state = tmp_path / "step-00000003.safetensors"
    net = training_state(state, official("sigma-256")[1], ("model", "ema", "exp_avg"))
    loaded = load_transformer(state)
    assert loaded.config == net.config
    name = "blocks.1.mlp.fc1.weight"
    plain = dict(net.parameters_and_names())[name].asnumpy()
    assert np.array_equal(dict(loaded.parameters_and_names())[name].asnumpy(), plain + 1)
    plan = plan_conversion(state, tmp_path / "folder")
    assert "A training state: its EMA weights are read." in plan.audit.sentences
    convert(plan)
    assert np.array_equal(
        load_tensors(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")["proj_out.bias"],
        dict(net.parameters_and_names())["final_layer.linear.bias"].asnumpy() + 1,
    )
    training_state(state, official("sigma-256")[1], ("model", "exp_avg"))
    assert np.array_equal(dict(load_transformer(state).parameters_and_names())[name].asnumpy(), plain)


def test_the_state_of_a_lora_training_is_named(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"model/transformer_blocks.0.attn1.to_q.lora_A": np.ones((2, 3), "f4")})
    with pytest.raises(CheckpointError, match=r"state of a LoRA training.*load_lora_weights"):
        load_transformer(tmp_path / "a.safetensors")


# ---- paths


def test_pointers_of_git_lfs_are_named(folder):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    for name, part in (
        ("diffusion_pytorch_model.safetensors", "transformer"),
        ("config.json", "vae"),
        ("spiece.model", "tokenizer"),
    ):
        (folder / part / name).write_bytes(pointer)
        with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            LOADERS[part](folder / part, ms.float32)


def test_a_home_folder_is_understood(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert component_paths("~/pipeline", ["vae"]) == {"vae": folder / "vae"}
    assert load_transformer("~/pipeline/transformer").config.depth == 3
    assert T5EncoderModel.from_pretrained("~/pipeline", subfolder="text_encoder").config.d_model == 24


def test_a_local_path_that_does_not_exist_is_never_looked_up_on_a_hub(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "data" / "tiny-sigma").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("looked up"))
    for path, hint in (
        ("data/tiny-sigm", r"did you mean 'tiny-sigma'\?"),
        ("./pipelin", r"did you mean 'pipeline'\?"),
        ("~/nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("models/PixArt-Sigma.pth", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=hint) as error:
            component_paths(path, ["vae"])
        assert "hub id" not in str(error.value) and "fetched" not in str(error.value)


def test_the_folder_of_a_training_names_its_pipeline(folder):
    output = folder.parent / "output"
    output.mkdir()
    (output / "step-00000003.safetensors").touch()
    folder.rename(output / "pipeline")
    with pytest.raises(CheckpointError, match=r"output is the folder of a training; its result is .*output/pipeline"):
        component_paths(output, ["vae"])
    assert component_paths(output / "pipeline", ["vae"]) == {"vae": output / "pipeline" / "vae"}


def test_a_hub_id_and_its_revision_are_passed_on(folder, monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, source, revision: [])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: calls.append((a, k)) or str(folder))
    assert component_paths("owner/name", ["vae"], revision="v1") == {"vae": folder / "vae"}
    (((source,), options),) = calls
    assert source == "owner/name" and options["revision"] == "v1"
    assert options["allow_patterns"] == ["model_index.json", "vae/*"] and options["ignore_patterns"] == []


PLAIN, HALF, TORCH = (f"vae/diffusion_pytorch_model.{ending}" for ending in ("safetensors", "fp16.safetensors", "bin"))
SHARDS = ["text_encoder/model.safetensors.index.json", "text_encoder/model-00001-of-00001.safetensors"]
TORCH_SHARDS = ["text_encoder/pytorch_model.bin.index.json", "text_encoder/pytorch_model-00001-of-00001.bin"]
FLAX = "text_encoder/flax_model.msgpack"
ON_HUB = ["model_index.json", "vae/config.json", "tokenizer/spiece.model", PLAIN, HALF, TORCH, *SHARDS, *TORCH_SHARDS]


@pytest.mark.parametrize(
    ("options", "unread"),
    [
        ({}, [HALF, TORCH, *TORCH_SHARDS, FLAX]),
        ({"variant": "fp16"}, [PLAIN, TORCH, *TORCH_SHARDS, FLAX]),
        ({"use_safetensors": False}, [PLAIN, HALF, *SHARDS, FLAX]),
        ({"local_files_only": True}, []),
    ],
)
def test_weights_in_formats_that_are_not_read_are_not_fetched(monkeypatch, options, unread):
    def download(source, **arguments):
        assert arguments["ignore_patterns"] == unread
        raise OSError

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, source, revision: [*ON_HUB, FLAX])
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match="could not be fetched"):
        PixArtSigmaPipeline.from_pretrained("owner/name", **options)


def test_a_pipeline_and_a_component_are_not_taken_for_each_other(folder):
    with pytest.raises(CheckpointError, match="is a whole pipeline: give it as the model"):
        load_transformer(folder)
    with pytest.raises(CheckpointError, match="is one component, not a pipeline: give a transformer as the checkpoint"):
        component_paths(folder / "transformer", ["transformer", "vae"])


# ---- damaged bytes


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors", ".pth"])
def test_a_flipped_byte_of_a_written_file_never_loads_as_another_value(tmp_path, ending):
    tensors = open_checkpoint(official("sigma-256")[0]).tensors
    path = tmp_path / f"a{ending}"
    WRITERS[ending](path, tensors)
    content, rng = bytearray(path.read_bytes()), np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(content), 100):
        before, content[position] = content[position], content[position] ^ int(rng.integers(1, 256))
        path.write_bytes(content)
        content[position] = before
        try:
            assert same_bits(open_checkpoint(path).tensors, tensors)
        except CheckpointError:
            refused += 1
    assert refused > 90


def test_components_and_loras_that_are_written_carry_checksums(folder, tmp_path):
    write_transformer(tmp_path, load_transformer(folder / "transformer"))
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_transformer(tmp_path)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_tensors(path)


# ---- numbers of configurations

RATIO = {"sampling": "conv", "scale_factor": 10**9, "kv_compress_layer": [0]}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("transformer", {"num_layers": 2**63}, "num_layers is .*expected a whole number"),
        ("transformer", {"num_layers": 10_000}, "depth is 10000; expected a whole number from 1 to 1000"),
        ("transformer", {"num_layers": "3"}, "num_layers is '3'"),
        ("transformer", {"num_layers": None}, "num_layers is None"),
        ("transformer", {"num_layers": True}, "num_layers is True"),
        ("transformer", {"attention_head_dim": 1e300}, "attention_head_dim is 1e\\+300"),
        ("transformer", {"sample_size": [16]}, "is no PixArt transformer's"),
        ("transformer", {"interpolation_scale": 0}, "pe_interpolation is 0"),
        ("transformer", {"use_additional_conditions": "no"}, "expected true or false"),
        ("transformer", {"norm_eps": 1e-5}, "norm_eps is '1e-05'; this kit only implements 1e-06"),
        ("transformer", {"attention_bias": False}, "attention_bias is 'False'; this kit only implements True"),
        ("transformer", {"cross_attention_dim": 12}, "cross_attention_dim is '12'"),
        ("transformer", {"patch_size": []}, "patch_size is \\[\\]; expected a whole number"),
        ("transformer", {"out_channels": 5}, "out_channels is 5; expected in_channels or twice as many"),
        ("transformer", {"kv_compress_config": RATIO}, "scale_factor is 1000000000"),
        ("transformer", {"kv_compress_config": [1]}, "expected a mapping"),
        ("vae", {"layers_per_block": 10**6}, "layers_per_block is 1000000; expected a whole number from 1 to 64"),
        ("vae", {"act_fn": "relu"}, "act_fn is 'relu'"),
        ("vae", {"block_out_channels": 32}, "block_out_channels is 32; expected whole numbers"),
        ("vae", {"sample_size": [None, None]}, "sample_size is .*expected a whole number"),
        ("text_encoder", {"num_layers": 10**9}, "num_layers is 1000000000; expected a whole number from 0 to 1000"),
        ("text_encoder", {"d_ff": 10**400}, "d_ff is 1000.*expected a whole number"),
        ("text_encoder", {"feed_forward_proj": "relu"}, "feed_forward_proj is 'relu'"),
        ("scheduler", {"num_train_timesteps": [1]}, "scheduler_config.json"),
        ("tokenizer", {"extra_ids": True}, "extra_ids is True; expected a whole number"),
        ("tokenizer", {"extra_ids": 10**9}, "extra_ids is 1000000000"),
        ("tokenizer", {"unk_token": ""}, "unk_token is ''; a T5 tokenizer has '<unk>'"),
        ("tokenizer", {"pad_token": None}, "pad_token is None"),
    ],
)
def test_wrong_values_of_a_configuration_are_named_before_anything_is_built(folder, name, change, message):
    prefix = {"scheduler": "scheduler_", "tokenizer": "tokenizer_"}.get(name, "")
    path = folder / name / f"{prefix}config.json"
    write_json(path, read_json(path) | change)
    with pytest.raises(PixArtNBError, match=message):
        LOADERS[name](folder / name, ms.float32)


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch):
    opened = Path.open

    def forbidden(path, *arguments, **options):
        if path.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read \(Permission denied\)"):
        LOADERS["vae"](folder / "vae", ms.float32)
