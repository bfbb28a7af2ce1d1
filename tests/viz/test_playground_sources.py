"""Runs of the playground that begin with an image, paint inside a mask, or use LoRAs, on a real pipeline."""

import asyncio
import io
from datetime import datetime, timezone

import numpy as np
import pytest
from lora_models import trained, transformer
from PIL import Image
from reference_data import REFERENCE

from pixart_nb import PixArtSigmaImg2ImgPipeline, PixArtSigmaInpaintPipeline, PixArtSigmaPipeline
from pixart_nb.config import check_config
from pixart_nb.core.sampling import generate
from pixart_nb.core.sampling.images import read_parameters
from pixart_nb.viz.playground import Playground

SIGMA = REFERENCE / "diffusers" / "sigma"
CALL = {"height": 32, "width": 64, "num_inference_steps": 5, "use_resolution_binning": False}
PIXELS = np.random.default_rng(3).integers(0, 256, (32, 64, 3), np.uint8)
MASK = np.zeros((32, 64), np.uint8)
MASK[4:20, 30:50] = 255


@pytest.fixture(scope="module")
def pipe():
    return PixArtSigmaPipeline.from_pretrained(SIGMA)


def file_of(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def playground(pipe, tmp_path, **start):
    values = {"prompt": "a red cat", "steps": 5, "guidance": 4.5, "seed": 7, "folder": tmp_path}
    return Playground(pipe, [(32, 64)], others={"model": str(SIGMA)}, **values | start)


def drawn(playground):
    return asyncio.run(playground.sample()).images


def expected(cls, pipe, **call):
    call |= {"generator": np.random.default_rng((7, 0)), "output_type": "np"}
    return (cls.from_pipe(pipe)("a red cat", **CALL, **call)[0] * 255).round().astype(np.uint8)


def test_an_image_is_where_a_run_starts(pipe, tmp_path):
    view = playground(pipe, tmp_path, image=file_of(PIXELS), strength=0.6)
    images = drawn(view)
    assert np.array_equal(images, expected(PixArtSigmaImg2ImgPipeline, pipe, image=PIXELS, strength=0.6))
    assert (view.session.progress.done, view.session.progress.total) == (3, 3)
    assert "from an image, strength 0.6" in view.view.caption.value


def test_the_pixels_outside_of_the_mask_stay_as_they_are(pipe, tmp_path):
    view = playground(pipe, tmp_path, image=file_of(PIXELS), mask=file_of(MASK), strength=1.0)
    images = drawn(view)
    assert np.array_equal(images[0][MASK == 0], PIXELS[MASK == 0])
    assert not np.array_equal(images[0][MASK > 0], PIXELS[MASK > 0])
    call = {"image": PIXELS, "mask_image": MASK, "strength": 1.0}
    assert np.array_equal(images, expected(PixArtSigmaInpaintPipeline, pipe, **call))


def test_a_saved_result_is_repeated_from_the_files_beside_it(pipe, tmp_path):
    view = playground(pipe, tmp_path, image=file_of(PIXELS), mask=file_of(MASK), strength=0.8)
    images = drawn(view)
    (path,) = view.save()
    stored = read_parameters(path)
    config = check_config(stored | {"output_path": str(tmp_path / "again")})
    (again,) = generate.sample(config)
    assert np.array_equal(np.asarray(Image.open(again)), images[0])
    assert np.array_equal(np.asarray(Image.open(stored["mask"]).convert("L")), MASK)
    other = playground(pipe, tmp_path)
    other.load(path)
    assert other.parameters.image == b""  # no path is followed


def test_an_uploaded_image_appears_and_the_result_can_be_used_and_removed(pipe, tmp_path):
    view = playground(pipe, tmp_path)
    upload = {"type": "image/png", "size": 1, "last_modified": datetime.now(timezone.utc), "name": "cat.png"}
    view.view.source.upload.value = [upload | {"content": file_of(PIXELS)}]
    assert view.parameters.image == file_of(PIXELS)
    view.view.source.painted.mask = file_of(MASK)

    async def use():
        images = (await view.sample()).images
        view.view.source.use.click()
        return images[0]

    image = asyncio.run(use())
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(view.parameters.image))), image)
    assert view.parameters.mask == b""
    view.view.source.remove.click()
    assert view.parameters.image == b""


def test_loras_have_a_weight_each(pipe, tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(SIGMA)
    files = [trained(transformer(), seed=seed).save(tmp_path / str(seed)) for seed in (1, 2)]
    view = playground(pipe, tmp_path)
    plain = drawn(view)
    for name, file in zip(("one", "two"), files, strict=True):
        view.load_lora(file, name)
    view.view.adapters.sliders["one"].value = 0.5
    view.view.adapters.sliders["two"].value = 0
    assert view.parameters.adapters == (("one", 0.5),)
    half = drawn(view)
    (path,) = view.save()
    assert read_parameters(path)["lora"] == [f"{files[0]}:0.5"]
    pipe.set_adapters(["one"], [0.5])
    assert np.array_equal(half, expected(PixArtSigmaPipeline, pipe))
    assert not np.array_equal(half, plain)
    view.view.adapters.value = ()
    assert np.array_equal(drawn(view), plain)


def test_an_uploaded_lora_is_kept_and_never_replaced_by_another_of_its_name(tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(SIGMA)
    view, messages = playground(pipe, tmp_path / "saved"), []
    for seed in (1, 2):
        file = trained(transformer(), seed=seed).save(tmp_path / str(seed))
        upload = {"name": "style.safetensors", "type": "", "size": 1, "last_modified": datetime.now(timezone.utc)}
        view.view.adapters.upload.value = [upload | {"content": file.read_bytes()}]
        messages.append(view.view.message.value)
    assert messages[0].startswith("Loaded ") and "style" in messages[1]  # an adapter of this name is there
    assert list(view.view.adapters.sliders) == ["style"]
    assert len(list((tmp_path / "saved" / "adapters").iterdir())) == 2


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"mask": file_of(MASK)}, "a mask was given without an image"),
        ({"image": b"no image"}, "the image cannot be read .* expected a PNG, JPEG or WebP file"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(pipe, tmp_path, start, message):
    view = playground(pipe, tmp_path, **start)
    with pytest.raises(ValueError, match=message):
        drawn(view)
    assert message.split(" .*")[0] in view.view.message.value
