"""The torch reader survives hostile and damaged files, and takes no memory that it does not need."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from reference_data import OFFICIAL, official
from test_checkpoints import Call, Global, tensor, write_torch

from pixart_nb.core.checkpoints.torch_reader import CheckpointError, read_torch, state_dict

NAMES = ["Float", "Double", "Half", "Long", "Int", "Short", "Char", "Byte", "Bool"]
DTYPES = ["f4", "f8", "f2", "i8", "i4", "i2", "i1", "u1", "?"]


def write_pickle(path, content: bytes, storages=None):
    """A torch file with these bytes as its pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        for name, values in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", values)
    return path


@pytest.mark.parametrize("case", OFFICIAL)
def test_official_checkpoints_are_read_whole_and_finite(case):
    tensors = state_dict(read_torch(official(case)[0]))
    assert {"x_embedder.proj.weight", "final_layer.linear.bias"} <= set(tensors)
    assert all(np.isfinite(value).all() for value in tensors.values())


@pytest.mark.parametrize(("name", "dtype"), list(zip(NAMES, DTYPES, strict=True)))
def test_every_kind_of_storage_keeps_its_dtype_and_values(tmp_path, name, dtype):
    values = np.array([0, 1, 0, 1, 1]).astype(dtype)
    content = {"w": tensor("0", f"{name}Storage", 5, (5,), (1,))}
    read = read_torch(write_torch(tmp_path / "a.pth", content, {"0": values}))["w"]
    assert read.dtype == values.dtype
    assert np.array_equal(read, values)


def test_every_bfloat16_becomes_the_float32_of_the_same_value(tmp_path):
    bits = np.arange(2**16, dtype=np.uint16)
    content = {"w": tensor("0", "BFloat16Storage", 2**16, (2**16,), (1,))}
    read = read_torch(write_torch(tmp_path / "a.pth", content, {"0": bits}))["w"]
    assert read.dtype == np.float32
    assert np.array_equal(read.view(np.uint32) >> 16, bits)
    assert not (read.view(np.uint32) & 0xFFFF).any()


def test_parameters_and_nested_containers_are_rebuilt(tmp_path):
    weight = tensor("0", "FloatStorage", 2, (2,), (1,))
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), weight, True, OrderedDict())
    content = {
        "optimizer": [{"lr": 0.1, "betas": (0.9, 0.999)}],
        "state_dict": {"w": parameter},
        "none": None,
    }
    read = read_torch(write_torch(tmp_path / "a.pth", content, {"0": np.array([1, 2], np.float32)}))
    assert read["optimizer"] == [{"lr": 0.1, "betas": (0.9, 0.999)}]
    assert read["none"] is None
    assert np.array_equal(read["state_dict"]["w"], [1, 2])


def test_weights_are_mapped_and_cannot_be_written_through():
    weight = state_dict(read_torch(official("sigma-256")[0]))["x_embedder.proj.weight"]
    assert not weight.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        weight[0] = 0


def test_a_storage_that_was_changed_fails_its_checksum(tmp_path):
    values = np.arange(100, dtype=np.float32)
    content = {"w": tensor("0", "FloatStorage", 100, (100,), (1,))}
    path = write_torch(tmp_path / "a.pth", content, {"0": values})
    whole = path.read_bytes()
    place = whole.index(values.tobytes()) + 40
    path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
    with pytest.raises(CheckpointError, match="archive/data/0 does not match its checksum"):
        read_torch(path)


def test_a_compressed_storage_is_refused(tmp_path):
    path = write_torch(tmp_path / "a.pth", {"w": tensor("0", "FloatStorage", 4, (4,), (1,))}, {})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", np.zeros(4, np.float32).tobytes())
    with pytest.raises(CheckpointError, match="expected 16, stored"):
        read_torch(path)


def test_a_huge_memo_index_takes_no_memory(tmp_path):
    # The unpickler in C would allocate 2 ** 32 entries for this, which is more memory than most machines have.
    program = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.LONG_BINPUT + struct.pack("<I", 2**31)
    assert read_torch(write_pickle(tmp_path / "a.pth", program + pickle.STOP)) == {}


def test_attributes_may_be_set_on_no_object_but_torchs_dictionary(tmp_path):
    def built(target: bytes) -> bytes:
        return pickle.PROTO + b"\x02" + target + pickle.EMPTY_DICT + pickle.BUILD + pickle.STOP

    dictionary = pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE + pickle.REDUCE
    assert read_torch(write_pickle(tmp_path / "a.pth", built(dictionary))) == {}
    function = pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n"
    with pytest.raises(CheckpointError, match="sets attributes of a function"):
        read_torch(write_pickle(tmp_path / "b.pth", built(function)))


def test_the_format_before_zip_is_named(tmp_path):
    magic = io.BytesIO()
    pickle.dump(0x1950A86A20F9469CFC6C, magic, 2)
    (tmp_path / "old.pth").write_bytes(magic.getvalue() + bytes(100))
    with pytest.raises(CheckpointError, match=r"before version 1\.6.*save it again"):
        read_torch(tmp_path / "old.pth")


@pytest.mark.parametrize("length", [0, 1, 20, 5000])
def test_a_file_cut_short_is_named_with_its_size(tmp_path, length):
    path = tmp_path / "cut.pth"
    path.write_bytes(official("sigma-256")[0].read_bytes()[:length])
    with pytest.raises(CheckpointError, match=rf"cut\.pth \({length} bytes\) is truncated"):
        read_torch(path)


def test_pickles_with_changed_bytes_load_or_are_refused_and_raise_nothing_else(tmp_path):
    with zipfile.ZipFile(official("sigma-256")[0]) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if "/data/" in name}
        program = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    storages = {name.rsplit("/", 1)[1]: values for name, values in members.items()}
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(program)
        for place in rng.integers(0, len(changed), rng.integers(1, 4)):
            changed[place] = rng.integers(256)
        try:
            state_dict(read_torch(write_pickle(tmp_path / "a.pth", bytes(changed), storages)))
        except CheckpointError:
            refused += 1
    assert refused > 100
