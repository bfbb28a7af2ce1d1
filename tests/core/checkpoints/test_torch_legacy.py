"""The torch format of before version 1.6: read as the newer one is, and refused as it is."""

import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from reference_data import official
from torch_files import Call, Global, LegacyStorage, TorchPickler, as_saved, tensor, write_legacy, write_pickle

from pixart_nb.core.checkpoints.files import open_checkpoint, read_tensors
from pixart_nb.core.checkpoints.lazy_tensor import mapping_of
from pixart_nb.core.checkpoints.torch_file import read_torch
from pixart_nb.core.io import CheckpointError


def test_files_of_big_endian_machines_are_refused(tmp_path):
    path = write_pickle(tmp_path / "a.pth", pickle.dumps({}, 2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(CheckpointError, match="little-endian"):
        read_torch(path)
    with pytest.raises(CheckpointError, match="little-endian"):
        read_torch(write_legacy(tmp_path / "b.pth", {}, {}, machine={"little_endian": False}))


def test_the_old_format_begins_as_documented(tmp_path):
    start = write_legacy(tmp_path / "a.pth", {}, {}).read_bytes()
    assert start.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.")
    assert read_torch(tmp_path / "a.pth") == {}


def test_the_old_format_has_strided_shared_and_partly_seen_storages(tmp_path):
    floats = np.arange(12, dtype=np.float32)
    bits = (np.array([1.5, -2.25], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    seen = LegacyStorage("10", "FloatStorage", 12, ("77", 4, 6))
    oldest = Global("torch._utils", "_rebuild_tensor")
    content = OrderedDict(
        whole=tensor("10", "FloatStorage", 12, (3, 4), (4, 1)),
        transposed=tensor("10", "FloatStorage", 12, (4, 3), (1, 4)),
        part=Call(oldest, seen, 1, (2, 2), (3, 1)),
        bfloat=tensor("9", "BFloat16Storage", 2, (2,), (1,)),
        scalar=tensor("10", "FloatStorage", 12, (), (), offset=7),
    )
    path = write_legacy(tmp_path / "a.pth", content, {"10": floats, "9": bits})
    read = read_tensors(path)
    assert np.array_equal(read["whole"], floats.reshape(3, 4))
    assert np.array_equal(read["transposed"], floats.reshape(3, 4).T)
    assert np.array_equal(read["part"], [[5, 6], [8, 9]])
    assert np.array_equal(read["bfloat"], [1.5, -2.25])
    assert read["scalar"] == 7
    stored = open_checkpoint(path).tensors
    assert mapping_of(stored["whole"].parts[0]) is mapping_of(stored["part"].parts[0]) is not None
    assert stored["bfloat"].dtype == "BF16"


def test_an_official_checkpoint_is_the_same_in_the_old_format(tmp_path):
    tensors = read_tensors(official("sigma-ms-kvconv2")[0])
    named, storages = as_saved(tensors, "module.")
    path = write_legacy(tmp_path / "old.pth", {"state_dict": named, "epoch": 3}, storages)
    read = read_tensors(path)
    assert list(read) == list(tensors)
    assert all(np.array_equal(read[name], tensors[name]) for name in tensors)


def test_the_header_of_an_old_file_runs_nothing(tmp_path):
    buffer = io.BytesIO()
    TorchPickler(buffer, 2).dump({"w": Call(Global("os", "system"), f"touch {tmp_path / 'ran'}")})
    start = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    (tmp_path / "a.pth").write_bytes(start + buffer.getvalue())
    with pytest.raises(CheckpointError, match=r"os\.system.*nothing was run"):
        read_torch(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("missing", [1, 20, 47, 60])
def test_an_old_file_cut_short_is_named_with_its_size(tmp_path, missing):
    content = {"w": tensor("0", "FloatStorage", 10, (10,), (1,))}
    path = write_legacy(tmp_path / "cut.pth", content, {"0": np.zeros(10, np.float32)})
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(CheckpointError, match=r"cut\.pth .*(truncated|damaged)"):
        read_torch(path)


def test_old_files_with_wrong_counts_names_and_views_are_refused(tmp_path):
    zeros = np.zeros(4, np.float32)
    w = tensor("0", "FloatStorage", 4, (4,), (1,))
    wrong = {
        "a storage has 4000000000 numbers": ({"w": tensor("0", "FloatStorage", 4 * 10**9, (4,), (1,))}, {"0": zeros}),
        "list of storages": ({"w": w}, {"1": zeros}),
        "has not 4 numbers": ({"w": w}, {"0": zeros[:3]}),
        "cannot be understood": ({"w": LegacyStorage("0", "FloatStorage", 4, ("7", 3, 2))}, {"0": zeros}),
        "of F16": ({"v": tensor("0", "HalfStorage", 4, (4,), (1,)), "w": w}, {"0": zeros}),
    }
    for message, (content, storages) in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            read_torch(write_legacy(tmp_path / "a.pth", content, storages))
