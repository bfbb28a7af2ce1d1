"""Checkpoints: read without PyTorch, matched by name and shape, written whole or not at all."""

import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from reference_data import OFFICIAL, diffusers, official

from pixart_nb.core import PixArtConfig, load_transformer
from pixart_nb.core.checkpoints import components, key_maps
from pixart_nb.core.checkpoints.load import read_tensors
from pixart_nb.core.checkpoints.store import CheckpointError, load_tensors, save_tensors, written_beside
from pixart_nb.core.checkpoints.torch_reader import read_torch, state_dict
from pixart_nb.core.models.transformer import PixArt


class Storage:
    """Pickles as torch pickles a storage: by a persistent id."""

    def __init__(self, key, kind, count):
        self.key, self.kind, self.count = key, kind, count


class Global:
    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as ``function(*args)``."""

    def __init__(self, function, *args):
        self.function, self.args = function, args


class TorchPickler(pickle._Pickler):
    """Writes what torch.save writes, without torch."""

    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", Global("torch", obj.kind), obj.key, "cpu", obj.count)
        return None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def tensor(key, kind, count, size, stride, offset=0):
    storage = Storage(key, kind, count)
    return Call(
        Global("torch._utils", "_rebuild_tensor_v2"), storage, offset, size, stride, False, OrderedDict()
    )


def write_torch(path, content, storages, prefix="archive"):
    buffer = io.BytesIO()
    TorchPickler(buffer, 2).dump(content)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{prefix}/data.pkl", buffer.getvalue())
        for key, values in storages.items():
            archive.writestr(f"{prefix}/data/{key}", values.tobytes())
    return path


def test_tensors_are_rebuilt_strided_shared_and_in_every_dtype(tmp_path):
    floats = np.arange(12, dtype=np.float32)
    halves = np.linspace(-2, 2, 5).astype(np.float16)
    bfloats = (np.array([1.5, -2.25], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    content = OrderedDict(
        whole=tensor("0", "FloatStorage", 12, (3, 4), (4, 1)),
        transposed=tensor("0", "FloatStorage", 12, (4, 3), (1, 4)),
        part=tensor("0", "FloatStorage", 12, (2, 2), (4, 1), offset=5),
        half=tensor("1", "HalfStorage", 5, (5,), (1,)),
        bfloat=tensor("2", "BFloat16Storage", 2, (2,), (1,)),
        scalar=tensor("0", "FloatStorage", 12, (), (), offset=7),
    )
    read = read_torch(write_torch(tmp_path / "a.pth", content, {"0": floats, "1": halves, "2": bfloats}))
    grid = floats.reshape(3, 4)
    assert np.array_equal(read["whole"], grid)
    assert np.array_equal(read["transposed"], grid.T)
    assert np.array_equal(read["part"], [[5, 6], [9, 10]])
    assert read["half"].dtype == np.float16
    assert np.array_equal(read["half"], halves)
    assert np.array_equal(read["bfloat"], [1.5, -2.25])
    assert read["scalar"] == 7


def test_ema_weights_are_preferred_and_prefixes_removed(tmp_path):
    one = tensor("0", "FloatStorage", 2, (2,), (1,))
    two = tensor("1", "FloatStorage", 2, (2,), (1,))
    content = {"epoch": 3, "state_dict": {"module.w": one}, "state_dict_ema": {"module.w": two}}
    storages = {"0": np.zeros(2, np.float32), "1": np.ones(2, np.float32)}
    read = state_dict(read_torch(write_torch(tmp_path / "a.pth", content, storages)))
    assert list(read) == ["w"]
    assert np.array_equal(read["w"], [1, 1])


@pytest.mark.parametrize(
    "module", [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("torch", "load")]
)
def test_a_pickle_that_would_run_a_command_is_refused_and_did_not_run(tmp_path, module):
    proof = tmp_path / "ran"
    content = {"w": Call(Global(*module), f"touch {proof}")}
    with pytest.raises(CheckpointError, match=rf"{module[0]}\.{module[1]}.*nothing was run"):
        read_torch(write_torch(tmp_path / "evil.pth", content, {}))
    assert not proof.exists()


@pytest.mark.parametrize(
    "bad",
    [
        tensor("0", "FloatStorage", 4, (5,), (1,)),
        tensor("0", "FloatStorage", 4, (2,), (1,), offset=3),
        tensor("0", "FloatStorage", 4, (2, 2), (3, 1)),
        tensor("0", "FloatStorage", 4, (10**9, 10**9), (0, 0)),
        tensor("0", "FloatStorage", 4, (-1,), (1,)),
        tensor("0", "FloatStorage", 9, (4,), (1,)),
        tensor("7", "FloatStorage", 4, (4,), (1,)),
    ],
)
def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path, bad):
    with pytest.raises(CheckpointError):
        read_torch(write_torch(tmp_path / "bad.pth", {"w": bad}, {"0": np.zeros(4, np.float32)}))


def test_damaged_files_give_an_error_or_a_right_load_and_never_crash(tmp_path):
    path, _, _ = official("sigma-256")
    whole, original = path.read_bytes(), state_dict(read_torch(path))
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged.pth"
    errors = 0
    for _ in range(150):
        content = bytearray(whole)
        if rng.random() < 0.3:
            content = content[: rng.integers(0, len(content))]
        else:
            for place in rng.integers(0, len(content), 3):
                content[place] ^= int(rng.integers(1, 256))
        damaged.write_bytes(content)
        try:
            read = state_dict(read_torch(damaged))
        except CheckpointError:
            errors += 1
            continue
        same = [name for name in read if name in original and np.array_equal(read[name], original[name])]
        assert len(same) >= len(original) - 4
    assert errors > 50


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
def test_what_the_configuration_leaves_open_is_read_from_the_checkpoint(case):
    path, config, _ = official(case)
    told = {"num_heads": config["num_heads"], "input_size": config["input_size"]}
    compression = config.get("kv_compress_config")
    if compression and compression["sampling"] != "conv":
        told["kv_compress_config"] = compression  # picking tokens leaves no trace in the weights
    read = load_transformer(path, PixArtConfig(**told)).config
    expected = PixArtConfig(**config)
    assert read == replace(expected, class_name="PixArtMS", pe_interpolation=1.0)


def test_diffusers_names_round_trip_bit_for_bit():
    for case in OFFICIAL:
        path, _, _ = official(case)
        tensors = {
            k: v for k, v in read_tensors(path).items() if k not in ("pos_embed", "y_embedder.y_embedding")
        }
        back = key_maps.to_official(key_maps.to_diffusers(tensors))
        assert set(back) == set(tensors)
        assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_names_map_without_weights():
    assert key_maps.diffusers_names("blocks.7.attn.qkv.bias") == tuple(
        f"transformer_blocks.7.attn1.to_{part}.bias" for part in "qkv"
    )
    assert key_maps.official_name("transformer_blocks.7.attn2.to_v.weight") == (
        "blocks.7.cross_attn.kv_linear.weight",
        1,
    )
    assert key_maps.official_name("nothing.weight") is None
    net = PixArt(
        PixArtConfig(
            hidden_size=12, num_heads=2, depth=1, caption_channels=4, micro_condition=True, qk_norm=True
        )
    )
    for name, _ in net.parameters_and_names():
        if name not in key_maps.OFFICIAL_ONLY:
            for place, other in enumerate(key_maps.diffusers_names(name)):
                assert key_maps.official_name(other) == (name, place)


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


def test_an_index_that_points_outside_the_folder_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match="secret"):
        read_tensors(tmp_path)


def test_shards_are_joined_and_a_missing_one_is_named(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": np.ones(2, np.float32)})
    save_tensors(tmp_path / "b.safetensors", {"y": np.zeros(3, np.float32)})
    (tmp_path / "m.safetensors.index.json").write_text(
        '{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}'
    )
    assert {name: t.shape for name, t in read_tensors(tmp_path).items()} == {"x": (2,), "y": (3,)}
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks \['b.safetensors'\]"):
        read_tensors(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def failing_write():
        with written_beside(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        failing_write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_reader_looks_up_no_name_of_the_pickle():
    """The fixtures of this file are honest: they contain the opcodes that a loader would act on."""
    buffer = io.BytesIO()
    TorchPickler(buffer, 2).dump(Call(Global("os", "system"), "true"))
    names = [op.name for op, _, _ in pickletools.genops(buffer.getvalue())]
    assert {"GLOBAL", "REDUCE"} <= set(names)
