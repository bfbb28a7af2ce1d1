"""Images of every kind become upright RGB of the training size; what cannot be read is named."""

import io
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pixart_nb.core.data.images import MAX_PIXELS, ImageError, check_image, fit, load_image, read_image_size, to_signed

ORIENTATION = 0x0112
#: What EXIF says the stored pixels need, to be upright.
TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, 1),
}


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(path, pixels, **options):
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_turned_images_are_upright(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    pixels = noise(6, 10)
    options = {"lossless": True} if ending == "webp" else {}
    path = saved(tmp_path / f"a.{ending}", pixels, exif=exif, **options)
    upright = TURNS[orientation](pixels)
    np.testing.assert_array_equal(load_image(path), upright)
    assert read_image_size(path) == upright.shape[:2]
    assert check_image(path.read_bytes(), "a")[1:] == upright.shape[:2]


def test_a_turned_photograph_has_its_size_turned_too(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = saved(tmp_path / "a.jpg", noise(16, 40), exif=exif)
    assert read_image_size(path) == load_image(path).shape[:2] == (40, 16)


def test_a_damaged_orientation_counts_as_upright(tmp_path):
    path = saved(tmp_path / "a.jpg", noise(16, 40), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xffgarbage")
    assert read_image_size(path) == load_image(path).shape[:2] == (16, 40)


def test_what_is_transparent_is_laid_over_white(tmp_path):
    pixels = noise(4, 4, 4)
    path = saved(tmp_path / "a.png", pixels)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(load_image(path) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["P", "RGB", "L", "1"])
def test_a_transparent_colour_becomes_white(tmp_path, mode):
    image = Image.new(mode, (4, 4), 0)
    path = saved(tmp_path / "a.png", image, transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert (load_image(path) == 255).all()


def test_cmyk_is_converted(tmp_path):
    path = saved(tmp_path / "a.tif", Image.new("CMYK", (4, 4), (0, 255, 255, 0)))
    assert (load_image(path) == (255, 0, 0)).all()


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    path = saved(tmp_path / "a.png", np.array([[0, 257, 32768, 65535]], np.uint16))
    np.testing.assert_array_equal(load_image(path)[0, :, 0], [0, 1, 128, 255])


def test_channels_of_32_bits_are_refused(tmp_path):
    path = saved(tmp_path / "a.tif", np.ones((4, 4), np.float32))
    with pytest.raises(ImageError, match=r"a\.tif: has channels of 32 bits \(mode F\); expected 8 or 16"):
        load_image(path)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ImageError, match=r"a\.png: is no image but empty, 0 bytes"):
        read_image_size(tmp_path / "a.png")


def test_an_animation_gives_its_first_frame(tmp_path):
    first, second = Image.fromarray(noise(8, 8)), Image.fromarray(noise(8, 8, seed=1))
    path = saved(tmp_path / "a.png", first, save_all=True, append_images=[second])
    np.testing.assert_array_equal(load_image(path), np.asarray(first))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "tif", "bmp", "avif"])
def test_a_cut_file_has_a_size_but_is_named_when_it_is_decoded(tmp_path, ending):
    path = saved(tmp_path / f"a.{ending}", noise(64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ImageError, match=rf"a\.{ending}"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="no image"):
        read_image_size(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        read_image_size(tmp_path / "b.png")


@pytest.mark.parametrize("side", [10_000, 100_000])
def test_a_bomb_is_refused_before_it_is_unpacked(side):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10**6))
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    tracemalloc.start()
    with pytest.raises(ImageError, match=f"at most {MAX_PIXELS} pixels"):
        load_image(io.BytesIO(b"\x89PNG\r\n\x1a\n" + parts))
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def official_fit(pixels, size):
    rows, columns = pixels.shape[:2]
    scale = max(size[0] / rows, size[1] / columns)
    covering = [max(want, int(have * scale)) for have, want in zip((rows, columns), size, strict=True)]
    resized = Image.fromarray(pixels).resize(covering[::-1], Image.Resampling.BICUBIC)
    top, left = (round((have - want) / 2) for have, want in zip(covering, size, strict=True))
    return np.asarray(resized.crop((left, top, left + size[1], top + size[0])))


SIDES = st.integers(40, 200)


@given(SIDES, SIDES, st.sampled_from([(64, 64), (64, 128), (208, 304), (16, 48)]))
def test_fit_is_the_official_resize_and_centre_crop(rows, columns, size):
    pixels = noise(rows, columns)
    expected = official_fit(pixels, size)
    np.testing.assert_array_equal(fit(pixels, *size), expected)


def test_of_a_long_strip_the_same_part_is_kept():
    pixels = noise(20, 2000)
    difference = fit(pixels, 512, 512).astype(int) - official_fit(pixels, (512, 512))
    assert np.abs(difference).max() <= 3  # the box is cut in single precision


def test_the_largest_sizes_use_lanczos():
    pixels = noise(64, 64)
    expected = Image.fromarray(pixels).resize((2048, 2048), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(fit(pixels, 2048, 2048), np.asarray(expected))


def test_a_long_strip_does_not_fill_the_memory():
    assert fit(noise(1, 60_000), 2048, 2048).shape == (2048, 2048, 3)  # whole, it would be 2048 x 123 million


def test_an_image_of_the_right_size_is_left_as_it_is():
    pixels = noise(32, 48)
    assert fit(pixels, 32, 48) is pixels


def test_pixels_become_signed_channels_first():
    signed = to_signed(np.array([[[[0, 127, 255]]]], np.uint8))
    np.testing.assert_allclose(signed.reshape(3), [-1, -1 / 255, 1], atol=1e-6)
    assert signed.shape == (1, 3, 1, 1) and signed.dtype == np.float32


def test_threads_may_be_the_first_to_read(tmp_path):
    """Pillow loads its plugins on first use, which several threads at once do not survive."""
    for number, ending in enumerate(["webp", "tif", "avif", "png"] * 4):
        saved(tmp_path / f"{number:02d}.{ending}", noise(8, 8))
    code = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from pathlib import Path\n"
        "from pixart_nb.core.data.images import load_image\n"
        "with ThreadPoolExecutor(16) as pool: print(len(list(pool.map(load_image, Path(sys.argv[1]).iterdir()))))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "16", run.stderr


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    path = saved(tmp_path / "a.webp", noise(8, 8))
    with path.open("ab") as file:
        file.truncate(2**33)  # sparse; Pillow would read it whole
    with pytest.raises(ImageError, match="has 8589934592 bytes; expected at most"):
        read_image_size(path)
