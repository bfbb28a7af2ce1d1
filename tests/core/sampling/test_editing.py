"""Image-to-image and inpainting: what is kept, what is drawn anew, and what is refused."""

import numpy as np
import pytest
from PIL import Image
from reference_data import diffusers

from pixart_nb import PixArtSigmaImg2ImgPipeline, PixArtSigmaInpaintPipeline, PixArtSigmaPipeline
from pixart_nb.config import check_config
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling import generate
from pixart_nb.core.sampling.editing import crop_box, encode_image, image_array, latent_mask, mask_array
from pixart_nb.core.sampling.images import write_image

FOLDER = diffusers("sigma")[0]
PIXELS = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
MASK = np.zeros((64, 96), bool)
MASK[20:42, 30:61] = True
CALL = {"num_inference_steps": 4, "guidance_scale": 1.0, "use_resolution_binning": False}


@pytest.fixture(scope="module")
def pipe():
    pipe = PixArtSigmaImg2ImgPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def painter(pipe):
    painter = PixArtSigmaInpaintPipeline.from_pipe(pipe)
    painter.set_progress_bar_config(disable=True)
    return painter


def drawn(pipe, *args, **call):
    return pipe("a cup", *args, generator=np.random.default_rng(0), **CALL | call)[0]


def count(counts):
    counts[-1] += 1


def test_the_strength_is_the_share_of_the_steps_and_moves_away_from_the_image(pipe):
    start = encode_image(pipe.vae, image_array(PIXELS))
    distances, counts = [], []
    for strength in (0.25, 0.5, 1.0):
        counts.append(0)
        latents = drawn(pipe, PIXELS, strength, output_type="latent", callback=lambda *step: count(counts))
        distances.append(np.abs(latents - start).mean())
    assert counts == [1, 2, 4]
    assert distances == sorted(distances)


def test_images_are_given_as_in_diffusers_and_come_back_in_their_size(pipe):
    as_pil = drawn(pipe, Image.fromarray(PIXELS), 0.5)[0]
    assert as_pil.size == (96, 64)
    for image in (PIXELS, PIXELS / 255, [Image.fromarray(PIXELS)], PIXELS[None]):
        assert np.array_equal(np.asarray(drawn(pipe, image, 0.5)[0]), np.asarray(as_pil))
    assert drawn(pipe, PIXELS[:50, :70], 0.5)[0].size == (70, 50)  # drawn at 48x64
    assert drawn(pipe, PIXELS[:50, :70], 0.5, use_resolution_binning=True)[0].size == (70, 50)
    assert drawn(pipe, PIXELS, 0.5, height=32, width=48)[0].size == (48, 32)
    two = drawn(pipe, [PIXELS, PIXELS[::-1]], 0.5, num_images_per_prompt=2, output_type="np")
    assert two.shape == (2, 64, 96, 3)


@pytest.mark.parametrize("scheduler", ["dpm++", "euler", "lcm", "unipc", "heun", "pndm", "ddim"])
@pytest.mark.parametrize("options", [{}, {"padding_mask_crop": 4}, {"strength": 0.5}])
def test_pixels_outside_the_mask_are_kept_exactly(painter, scheduler, options):
    painter.scheduler = scheduler
    result = np.asarray(drawn(painter, PIXELS, MASK, **options)[0])
    assert np.array_equal(result[~MASK], PIXELS[~MASK])
    assert not np.array_equal(result[MASK], PIXELS[MASK])


def test_latents_outside_the_mask_end_as_those_of_the_image(painter):
    painter.scheduler = "dpm++"
    start = encode_image(painter.vae, image_array(PIXELS))
    latents = drawn(painter, PIXELS, Image.fromarray(MASK), output_type="latent")
    outside = latent_mask(MASK[None], 64, 96)[0, 0] == 0
    assert np.array_equal(latents[0][:, outside], start[0][:, outside])
    assert not np.allclose(latents[0][:, ~outside], start[0][:, ~outside])


def test_a_crop_is_the_part_around_the_mask():
    assert crop_box(MASK, 4, 30 / 39) == (16, 26, 46, 65)
    assert crop_box(MASK, 1000, 64 / 96) == (0, 0, 64, 96)
    top, left, bottom, right = crop_box(MASK, 4, 2.0)
    assert (bottom - top, right - left) == (64, 39)


@pytest.mark.parametrize(
    ("image", "strength", "message"),
    [
        (None, 0.5, "image is None; expected a PIL image"),
        ([], 0.5, r"image is \[\]"),
        (PIXELS[..., 0], 0.5, "image is of ndarray"),
        (PIXELS.astype(float), 0.5, "image goes from 0 to 255"),
        ([PIXELS, PIXELS[:32]], 0.5, "the images have sizes"),
        (PIXELS, 0.1, "strength 0.1 of 4 steps leaves no step; give more steps, or a strength of at least 0.25"),
        (PIXELS, 0, "strength is 0; expected above 0"),
        ([PIXELS] * 3, 0.5, "3 images to begin with were given for"),
    ],
)
def test_what_cannot_be_begun_with_is_refused(pipe, image, strength, message):
    with pytest.raises(ValueError, match=message):
        drawn(pipe, image, strength, num_images_per_prompt=2)


