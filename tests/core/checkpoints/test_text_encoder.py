"""T5 in little memory: eight bits, streamed layers. The numbers stay what they were, or close and measured."""

import json

import numpy as np
import pytest
from reference_data import diffusers, relative_error

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import T5EncoderModel, write_text_encoder
from pixart_nb.core.checkpoints.load import StreamedT5Encoder, load_t5
from pixart_nb.core.io import CheckpointError, load_tensors, save_tensors
from pixart_nb.core.models.low_precision import NF4, BFloat16Linear, Int8Linear, NF4Linear, quantize, unsupported
from pixart_nb.core.models.t5 import T5Config, T5Encoder

PIPELINE, CALL, GOLDEN = diffusers("sigma")
FOLDER = PIPELINE / "text_encoder"
IDS, MASK = GOLDEN["input_ids"], GOLDEN["prompt_mask"].astype(bool)


def bytes_of(net):
    return sum(p.asnumpy().nbytes for p in net.get_parameters())


def sharded(folder, names_per_shard=5):
    """The reference's encoder in several files with an index, as large ones are published."""
    folder.mkdir()
    tensors = load_tensors(FOLDER / "model.safetensors")
    names, places = sorted(tensors), {}
    for number, start in enumerate(range(0, len(names), names_per_shard)):
        file = f"model-{number:05d}.safetensors"
        save_tensors(folder / file, {name: tensors[name] for name in names[start : start + names_per_shard]})
        places |= dict.fromkeys(names[start : start + names_per_shard], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text((FOLDER / "config.json").read_text())
    return folder


def test_streamed_layers_give_the_same_embeddings(tmp_path):
    whole = load_t5(FOLDER, ms.float32)(IDS, MASK).asnumpy()
    assert relative_error(whole, GOLDEN["prompt_embeds"]) < 1e-4
    assert np.array_equal(StreamedT5Encoder(FOLDER, ms.float32)(IDS, MASK).asnumpy(), whole)
    assert np.array_equal(StreamedT5Encoder(sharded(tmp_path / "t5"), ms.float32)(IDS, MASK).asnumpy(), whole)


def test_a_streamed_encoder_can_be_used_again_and_in_half_precision():
    streamed = T5EncoderModel.from_pretrained(FOLDER, mindspore_dtype=ms.float16, stream=True)
    first, again = (streamed(IDS, MASK) for _ in range(2))
    assert first.dtype == ms.float32  # of the sums of bfloat16 products
    assert np.array_equal(first.asnumpy(), again.asnumpy())
    assert np.array_equal(first.asnumpy(), load_t5(FOLDER, ms.float16)(IDS, MASK).asnumpy())


@pytest.mark.skipif(bool(unsupported()), reason=unsupported())
def test_an_encoder_in_blocks_gives_the_same_embeddings_and_is_written_in_order(tmp_path):
    net = T5Encoder(T5Config(vocab_size=64, d_model=128, d_kv=32, d_ff=192, num_heads=4, num_layers=3))
    net.initialize(np.random.default_rng(0))
    write_text_encoder(tmp_path / "t5", net)
    net = load_t5(tmp_path / "t5", ms.bfloat16)
    assert {tuple(p.shape) for p in net.encoder.block[0].layer[1].DenseReluDense.get_parameters()} == {
        (3, 128, 64), (2, 192, 64),
    }  # fmt: skip
    ids = np.arange(12).reshape(2, 6)
    plain = StreamedT5Encoder(tmp_path / "t5", ms.bfloat16)(ids, np.ones_like(ids)).asnumpy()
    assert relative_error(net(ids, np.ones_like(ids)).asnumpy(), plain) < 1e-2  # sums in another order, then rounded
    write_text_encoder(tmp_path / "again", net)
    before, after = (load_tensors(tmp_path / name / "model.safetensors") for name in ("t5", "again"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, rtol=2**-8, atol=1e-38)


@pytest.mark.skipif(bool(unsupported()), reason=unsupported())
def test_blocks_stay_in_the_memory_of_the_weight():
    layer = BFloat16Linear(128, 64, bias=False)
    weight = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    layer.weight.set_data(ms.Tensor(weight).astype(ms.bfloat16))
    address, values = layer.bits.ctypes.data, layer.plain_weight().copy()
    layer.use_blocks()
    assert (layer.bits.shape, layer.bits.ctypes.data) == ((1, 128, 64), address)
    assert np.array_equal(layer.plain_weight(), values)


def test_a_streamed_encoder_holds_one_layer_however_many_there_are(tmp_path):
    sizes = []
    for layers in (3, 7):
        net = T5Encoder(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=layers))
        net.initialize(np.random.default_rng(layers))
        write_text_encoder(tmp_path / str(layers), net)
        streamed = StreamedT5Encoder(tmp_path / str(layers), ms.float32)
        ids = np.array([[5, 9, 1]])
        assert relative_error(streamed(ids, ids > 0).asnumpy(), net(ids, ids > 0).asnumpy()) < 1e-6
        sizes.append(sum(p.asnumpy().nbytes for b in streamed.net.encoder.block for p in b.get_parameters()))
    assert sizes[0] == sizes[1]


def test_eight_bits_take_a_quarter_of_the_memory_and_stay_close():
    whole = load_t5(FOLDER, ms.float32)
    small = T5EncoderModel.from_pretrained(PIPELINE, subfolder="text_encoder", load_in_8bit=True, device_map="auto")
    layers = [bytes_of(net.encoder.block[1]) for net in (small, whole)]
    assert layers[0] < 0.35 * layers[1]  # rows here are short, so their scales weigh
    error = relative_error(small(IDS, MASK).asnumpy(), whole(IDS, MASK).asnumpy())
    assert 1e-5 < error < 0.02


def test_rows_are_quantized_to_the_nearest_of_255_values():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 40)).astype(np.float32) * np.array([[1e-6], [1], [100], [0], [3]])
    values, scale = quantize(weight)
    assert values.dtype == np.int8
    assert np.abs(values[:3]).max(1).tolist() == [127, 127, 127]
    assert (np.abs(values * scale[:, None] - weight) <= 0.5001 * scale[:, None]).all()
    assert not values[3].any()


