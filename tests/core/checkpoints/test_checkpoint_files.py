"""MindSpore's files and tensors as they lie in files: every bit is kept, and what is wrong is named."""

import json
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from reference_data import official

from pixart_nb.core import io as store
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import lazy_tensor as stored_tensors
from pixart_nb.core.checkpoints import mindspore_file
from pixart_nb.core.checkpoints.convert import WRITERS
from pixart_nb.core.checkpoints.files import open_checkpoint, read_tensors, write_safetensors
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor, bf16_to_fp32, fp32_to_bf16, same_bits, stacked
from pixart_nb.core.checkpoints.mindspore_file import open_mindspore, write_mindspore
from pixart_nb.core.checkpoints.torch_file import write_torch as write_pth
from pixart_nb.core.io import CheckpointError, load_tensors


def test_what_mindspore_writes_is_read_and_what_is_written_mindspore_reads(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.standard_normal((3, 4)).astype(np.float32),
        "half": rng.standard_normal(5).astype(np.float16),
        "number": np.array(2.5, np.float32),
        "ids": np.arange(4),
        "mask": np.array([True, False]),
    }
    data = [{"name": name, "data": ms.Tensor(value)} for name, value in arrays.items()]
    data.append({"name": "bf", "data": ms.Tensor(arrays["half"]).astype(ms.bfloat16)})
    ms.save_checkpoint(data, str(tmp_path / "a.ckpt"), append_dict={"note": "words", "epoch": 3}, crc_check=True)
    tensors, others = open_mindspore(tmp_path / "a.ckpt")
    assert others == ["note"]
    assert tensors["bf"].dtype == "BF16"
    assert all(np.array_equal(np.asarray(tensors[name]), value) for name, value in arrays.items())
    write_mindspore(tmp_path / "b.ckpt", tensors)
    back = ms.load_checkpoint(str(tmp_path / "b.ckpt"))
    assert back["bf"].dtype == ms.bfloat16
    assert all(np.array_equal(back[name].asnumpy(), value) for name, value in arrays.items())
    assert back["number"].shape == ()


def test_large_tensors_lie_in_slices_as_mindspore_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore_file, "_SLICE", 40)
    values = np.arange(35, dtype=np.float32).reshape(7, 5)
    write_mindspore(tmp_path / "a.ckpt", {"w": LazyTensor.of(values), "v": LazyTensor.of(values[:1])})
    assert (tmp_path / "a.ckpt").read_bytes().count(b"Float32") == 5
    assert np.array_equal(np.asarray(open_mindspore(tmp_path / "a.ckpt")[0]["w"]), values)
    assert np.array_equal(ms.load_checkpoint(str(tmp_path / "a.ckpt"))["w"].asnumpy(), values)


def test_a_ckpt_file_that_does_not_match_its_checksum_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    ms.save_checkpoint([{"name": "w", "data": ms.Tensor(np.ones(9, np.float32))}], str(path), crc_check=True)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes().replace(b"\x80?", b"\x80@", 1))
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        open_mindspore(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no tensors"),
        (b"\x0a\xff\xff\xff\xff\x7f", "34359738367 bytes are announced"),
        (b"\x0a" + b"\xff" * 12, "a number is too long"),
        (b"\x0a\x00", "without a name"),
        (b"\x12\x00", "unknown field 2"),
        (b"\x0a\x05\x0a\x01\xff\x12\x00", "a name is too long or no text"),
    ],
)
def test_a_file_that_is_no_mindspore_checkpoint_is_named(tmp_path, content, message):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.ckpt .*{message}"):
        read_tensors(tmp_path / "a.ckpt")


def test_stored_tensors_are_split_stacked_and_cut_without_being_read():
    values = np.arange(24, dtype=np.float32).reshape(6, 4)
    stored = LazyTensor.of(values, "w")
    parts = stored.split(3)
    assert [part.shape for part in parts] == [(2, 4)] * 3
    whole = stacked(parts)
    assert np.array_equal(np.asarray(whole), values)
    assert np.array_equal(np.asarray(whole.rows(1, 5)), values[1:5])
    assert np.array_equal(np.asarray(stacked([whole.rows(5, 6), stored])), np.concatenate([values[5:], values]))
    assert np.shares_memory(whole.rows(1, 5).parts[0], values)
    with pytest.raises(CheckpointError, match="expected 4 equal parts"):
        stored.split(4)
    with pytest.raises(CheckpointError, match="cannot stack"):
        stacked([stored, stored.astype("F16")])


def test_chunks_are_bounded_whatever_the_strides(monkeypatch):
    monkeypatch.setattr(stored_tensors, "CHUNK", 10)
    values = np.arange(60, dtype=np.float32).reshape(12, 5)
    for array in (values, values.T, values[::2], np.float32(3)[...], values[:0]):
        chunks = list(LazyTensor("F32", (np.asarray(array),)).chunks())
        assert all(chunk.size <= 12 for chunk in chunks)
        assert np.array_equal(np.concatenate([*chunks, []]), np.asarray(array).ravel())