def test_masks_that_cannot_be_used_are_refused(painter):
    with pytest.raises(ValueError, match="nothing to paint: it is black; white is painted"):
        drawn(painter, PIXELS, np.zeros((64, 96), np.uint8))
    with pytest.raises(ValueError, match=r"mask_image is \(32, 96\) pixels, the image \(64, 96\)"):
        drawn(painter, PIXELS, MASK[:32])
    with pytest.raises(ValueError, match="mask_image is None"):
        drawn(painter, PIXELS)
    assert mask_array(Image.fromarray(MASK), (64, 96)).sum() == MASK.sum()


def test_a_configuration_begins_with_an_image_and_keeps_what_the_mask_leaves(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    values = {"model": str(FOLDER), "image_height": 64, "image_width": 96, "prompt": ["a cup"], "sampling_steps": 4}
    values |= {"use_resolution_binning": False, "output_path": str(tmp_path / "out")}
    image = {"image": str(tmp_path / "image.png")}
    (changed,) = generate.sample(check_config(values | image))
    assert not np.array_equal(np.asarray(Image.open(changed)), PIXELS)
    (painted,) = generate.sample(check_config(values | image | {"mask": str(tmp_path / "mask.png")}))
    assert np.array_equal(np.asarray(Image.open(painted))[~MASK], PIXELS[~MASK])
    with pytest.raises(ValueError, match=r"was drawn with .*image .*give --model --image --mask"):
        generate.like(painted)
    with pytest.raises(ValueError, match="would stretch it; give a height and width of its ratio"):
        generate.sample(check_config(values | image | {"image_height": 96}))
    with pytest.raises(ValueError, match="mask is given, so expected image"):
        check_config(values | {"mask": "mask.png"})
    monkeypatch.setattr(generate, "load_pipeline", lambda *given: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"image cannot be read as an image: .*none\.png"):
        generate.sample(check_config(values | {"image": str(tmp_path / "none.png")}))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"num_inference_steps": "2"}, "num_inference_steps is '2'; expected a whole number of at least 1"),
        ({"num_inference_steps": None}, "give num_inference_steps, timesteps or sigmas"),
        ({"height": "64"}, "height is '64'; expected a whole number"),
        ({"height": 0}, "height is 0; expected a whole number of at least 1"),
        ({"width": 64.5}, "width is 64.5; expected a whole number"),
        ({"mask_image": "x"}, r"mask_image is \(\) <U1; expected"),
        ({"mask_image": []}, "mask_image is an empty list; expected"),
        ({"mask_image": np.ones((1, 1, 64, 96))}, r"mask_image is \(1, 1, 64, 96\) float64; expected"),
        ({"mask_image": [MASK, MASK]}, "2 masks were given for 1 image; expected 1$"),
    ],
)
def test_wrong_arguments_of_inpainting_are_named(pipe, argument, message):
    paint = PixArtSigmaInpaintPipeline.from_pipe(pipe)
    paint.set_progress_bar_config(disable=True)
    with pytest.raises(PixArtNBError, match=message):
        paint("a", **{"image": PIXELS, "mask_image": MASK, "num_inference_steps": 2} | argument)


def test_image_files_are_read_as_in_training_and_no_program_is_started_for_them(tmp_path):
    values = {"model": "m", "image_height": 8, "image_width": 4, "prompt": ["a"], "use_resolution_binning": True}
    paths = {"image": str(tmp_path / "photo.png"), "mask": str(tmp_path / "mask.png")}
    turned = Image.Exif()
    turned[0x112] = 6  # stored lying, to be shown upright
    Image.new("RGBA", (8, 4), (255, 0, 0, 0)).save(paths["image"], exif=turned)
    Image.fromarray(np.array([[[255, 255], [255, 0]]] * 2, np.uint8), "LA").save(paths["mask"])
    images = generate.edited_image(check_config(values | paths))
    assert (np.asarray(images["image"]) == np.full((8, 4, 3), 255)).all()  # what is transparent is white
    assert np.asarray(images["mask_image"]).tolist() == [[255, 0]] * 2  # and black in a mask
    (tmp_path / "program.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 8\nshowpage\n")
    with pytest.raises(ValueError, match=r"program\.eps: is no image"):
        generate.edited_image(check_config(values | {"image": str(tmp_path / "program.eps")}))


def test_what_an_image_was_drawn_from_can_be_left_out(tmp_path):
    stored = {"model": str(FOLDER), "image_height": 64, "image_width": 64, "prompt": ["a"]}
    write_image(tmp_path / "like.png", np.zeros((4, 4, 3), np.uint8), stored | {"image": "x.png", "strength": 0.7})
    assert generate.like(tmp_path / "like.png", model=str(FOLDER), image="").strength == 0.5
    assert generate.like(tmp_path / "like.png", model=str(FOLDER), image="y.png").strength == 0.7


def test_the_plain_pipeline_is_as_before(pipe):
    plain = PixArtSigmaPipeline.from_pipe(pipe, scheduler="dpm++")
    plain.set_progress_bar_config(disable=True)
    assert drawn(plain, height=64, width=96)[0].size == (96, 64)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_mask_may_be_the_array_of_a_colour_image(channels):
    coloured = np.repeat(np.uint8(255) * MASK[..., None], channels, -1)
    coloured[..., 3:] = 255
    assert np.array_equal(mask_array(coloured, MASK.shape), MASK[None])
