"""The feature cache holds what the networks compute, whole after any interruption, and refuses what is stale."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixart_nb.core.data import features
from pixart_nb.core.data.buckets import BucketSampler
from pixart_nb.core.data.features import FeatureCache, FeatureError, MadeBy, fingerprint
from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.images import ImageError, load_image, to_signed
from pixart_nb.core.data.labels import Label
from pixart_nb.core.data.reader import FeatureReader, LiveFeatures
from pixart_nb.core.errors import FolderInUseError, WriteError
from pixart_nb.core.io import folder_lock, load_tensors

SIZES = ((32, 32), (16, 48))
MADE_BY = MadeBy("vae", "t5", 8)


def encode(pixels):
    """Eight by eight means, as an autoencoder without weights would make; the spread of each cell."""
    n, _, height, width = pixels.shape
    cells = pixels.reshape(n, 3, height // 8, 8, width // 8, 8)
    return cells.mean((3, 5)), cells.std((3, 5))


def embed(captions):
    """A token for each character, up to eight."""
    codes = [[ord(c) for c in text[:8]] or [0] for text in captions]
    mask = np.arange(max(map(len, codes))) < np.array([[len(row)] for row in codes])
    embeds = np.zeros((*mask.shape, 2), np.float32)
    embeds[mask] = np.array([[code, 1] for row in codes for code in row])
    return embeds, mask


class Counting:
    """A network that counts what it was asked, and may fail."""

    def __init__(self, function, fail_after=None):
        self.function, self.left, self.calls = function, fail_after, []

    def __call__(self, items):
        if self.left is not None and len(self.calls) >= self.left:
            raise KeyboardInterrupt
        self.calls += list(items)
        return self.function(items)


@pytest.fixture
def labels(tmp_path, monkeypatch):
    """Ten images, of which every third has no description; four fit into a shard."""
    monkeypatch.setattr(features, "SHARD", 4)
    return make_labels(tmp_path / "images", 10)


def make_labels(folder, count, seed=0):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        height, width = SIZES[number % 2]
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        described = f"description {number}" if number % 3 else ""
        more = (f"other {number}",) * (number == 4)
        found.append(Label(path.name, path, f"p{number}", described, height, width, more))
    return found


def cache_of(labels, folder, made_by=MADE_BY):
    return FeatureCache(folder, labels, [SIZES[i % 2] for i in range(len(labels))], made_by)


def content(folder):
    return {path.name: load_tensors(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].keys() == other[name].keys()
        for part in one[name]:
            np.testing.assert_array_equal(one[name][part], other[name][part])


def test_what_is_read_is_what_the_networks_compute(labels, tmp_path):
    cache = cache_of(labels, tmp_path / "features")
    assert cache.write(encode, embed, batch_size=3) == {"missing": 6}
    for i, label in enumerate(labels):
        mean, std = encode(to_signed(load_image(label.file)[None]))
        for found, expected in zip(cache.latents(i), (mean[0], std[0]), strict=True):
            assert found.dtype == np.float16
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
        for number, text in enumerate(label.captions):
            embeds, mask = embed([text])
            np.testing.assert_array_equal(cache.caption(i, number), embeds[mask])
    assert cache.empty_caption().shape == (1, 2)


def test_batches_are_those_of_the_images(labels, tmp_path):
    cache = cache_of(labels, tmp_path / "features")
    cache.write(encode, embed)
    sampler = BucketSampler(cache.sizes, 2, 7)
    cached, direct = FeatureReader(cache, sampler, 0.5), LiveFeatures(labels, sampler, 0.5, encode, embed)
    for step in range(12):
        found, expected = cached.batch(step), direct.batch(step)
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.std, expected.std, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(found.mask, expected.mask)
        np.testing.assert_array_equal(found.embeds, expected.embeds)
        assert found.mean.dtype == found.std.dtype == found.embeds.dtype == np.float32


def test_workers_share_the_cached_batch(labels, tmp_path):
    cache = cache_of(labels, tmp_path / "features")
    cache.write(encode, embed)
    alone = FeatureReader(cache, BucketSampler(cache.sizes, 4, 7)).batch(1)
    halves = [FeatureReader(cache, BucketSampler(cache.sizes, 2, 7, rank, 2)).batch(1) for rank in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([half.mean for half in halves]), alone.mean)


def test_the_bundled_networks_fill_a_cache(tmp_path, project):
    from pixart_nb import PixArtSigmaPipeline
    from pixart_nb.core.backend import ms  # here, for the process that is killed does without it
    from pixart_nb.core.training.networks import text_embedder, vae_encoder

    pipe = PixArtSigmaPipeline.from_pretrained(project / "data" / "tiny-sigma", transformer=None, scheduler=None)
    folder = project / "data" / "pixelart"
    labels = [
        Label(name, folder / name, text, "", 32, 32)
        for name, text in (("000_teal_fish_snow.png", "A <b>teal</b> fish"), ("001_green_heart_desert.png", "a heart"))
    ]
    cache = FeatureCache(tmp_path, labels, [(32, 48)] * 2, replace(MADE_BY, dtype="fp32"))
    cache.write(vae_encoder(pipe.vae), text_embedder(pipe.tokenizer, pipe.text_encoder, 300), batch_size=2)
    pixels, captions, _ = LiveFeatures(labels, BucketSampler(cache.sizes, 2, 0), 1.0, None, None).images(0)
    batch = FeatureReader(cache, BucketSampler(cache.sizes, 2, 0), 1.0).batch(0)
    latents = pipe.vae.encode(ms.Tensor(pixels))[0]
    np.testing.assert_allclose(batch.mean, latents.mean.asnumpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.std, np.exp(latents.logvar.asnumpy() / 2), rtol=1e-4, atol=1e-6)
    embeds, mask, *_ = pipe.encode_prompt(captions, False, clean_caption=True)
    length = batch.mask.shape[1]
    np.testing.assert_array_equal(batch.mask, mask.asnumpy()[:, :length].astype(bool))
    assert not mask.asnumpy()[:, length:].any()
    expected = np.where(batch.mask[..., None], embeds.asnumpy()[:, :length], 0)
    np.testing.assert_allclose(batch.embeds, expected, rtol=1e-4, atol=1e-5)


def test_an_interrupted_cache_goes_on_after_its_whole_shards(labels, tmp_path):
    cache_of(labels, tmp_path / "whole").write(encode, embed)
    cache = cache_of(labels, tmp_path / "features")
    with pytest.raises(KeyboardInterrupt):
        cache.write(Counting(encode, fail_after=6), embed, batch_size=1)
    assert list(content(tmp_path / "features")) == [cache.paths["latents", 0].name]
    with pytest.raises(FeatureError, match=r"5 of 6 shards.*5 missing"):
        FeatureReader(cache, BucketSampler(cache.sizes, 2, 0))
    again = Counting(encode)
    assert cache.write(again, embed) == {"missing": 5} and len(again.calls) == 6
    assert_same(content(tmp_path / "features"), content(tmp_path / "whole"))


def test_a_whole_cache_is_not_computed_again(labels, tmp_path):
    cache_of(labels, tmp_path / "features").write(encode, embed)
    silent = Counting(encode), Counting(embed)
    assert cache_of(labels, tmp_path / "features").write(*silent) == {}
    assert not silent[0].calls and not silent[1].calls


def repainted(labels, i=5):
    Image.new("RGB", (32, 32)).save(labels[i].file)
    return labels


def recaptioned(labels, i=5):
    return [replace(label, prompt="other") if n == i else label for n, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("change", "made_by", "shards"),
    [
        (repainted, {}, 1),
        (recaptioned, {}, 1),
        (None, {"vae": "another"}, 3),
        (None, {"text_encoder": "another"}, 3),
        (None, {"max_length": 9}, 3),
        (None, {"clean_caption": False}, 3),
        (None, {"dtype": "fp32"}, 6),
    ],
)
def test_only_shards_of_what_changed_are_made(labels, tmp_path, change, made_by, shards):
    before = cache_of(labels, tmp_path / "features")
    before.write(encode, embed)
    changed = change(labels) if change else labels
    cache = cache_of(changed, tmp_path / "features", replace(MADE_BY, **made_by))
    with pytest.raises(
        FeatureError, match=f"{shards} of 6 shards.*{shards} missing; {shards} shards are of other data.*dataset"
    ):
        FeatureReader(cache, BucketSampler(cache.sizes, 2, 0))
    assert cache.write(encode, embed) == {"missing": shards}
    FeatureReader(cache, BucketSampler(cache.sizes, 2, 0))
    before.check()
    fresh = cache_of(changed, tmp_path / "fresh", replace(MADE_BY, **made_by))
    fresh.write(encode, embed)
    found = content(tmp_path / "features")
    assert_same({path.name: found[path.name] for path in fresh.paths.values()},
                content(tmp_path / "fresh"))  # fmt: skip


def test_another_training_size_makes_other_latents(labels, tmp_path):
    cache_of(labels, tmp_path / "features").write(encode, embed)
    cache = FeatureCache(tmp_path / "features", labels, [(32, 32)] * 10, MADE_BY)
    assert cache.unusable() == {("latents", number): "missing" for number in range(3)}


def test_two_data_sets_share_a_folder_and_each_reads_its_own(labels, tmp_path):
    cache = cache_of(labels, tmp_path / "features")
    cache.write(encode, embed)
    sampler = BucketSampler(cache.sizes, 1, 0)
    reader, alone = FeatureReader(cache, sampler), [FeatureReader(cache, sampler).batch(n) for n in range(20)]
    others = make_labels(tmp_path / "others", 10, seed=1)
    cache_of(others, tmp_path / "features").write(encode, embed)
    for step in range(20):  # most shards are first opened here
        found = reader.batch(step)
        np.testing.assert_array_equal(found.mean, alone[step].mean)
        np.testing.assert_array_equal(found.embeds, alone[step].embeds)


def test_images_of_equal_size_and_time_in_two_folders_are_told_apart(tmp_path):
    for name, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), colour).save(tmp_path / name / "a.bmp")
        os.utime(tmp_path / name / "a.bmp", (0, 0))
    paths = {
        FeatureCache(tmp_path, [Label("a.bmp", tmp_path / name / "a.bmp", "a", "", 32, 32)], [(32, 32)], MADE_BY).paths[
            "latents", 0
        ]
        for name in ("one", "two")
    }
    assert len(paths) == 2


def test_a_second_process_is_refused_while_the_first_writes(labels, tmp_path):
    cache = cache_of(labels, tmp_path / "features")
    with folder_lock(tmp_path / "features"), pytest.raises(FolderInUseError):
        cache.write(encode, embed)
    cache.write(encode, embed)
    with folder_lock(tmp_path / "features"):
        assert cache.write(encode, embed) == {}  # complete, so nothing is written


def test_every_worker_encodes_its_shards_and_waits_for_the_files_of_the_others(labels, tmp_path):
    caches = [cache_of(labels, tmp_path / "features") for _ in range(2)]
    networks = [(Counting(encode), Counting(embed)) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(caches[0].wait, 0.01)
        assert caches[0].write(*networks[0], rank=0, world=2) == {"missing": 3}
        assert not waiting.done()
        with folder_lock(tmp_path / "features"):  # another lock than that of the main worker
            assert caches[1].write(*networks[1], rank=1, world=2) == {"missing": 3}
        waiting.result(timeout=10)
    assert all(network.calls for pair in networks for network in pair)
    cache_of(labels, tmp_path / "alone").write(encode, embed)
    assert_same(content(tmp_path / "features"), content(tmp_path / "alone"))


def test_the_lock_file_of_a_killed_writer_is_removed(labels, tmp_path):
    cache = cache_of(labels, tmp_path / "features")
    cache.write(encode, embed)
    (tmp_path / "features" / ".lock").write_text("99999999 on host")
    assert cache.write(encode, embed) == {}
    assert not (tmp_path / "features" / ".lock").exists()


def test_a_damaged_shard_is_made_again(labels, tmp_path):
    cache = cache_of(labels, tmp_path / "features")
    cache.write(encode, embed)
    os.truncate(cache.paths["captions", 1], 300)
    assert cache.unusable() == {("captions", 1): "damaged"}
    assert cache.write(encode, embed) == {"damaged": 1}
    cache.check()


def test_a_flipped_bit_is_found_when_it_is_read(labels, tmp_path):
    cache = cache_of(labels, tmp_path / "features")
    cache.write(encode, embed)
    path = cache.paths["latents", 0]
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(FeatureError, match=f"{path.name} is damaged; make it again"):
        [cache.latents(i) for i in range(4)]


def test_nothing_else_in_the_folder_is_touched(labels, tmp_path):
    cache_of(labels, tmp_path / "features").write(encode, embed)
    (tmp_path / "features" / "mine.safetensors").write_text("kept")
    before = set((tmp_path / "features").iterdir())
    part = cache_of(labels[:4], tmp_path / "features")
    assert part.write(encode, embed) == {} and len(part.unused()) == 5
    assert set((tmp_path / "features").iterdir()) == before


def test_a_damaged_image_is_named_and_whole_shards_stay(labels, tmp_path):
    labels[6].file.write_bytes(b"no image")
    cache = cache_of(labels, tmp_path / "features")
    with pytest.raises(ImageError, match=r"6\.png"):
        cache.write(encode, embed)
    assert list(content(tmp_path / "features")) == [cache.paths["latents", 0].name]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_features_that_do_not_fit_the_dtype_are_named(labels, tmp_path, value):
    with pytest.raises(DataError, match=r"\.png: its features are not finite as fp16.*fp32"):
        cache_of(labels, tmp_path).write(lambda pixels: [part * value for part in encode(pixels)], embed)
    assert not content(tmp_path)


@contextmanager
def small_disk(place):
    """A file system of 256 KB."""
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system, as root has")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_and_nothing_half_written_stays(labels, tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        cache = cache_of(labels, disk / "features", replace(MADE_BY, dtype="fp32"))
        wide = Counting(lambda pixels: [np.repeat(part, 100, 1) for part in encode(pixels)])
        with pytest.raises(WriteError, match=r"latents-\w+\.safetensors could not be written.*Free space"):
            cache.write(wide, embed)
        assert list((disk / "features").iterdir()) == [cache.paths["latents", 0]]


def test_captions_that_are_cut_give_one_warning(labels, tmp_path):
    def cutting(captions):
        for text in captions:
            warnings.warn(f"prompt {text!r}; cut off", stacklevel=2)
        return embed(captions)

    with pytest.warns(UserWarning, match=r"cut off \(\d+ more like it\)") as caught:
        cache_of(labels, tmp_path / "features").write(encode, cutting)
    assert len(caught) == 1


def test_fingerprints_tell_networks_apart_wherever_they_lie(tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    weights = np.random.default_rng(0).bytes(3_000_000)
    (one / "model.safetensors").write_bytes(weights)
    other = shutil.copytree(one, tmp_path / "other")
    os.utime(other / "model.safetensors", (0, 0))
    assert fingerprint(one) == fingerprint(other) == fingerprint(str(one))
    trained = bytes(byte ^ 1 for byte in weights)
    (other / "model.safetensors").write_bytes(trained)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one, other) != fingerprint(other, one)
    with pytest.raises(DataError, match="holds no files"):
        fingerprint(tmp_path / "nothing")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="fp16, fp32"):
        MadeBy("vae", "t5", dtype="bf16")


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_features as t
t.features.SHARD = 2
labels = [t.Label(p.name, p, p.stem, "", 32, 32) for p in sorted(Path(sys.argv[2]).iterdir())]
cache = t.FeatureCache(sys.argv[3], labels, [(32, 32)] * len(labels), t.MADE_BY)
print("ready", flush=True)
cache.write(lambda pixels: [t.np.repeat(part, 20_000, 1) for part in t.encode(pixels)], t.embed)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_features(tmp_path):
    make_labels(tmp_path / "images", 20)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "images")]
    rng, killed = np.random.default_rng(0), 0
    while True:
        process = subprocess.Popen([*command, str(tmp_path / "features")], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.random() * 0.25)
        process.send_signal(signal.SIGKILL)
        finished = process.wait() == 0
        killed += not finished
        if finished or killed == 8:
            break
    subprocess.run([*command, str(tmp_path / "features")], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    assert killed > 1
    assert_same(content(tmp_path / "features"), content(tmp_path / "whole"))
    assert not list((tmp_path / "features").glob(".*"))