def test_the_same_bits_are_the_same_however_they_lie(monkeypatch):
    monkeypatch.setattr(stored_tensors, "CHUNK", 7)
    values = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    whole = LazyTensor.of(values, "w")
    cut = stacked(whole.split(3))
    turned = LazyTensor("F32", (np.asfortranarray(values),))
    assert same_bits({"w": whole}, {"w": cut})
    assert same_bits({"w": turned}, {"w": cut})
    other = values.copy()
    other[5, 4] = np.nextafter(other[5, 4], np.float32(9))
    for wrong in (LazyTensor.of(other), LazyTensor.of(values.T), LazyTensor.of(values.astype(np.float64))):
        assert not same_bits({"w": whole}, {"w": wrong})
    assert not same_bits({"w": whole}, {"v": whole})


def test_bfloat16_is_rounded_as_mindspore_rounds_it_and_widened_exactly():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    theirs = ms.Tensor(values).astype(ms.bfloat16).astype(ms.float32).asnumpy()
    assert np.array_equal(bf16_to_fp32(fp32_to_bf16(values)), theirs, equal_nan=True)
    bits = np.arange(2**16, dtype=np.uint16)
    finite = np.isfinite(bf16_to_fp32(bits))
    assert np.array_equal(fp32_to_bf16(bf16_to_fp32(bits))[finite], bits[finite])


def test_a_number_that_does_not_fit_the_new_dtype_is_an_error_that_names_its_tensor():
    stored = LazyTensor.of(np.array([1.0, 70000.0], np.float32), "blocks.0.w").astype("F16")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.w: values up to 7e\+04 do not fit F16"):
        list(stored.chunks())
    infinite = LazyTensor.of(np.array([np.inf, np.nan], np.float32)).astype("F16")
    assert np.array_equal(np.asarray(infinite), [np.inf, np.nan], equal_nan=True)


@pytest.mark.parametrize("ending", [".safetensors", ".ckpt", ".pth"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_every_writer_keeps_every_bit(tmp_path, ending, kind):
    path, _, _ = official("sigma-ms-kvconv4-qknorm")
    tensors = {name: tensor.astype(kind) for name, tensor in open_checkpoint(path).tensors.items()}
    WRITERS[ending](tmp_path / f"a{ending}", tensors)
    back = open_checkpoint(tmp_path / f"a{ending}").tensors
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (kind, tensor.shape)
        assert bits(back[name]) == bits(tensor)


def bits(tensor):
    return b"".join(chunk.tobytes() for chunk in tensor.chunks())


def test_written_safetensors_are_what_the_library_reads(tmp_path):
    arrays = {"a": np.ones((2, 3), np.float16), "b": np.arange(3.0), "c": np.array(1, np.int8)}
    write_safetensors(tmp_path / "a.safetensors", {name: LazyTensor.of(value) for name, value in arrays.items()})
    read = load_tensors(tmp_path / "a.safetensors")
    assert all(np.array_equal(read[name], value) for name, value in arrays.items())
    assert store.load_metadata(tmp_path / "a.safetensors") == {"format": "pt"}


def test_written_pth_files_have_torchs_members_aligned(tmp_path):
    tensors = {"w": LazyTensor.of(np.ones((3, 5), np.float32)), "v": LazyTensor.of(np.arange(7.0))}
    write_pth(tmp_path / "a.pth", tensors)
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [
            f"archive/{name}" for name in ("data.pkl", "byteorder", "data/0", "data/1", "version")
        ]
        names = [op.name for op, _, _ in pickletools.genops(archive.read("archive/data.pkl"))]
    assert names.count("REDUCE") == 1 + 2 * 2
    read = open_checkpoint(tmp_path / "a.pth").tensors
    assert [read[name].parts[0].ctypes.data % 64 for name in tensors] == [0, 0]


def test_a_dtype_that_a_format_lacks_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot hold w \(U16\)"):
        write_pth(tmp_path / "a.pth", {"w": LazyTensor.of(np.ones(3, np.uint16))})
    with pytest.raises(CheckpointError, match="dtype complex64"):
        LazyTensor.of(np.ones(3, np.complex64), "w")


@pytest.mark.slow
def test_mutated_files_of_every_form_are_refused_by_name_or_load():
    """Run in a process of its own, so that a crash, a hang or memory shows."""
    script = Path(__file__).parents[3] / "benchmarks" / "mutated_files.py"
    command = [sys.executable, str(script), "--count", "25"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, [row for row in rows if row["failed"]] or run.stderr[-2000:]
    assert len(rows) == 17 and all(row["loaded"] + row["refused"] == 25 for row in rows)
    assert all(row["refused"] > 2 and row["slowest s"] < 10 and row["MB"] < 200 for row in rows), rows
