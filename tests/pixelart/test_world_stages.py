"""The recipe of the bundled models of the richer world, at toy sizes."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from pixart_nb.cli import app
from pixart_nb.core.backend import ms
from pixart_nb.core.data.images import to_signed
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import folder_lock
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.text import TextTokenizer
from pixart_nb.pixelart.text_encoder import mean_cross_entropy
from pixart_nb.pixelart.world import autoencoder, pool, stages, text_encoder
from pixart_nb.pixelart.world.captions import world_caption
from pixart_nb.pixelart.world.pool import scene_codes, scene_of, scene_shard
from pixart_nb.pixelart.world.split import is_held_out, training_scene


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer(text_encoder.train_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_the_tokenizer_holds_whole_words_and_spells_others(tokenizer):
    captions = [world_caption(training_scene(np.random.default_rng(k)), np.random.default_rng(k)) for k in range(300)]
    ids, mask = tokenizer.tokenize(captions, 60)
    assert mask.sum(1).max() <= stages.CAPTION_LENGTHS[-1] and ids.max() < text_encoder.PIECES
    assert tokenizer.spelled([*captions, *text_encoder.FURTHER_WORDS]) == []
    assert tokenizer.spelled(["a xylophone"]) == ["xylophone"] and tokenizer.unknown("Zebra #42, 'quoted'?") == []


def test_labels_of_words_name_their_thing(tokenizer):
    ids, mask, labels = text_encoder.label_batches(tokenizer, 0)(3)
    assert ids.shape == mask.shape == labels.shape[:2] == (text_encoder.BATCH, text_encoder.CAPTION_TOKENS)
    assert (labels[~mask] == -1).all() and (labels[mask][:, 3] >= 0).all()
    assert (labels.reshape(-1, 4).max(0) < text_encoder.SIZES).all()
    again = text_encoder.label_batches(tokenizer, 0)(3)
    assert all(np.array_equal(a, b) for a, b in zip((ids, mask, labels), again, strict=True))


def test_the_loss_of_labels_is_the_same_in_every_call():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((4, 10)).astype(np.float32), np.array([3, -1, 0, 9], np.int32)
    values = {float(mean_cross_entropy(ms.Tensor(logits), ms.Tensor(labels)).asnumpy()) for _ in range(12)}
    chosen = logits[[0, 2, 3], [3, 0, 9]] - np.log(np.exp(logits[[0, 2, 3]]).sum(1))
    assert len(values) == 1 and values.pop() == pytest.approx(-chosen.mean(), rel=1e-5)


def test_codes_give_the_scene_back():
    for k in range(50):
        scene = training_scene(np.random.default_rng(k))
        assert scene_of(scene_codes(scene)) == scene


def test_shards_hold_training_scenes_at_the_size_of_the_stage(monkeypatch):
    monkeypatch.setattr(pool, "SHARD", 5)
    one, other = scene_shard(1, 32, 0), scene_shard(1, 32, 0)
    assert one["cells"].shape == (5, 32, 32, 3) and np.array_equal(one["cells"], other["cells"])
    assert not any(is_held_out(scene_of(codes)) for codes in one["scene"])


DRAWING = r"""
import os, sys, time
from pathlib import Path
from pixart_nb.core.io import folder_lock
from pixart_nb.pixelart.world.pool import write_pool
def draw(number):
    os.write(1, b"%d\n" % os.getpid())
    time.sleep(600)
with folder_lock(sys.argv[1]):
    write_pool(Path(sys.argv[1]), 4, draw, 2)
"""


def test_processes_that_draw_end_with_the_one_that_was_killed_and_hold_no_lock(tmp_path):
    words = [sys.executable, "-c", DRAWING, str(tmp_path)]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    workers = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    parent.kill()
    parent.wait()
    with folder_lock(tmp_path):
        pass
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_every_stage_doubles_the_size_over_the_same_span_of_positions():
    configs = [stage.config() for stage in stages.STAGES]
    assert [c.input_size for c in configs] == [16, 32, 64, 128]
    assert len({c.input_size / c.pe_interpolation for c in configs}) == 1
    assert [c.kv_ratio for c in configs] == [1, 1, 1, 2] and configs[-1].kv_layers == (3, 4, 5)


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(PixArtNBError, match="expected one of 128, 256, 512, 1024"):
        stages.train_world(tmp_path / "model", tmp_path / "work", "300")
    command = ["tiny", "--stage", "300", "-o", str(tmp_path / "model"), "--work-path", str(tmp_path / "work")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code and "expected one of 128, 256, 512, 1024" in f"{result.output}{result.exception}"


def test_the_vae_starts_with_colours_in_three_latents():
    net = AutoencoderKL(autoencoder.CONFIG)
    net.initialize(np.random.default_rng(0))
    rng = np.random.default_rng(1)
    drawn = np.stack([pool.drawn_patches(rng)[0] for _ in range(12)])
    autoencoder.start_with_colours(net, drawn[:8])
    images = to_signed(drawn[8:])
    latents = net.encode(ms.Tensor(images))[0].mean
    means = images.reshape(4, 3, 16, 8, 16, 8).mean((3, 5))
    for channel in range(3):
        assert np.corrcoef(latents.asnumpy()[:, channel].ravel(), means[:, channel].ravel())[0, 1] > 0.9
    assert np.square(net.decode(latents)[0].asnumpy() - images).mean() < 0.5 * images.var()


@pytest.mark.slow
def test_the_recipe_runs_and_resumes(tmp_path, monkeypatch):
    few = {"steps": 2, "warmup_steps": 1, "save_every": 1, "log_every": 1}
    monkeypatch.setattr(pool, "SHARD", 4)
    monkeypatch.setattr(autoencoder, "SHARDS", 1)
    monkeypatch.setattr(autoencoder, "OPTIONS", replace(autoencoder.OPTIONS, **few))
    monkeypatch.setattr(text_encoder, "OPTIONS", replace(text_encoder.OPTIONS, **few))
    options = replace(stages.OPTIONS, **few)
    small = [replace(s, shards=1, batch=2, options=options) for s in stages.STAGES[:2]]
    small.append(replace(small[1], name="compressed", compression=stages.COMPRESSION))
    monkeypatch.setattr(stages, "STAGES", tuple(small))
    folder, work = tmp_path / "model", tmp_path / "work"
    stages.train_world(folder, work, "256", processes=1)
    curve = (work / "128" / "curve.csv").read_text()
    stages.train_world(folder, work, "compressed", processes=1)
    assert (work / "128" / "curve.csv").read_text() == curve
    assert {path.name for path in (folder / "curves").iterdir()} == {
        "vae.csv", "text_encoder.csv", "128.csv", "256.csv", "compressed.csv",
    }  # fmt: skip
    from pixart_nb import PixArtSigmaPipeline

    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    images = pipe("a red cat on grass", num_inference_steps=1, height=256, width=256, output_type="np")[0]
    assert images.shape == (1, 256, 256, 3)