def test_the_quantized_product_is_that_of_the_dequantized_weight():
    layer = Int8Linear(40, 5)
    rng = np.random.default_rng(1)
    weight, x = (rng.standard_normal((5, 40)).astype(np.float32), rng.standard_normal((2, 3, 40)).astype(np.float32))
    layer.take(weight)
    values, scale = quantize(weight)
    assert relative_error(layer(ms.Tensor(x)).asnumpy(), x @ (values * scale[:, None]).T) < 1e-6


def test_four_bits_take_a_seventh_of_the_memory_and_stay_close():
    whole, eight = (load_t5(FOLDER, ms.float32, load_in_8bit=narrow) for narrow in (False, True))
    four = T5EncoderModel.from_pretrained(PIPELINE, subfolder="text_encoder", load_in_4bit=True, torch_dtype="float32")
    expected = whole(IDS, MASK).asnumpy()
    errors = [relative_error(net(IDS, MASK).asnumpy(), expected) for net in (eight, four)]
    assert errors[0] < errors[1] < 0.25


def test_a_layer_of_xxl_in_four_bits_takes_less_than_0_57_bytes_per_weight():
    layer = NF4Linear(4096, 1024)
    layer.take(np.random.default_rng(0).standard_normal((1024, 4096), dtype=np.float32))
    assert sum(p.nbytes for p in layer.get_parameters()) / (1024 * 4096) < 0.57


@pytest.mark.parametrize("shape", [(5, 64), (7, 30), (1, 1), (300, 130)])
def test_weights_of_four_bits_are_the_nearest_levels_of_their_block(shape):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape).astype(np.float32) * rng.choice([1e-6, 1, 100, 0], shape[0])[:, None]
    layer = NF4Linear(shape[1], shape[0])
    layer.take(weight)
    x = rng.standard_normal((3, shape[1]), dtype=np.float32)
    blocks = np.pad(weight.ravel(), (0, -weight.size % 64)).reshape(-1, 64)
    largest = np.abs(blocks).max(1, keepdims=True)
    levels = largest[..., None] * NF4
    nearest = np.take_along_axis(levels, np.abs(blocks[..., None] - levels).argmin(-1)[..., None], -1)[..., 0]
    expected = nearest.ravel()[: weight.size].reshape(shape)
    np.testing.assert_allclose(layer(ms.Tensor(x)).asnumpy(), x @ expected.T, rtol=1e-4, atol=1e-4)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at most one of load_in_8bit"):
        T5EncoderModel.from_pretrained(FOLDER, load_in_8bit=True, stream=True)
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        T5EncoderModel.from_pretrained(tmp_path)
    folder = sharded(tmp_path / "t5")
    next(iter(sorted(folder.glob("*.safetensors")))).unlink()
    for kind in ({}, {"load_in_8bit": True}):
        with pytest.raises(CheckpointError, match="lacks"):
            T5EncoderModel.from_pretrained(folder, **kind)
    with pytest.raises(CheckpointError, match="lacks"):
        T5EncoderModel.from_pretrained(folder, stream=True)(IDS, MASK)
