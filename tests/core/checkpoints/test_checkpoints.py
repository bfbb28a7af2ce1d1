"""Checkpoints: read without PyTorch, matched by name and shape, written in the diffusers layout."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from reference_data import OFFICIAL, diffusers, official

from pixart_nb.core import PixArtConfig, load_transformer
from pixart_nb.core.checkpoints import components
from pixart_nb.core.checkpoints.files import read_tensors
from pixart_nb.core.io import CheckpointError, load_tensors, save_tensors


def test_a_missing_checkpoint_is_named():
    with pytest.raises(CheckpointError, match="does not exist"):
        load_transformer("no/such.pth")


def test_a_truncated_safetensors_file_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"w": np.zeros(100, np.float32)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"a\.safetensors \(200 bytes\)"):
        load_tensors(path)


def test_a_checkpoint_of_another_size_contradicts_the_configuration():
    path, config, _ = official("sigma-256")
    with pytest.raises(CheckpointError, match="shows depth = 4, but the configuration says 28"):
        load_transformer(path, PixArtConfig(**config | {"depth": 28}))
    with pytest.raises(CheckpointError, match="shows hidden_size = 24"):
        load_transformer(path, PixArtConfig(**config | {"hidden_size": 48}))


@pytest.mark.parametrize("case", OFFICIAL)
def test_what_the_configuration_leaves_open_is_read_from_the_checkpoint(case, tmp_path):
    path, config, _ = official(case)
    path = shutil.copy(path, tmp_path)  # without the config.json beside it
    told = {"num_heads": config["num_heads"]}
    compression = config.get("kv_compress_config")
    if compression and compression["sampling"] != "conv":
        told["kv_compress_config"] = compression  # picking tokens leaves no trace in the weights
    read = load_transformer(path, PixArtConfig(**told)).config
    expected = PixArtConfig(**config)
    assert read == replace(expected, class_name="PixArtMS")  # the class leaves no trace either


def test_a_diffusers_folder_written_is_read_back_the_same(tmp_path):
    folder, _, _ = diffusers("sigma")
    net = load_transformer(folder / "transformer")
    components.write_transformer(tmp_path, net)
    again = load_transformer(tmp_path)
    assert again.config == net.config
    theirs = load_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    ours = load_tensors(tmp_path / "diffusion_pytorch_model.safetensors")
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_shards_are_joined_and_a_missing_one_is_named(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
    save_tensors(tmp_path / "b.safetensors", {"y": np.zeros(3, np.float32)})
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    assert {name: t.shape for name, t in read_tensors(tmp_path).items()} == {"x": (2,), "y": (3,)}
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks \['b.safetensors'\]"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"x": "/etc/passwd"}}', "/etc/passwd"),
        ('{"weight_map": {"x": ".."}}', r"names \['..'\]; expected names of checkpoint files inside"),
        ('{"weight_map": {"x": "m.safetensors.index.json"}}', "expected names of checkpoint files"),
        ('{"weight_map": {"x": 3}}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('["x"]', "holds a list; expected an object"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"weight_map": {"x": "a.safetensors", "z": "a.safetensors"}}', "places z in a.safetensors, which does not"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, index, message):
    save_tensors(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
    (tmp_path / "m.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        read_tensors(tmp_path)


def test_only_the_shards_that_are_wanted_are_opened(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
    (tmp_path / "b.safetensors").write_text("damaged")
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    assert list(read_tensors(tmp_path, keep=lambda name: name == "x")) == ["x"]
