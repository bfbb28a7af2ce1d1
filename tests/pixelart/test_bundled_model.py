"""The pieces from which the bundled model is trained again."""

import numpy as np
import pytest

from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.text import TextTokenizer
from pixart_nb.core.training.batches import logit_normal
from pixart_nb.pixelart import batches, bundled_model
from pixart_nb.pixelart.captions import caption, long_caption, short_caption
from pixart_nb.pixelart.model_card import caption_vocabulary, small_images_card, words_of
from pixart_nb.pixelart.scenes import COLOURS, OBJECTS, SETTINGS, split_scenes
from pixart_nb.pixelart.text_encoder import CAPTION_TOKENS, PIECES, train_tokenizer

SCENES = split_scenes()[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer(train_tokenizer(SCENES, tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def pool(tokenizer):
    return batches.caption_pool(SCENES[:50], np.arange(50), tokenizer.tokenize, (14, 24, CAPTION_TOKENS), 3, 0)


def test_the_tokenizer_spells_every_ascii_word_and_keeps_captions_short(tokenizer):
    ids, mask = tokenizer.tokenize([short_caption(scene) for scene in SCENES[:200]], CAPTION_TOKENS)
    assert ids.max() < PIECES
    assert 4 <= mask.sum(1).mean() <= 14
    assert tokenizer.unknown("Zebra #42 (vaporwave), 'quoted' & <weird>?") == []
    assert tokenizer.unknown("ż漢") == ["ż漢"]


def test_a_tokenizer_that_is_there_is_not_trained_again(tmp_path):
    train_tokenizer(SCENES, tmp_path)
    stamp = (tmp_path / "spiece.model").stat().st_mtime_ns
    train_tokenizer(SCENES, tmp_path)
    assert (tmp_path / "spiece.model").stat().st_mtime_ns == stamp


def test_captions_of_one_length_come_together_as_often_as_they_occur(pool):
    lengths, occur = np.unique(pool.length, return_counts=True)
    assert set(lengths) <= {14, 24, CAPTION_TOKENS}
    assert (pool.mask.sum(1) <= pool.length).all()
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(600):
        chosen = pool.draw(rng, 8)
        assert len(set(pool.length[chosen])) == 1
        drawn.append(pool.length[chosen[0]])
    shares = [np.mean(np.array(drawn) == length) for length in lengths]
    assert np.allclose(shares, occur / occur.sum(), atol=0.08)


def test_batches_depend_on_the_step_alone_and_drop_captions_at_the_asked_rate(pool, tokenizer):
    latents = np.random.default_rng(0).standard_normal((50, 4, 16, 16)).astype(np.float32)
    empty = tokenizer.tokenize([""], CAPTION_TOKENS)
    batch = batches.diffusion_batches(
        latents, pool, lambda ids, mask: ids[..., None].astype(np.float32), empty, 32, 0.25, 0
    )
    first, again, other = batch(3), batch(3), batch(4)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    dropped = np.mean([(batch(step)[5].sum(1) == 1).mean() for step in range(60)])
    assert dropped == pytest.approx(0.25, abs=0.04)


def test_an_image_keeps_its_own_caption(pool, tokenizer):
    latents = np.arange(50, dtype=np.float32).reshape(-1, 1, 1, 1)
    empty = tokenizer.tokenize([""], CAPTION_TOKENS)
    batch = batches.diffusion_batches(latents, pool, lambda ids, mask: ids[..., None], empty, 32, 0.0, 0)
    start, *_, ids, mask = batch(0)
    for number, row, seen in zip(start.ravel().astype(int), ids[..., 0], mask, strict=True):
        words = tokenizer.tokenizer.decode(row[seen], skip_special_tokens=True)
        assert SCENES[number].object in words


def test_timesteps_gather_where_shapes_are_decided_and_reach_both_ends():
    timesteps = logit_normal(np.random.default_rng(0), 100_000)
    assert timesteps.min() == 0
    assert timesteps.max() == 999
    assert 0.5 < np.mean((timesteps > 350) & (timesteps < 800)) < 0.75
    assert 0.001 < np.mean(timesteps > 990) < 0.005


def test_latents_are_computed_once_and_held_out_scenes_never_appear(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "SHARD", 64)
    calls = []

    def encode(images):
        calls.append(len(images))
        return images.mean(axis=(2, 3), keepdims=True)

    means, numbers = batches.cached_latents(encode, SCENES, tmp_path, 100, 0)
    assert means.shape == (100, 3, 1, 1)
    assert sum(calls) == 128
    assert numbers.max() < len(SCENES)
    again, _ = batches.cached_latents(encode, SCENES, tmp_path, 100, 0)
    assert sum(calls) == 128
    assert np.array_equal(again, means)
    assert not {SCENES[i] for i in numbers} & set(split_scenes()[1])


def test_attributes_are_numbers_of_the_lists():
    rows = batches.attributes(SCENES[:5])
    assert [(OBJECTS[a], COLOURS[b], SETTINGS[c]) for a, b, c in rows] == [
        (s.object, s.colour, s.setting) for s in SCENES[:5]
    ]


def test_trained_weights_are_set_by_name():
    net = PixArt(bundled_model.CONFIG)
    parameters = batches.trained_parameters(net)
    assert set(dict(net.parameters_and_names())) - set(parameters) == {"y_embedder.y_embedding"}
    batches.set_weights(parameters, {name: np.full(p.shape, 0.25, np.float32) for name, p in parameters.items()})
    assert all((p.asnumpy() == 0.25).all() for p in parameters.values())


def test_the_card_of_the_bundled_model_is_what_its_training_writes(project, tmp_path):
    small_images_card().write(tmp_path)
    assert (tmp_path / "README.md").read_text() == (project / "data/tiny-sigma/README.md").read_text()


def test_the_card_knows_every_word_of_captions():
    rng, words = np.random.default_rng(0), set(caption_vocabulary())
    for scene in split_scenes()[0][::7]:
        assert words_of([caption(scene, rng), long_caption(scene, rng)]) <= words
