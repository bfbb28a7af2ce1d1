"""The recipe of the bundled models, at toy sizes, and their cards."""

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
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.text import TextTokenizer
from pixart_nb.pixelart import autoencoder, batches, bundled_model, pool, text_encoder
from pixart_nb.pixelart.captions import OBJECT_SYNONYMS, caption, long_caption
from pixart_nb.pixelart.model_card import bundled_card, caption_vocabulary, words_of
from pixart_nb.pixelart.pool import coded_scene, scene_codes, scene_shard
from pixart_nb.pixelart.split import is_held_out, training_scene
from pixart_nb.pixelart.text_encoder import mean_cross_entropy

SCENES = [training_scene(np.random.default_rng(k)) for k in range(50)]


@pytest.fixture(scope="module")
def captions(tokenizer):
    rng = np.random.default_rng(0)
    return batches.caption_pool(SCENES, tokenizer.tokenize, bundled_model.CAPTION_LENGTHS, 3, rng)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer(text_encoder.train_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_the_tokenizer_holds_whole_words_and_spells_others(tokenizer):
    captions = [caption(training_scene(np.random.default_rng(k)), np.random.default_rng(k)) for k in range(300)]
    ids, mask = tokenizer.tokenize(captions, 60)
    assert mask.sum(1).max() <= bundled_model.CAPTION_LENGTHS[-1] and ids.max() < text_encoder.PIECES
    assert tokenizer.spelled([*captions, *text_encoder.FURTHER_WORDS]) == []
    assert tokenizer.spelled(["a xylophone"]) == ["xylophone"] and tokenizer.unknown("Zebra #42, 'quoted'?") == []


def test_labels_of_words_name_their_thing(tokenizer):
    ids, mask, labels = text_encoder.label_batches(tokenizer, 0)(3)
    assert ids.shape == mask.shape == labels.shape[:2] == (text_encoder.BATCH, text_encoder.CAPTION_TOKENS)
    assert (labels[~mask] == -1).all() and (labels[mask][:, 3] >= 0).all()
    assert (labels.reshape(-1, 5).max(0) < text_encoder.LABELS).all()
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
        assert coded_scene(scene_codes(scene)) == scene


def test_shards_hold_training_scenes_at_the_size_of_the_stage(monkeypatch):
    monkeypatch.setattr(pool, "SHARD", 5)
    one, other = scene_shard(1, 32, 0), scene_shard(1, 32, 0)
    assert one["cells"].shape == (5, 32, 32, 3) and np.array_equal(one["cells"], other["cells"])
    assert not any(is_held_out(coded_scene(codes)) for codes in one["scene"])


DRAWING = r"""
import os, sys, time
from pathlib import Path
from pixart_nb.core.io import folder_lock
from pixart_nb.pixelart.pool import write_pool
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


def test_stages_go_from_small_to_large_over_the_same_span_of_positions():
    configs = [stage.config() for stage in bundled_model.STAGES]
    assert [c.input_size for c in configs] == [16, 32, 32, 32, 64, 64, 128, 128]
    assert len({c.input_size / c.pe_interpolation for c in configs}) == 1
    assert [c.kv_ratio for c in configs] == 6 * [1] + 2 * [2] and configs[-1].kv_layers == (3, 4, 5)


def test_an_unknown_stage_is_refused(tmp_path):
    expected = "expected one of 128, objects, layout, 256, objects-512, 512, objects-1024, 1024"
    with pytest.raises(PixArtNBError, match=expected):
        bundled_model.train_tiny(tmp_path / "model", tmp_path / "work", "300")
    command = ["tiny", "--stage", "300", "-o", str(tmp_path / "model"), "--work-path", str(tmp_path / "work")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code and expected in f"{result.output}{result.exception}"


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
    monkeypatch.setattr(autoencoder, "DECODER_OPTIONS", replace(autoencoder.DECODER_OPTIONS, **few))
    monkeypatch.setattr(text_encoder, "OPTIONS", replace(text_encoder.OPTIONS, **few))
    options = replace(bundled_model.OPTIONS, **few)
    small = [replace(s, shards=1, batch=2, options=options) for s in bundled_model.STAGES[:4]]
    small.append(replace(small[3], name="compressed", compression=bundled_model.COMPRESSION))
    monkeypatch.setattr(bundled_model, "STAGES", tuple(small))
    folder, work = tmp_path / "model", tmp_path / "work"
    bundled_model.train_tiny(folder, work, "256", processes=1)
    curve = (work / "128" / "curve.csv").read_text()
    bundled_model.train_tiny(folder, work, "compressed", processes=1)
    assert (work / "128" / "curve.csv").read_text() == curve
    assert {path.name for path in (folder / "curves").iterdir()} == {
        "vae.csv", "decoder.csv", "text_encoder.csv", "128.csv", "objects.csv", "layout.csv", "256.csv",
        "compressed.csv",
    }  # fmt: skip
    from pixart_nb import PixArtSigmaPipeline

    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    images = pipe("a red cat on grass", num_inference_steps=1, height=256, width=256, output_type="np")[0]
    assert images.shape == (1, 256, 256, 3)


def test_captions_of_one_length_come_together_as_often_as_they_occur(captions):
    lengths, occur = np.unique(captions.length, return_counts=True)
    assert set(lengths) <= set(bundled_model.CAPTION_LENGTHS)
    assert (captions.mask.sum(1) <= captions.length).all()
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(600):
        chosen = captions.draw(rng, 8)
        assert len(set(captions.length[chosen])) == 1
        drawn.append(captions.length[chosen[0]])
    shares = [np.mean(np.array(drawn) == length) for length in lengths]
    assert np.allclose(shares, occur / occur.sum(), atol=0.08)


def test_batches_depend_on_the_step_alone_and_drop_captions_at_the_asked_rate(captions, tokenizer):
    latents = np.random.default_rng(0).standard_normal((50, 4, 16, 16)).astype(np.float32)
    empty = tokenizer.tokenize([""], bundled_model.CAPTION_LENGTHS[-1])
    batch = batches.diffusion_batches(
        latents, captions, lambda ids, mask: ids[..., None].astype(np.float32), empty, 32, 0.25, 0
    )
    first, again, other = batch(3), batch(3), batch(4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    dropped = np.mean([(batch(step)[5].sum(1) == 1).mean() for step in range(60)])
    assert dropped == pytest.approx(0.25, abs=0.04)


def test_an_image_keeps_its_own_caption(captions, tokenizer):
    latents = np.arange(50, dtype=np.float32).reshape(-1, 1, 1, 1)
    empty = tokenizer.tokenize([""], bundled_model.CAPTION_LENGTHS[-1])
    batch = batches.diffusion_batches(latents, captions, lambda ids, mask: ids[..., None], empty, 32, 0.0, 0)
    start, *_, ids, mask = batch(0)
    for number, row, seen in zip(start.ravel().astype(int), ids[..., 0], mask, strict=True):
        words = tokenizer.tokenizer.decode(row[seen], skip_special_tokens=True)
        assert SCENES[number].things[0].object in words or SCENES[number].things[0].object in OBJECT_SYNONYMS


def test_the_decoder_learns_alone_from_noisy_latents():
    net = AutoencoderKL(autoencoder.CONFIG)
    net.initialize(np.random.default_rng(0))
    loss, rng = autoencoder.decoder_loss(net), np.random.default_rng(1)
    images = ms.Tensor(to_signed(np.stack([pool.drawn_patches(rng)[0][:64, :64] for _ in range(4)])))
    noise = rng.standard_normal((4, 4, 8, 8), np.float32)
    names, parameters = zip(*net.parameters_and_names(), strict=True)
    gradients = ms.grad(lambda *batch: loss(*batch)[0], None, list(parameters))(images, ms.Tensor(noise))
    moved = {name for name, gradient in zip(names, gradients, strict=True) if np.abs(gradient.asnumpy()).max()}
    assert moved and all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    exact, noisy = (float(loss(images, ms.Tensor(scale * noise))[1].asnumpy()) for scale in (0, 1))
    decoded = net.decode(net.encode(images)[0].mean)[0]
    assert exact == pytest.approx(np.square((decoded - images).asnumpy()).mean(), rel=1e-4)
    assert noisy != exact


def test_trained_weights_are_set_by_name():
    net = PixArt(bundled_model.BASE)
    parameters = batches.trained_parameters(net)
    assert set(dict(net.parameters_and_names())) - set(parameters) == {"y_embedder.y_embedding"}
    batches.set_weights(parameters, {name: np.full(p.shape, 0.25, np.float32) for name, p in parameters.items()})
    assert all((p.asnumpy() == 0.25).all() for p in parameters.values())


@pytest.mark.parametrize(("folder", "last"), [("tiny-sigma", "256"), ("tiny-sigma-1k", "1024")])
def test_the_card_of_a_bundled_model_is_what_its_training_writes(project, tmp_path, folder, last):
    names = [stage.name for stage in bundled_model.STAGES]
    stages = bundled_model.STAGES[: names.index(last) + 1]
    bundled_card(last, int(last), bundled_model.recipe(stages)).write(tmp_path)
    assert (tmp_path / "README.md").read_text() == (project / "data" / folder / "README.md").read_text()


def test_the_card_knows_every_word_of_captions():
    rng, words = np.random.default_rng(0), set(caption_vocabulary())
    for scene in SCENES:
        assert words_of([caption(scene, rng), long_caption(scene, rng)]) <= words
