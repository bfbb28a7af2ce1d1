"""Runs of the playground with an image, a mask, LoRAs or a ControlNet, on a real pipeline."""

import asyncio
import io
import shutil
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
from lora_models import trained, transformer
from PIL import Image
from reference_data import REFERENCE
from safetensors.numpy import save_file

from pixart_nb import (
    PixArtControlNet,
    PixArtSigmaControlNetPipeline,
    PixArtSigmaImg2ImgPipeline,
    PixArtSigmaInpaintPipeline,
    PixArtSigmaPipeline,
)
from pixart_nb.config import check_config
from pixart_nb.core.checkpoints.controlnet import load_controlnet
from pixart_nb.core.data.control import edges
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


CONTROL = {"control_image": file_of(PIXELS), "controlnet": str(SIGMA / "transformer")}


def uploaded(name, content):
    return {"name": name, "type": "", "size": 1, "last_modified": datetime.now(timezone.utc), "content": content}


def playground(pipe, tmp_path, **start):
    values = {"prompt": "a red cat", "steps": 5, "guidance": 4.5, "seed": 7, "folder": tmp_path}
    return Playground(pipe, [(32, 64)], **values | {"others": {"model": str(SIGMA)}} | start)


def drawn(playground):
    return asyncio.run(playground.sample()).images


def expected(cls, pipe, **call):
    call |= {"generator": np.random.default_rng((7, 0)), "output_type": "np"}
    return (cls.from_pipe(pipe)("a red cat", **CALL | call)[0] * 255).round().astype(np.uint8)


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
    view.view.source.upload.value = [uploaded("cat.png", file_of(PIXELS))]
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


def test_images_of_another_ratio_are_cut_when_they_are_uploaded_and_never_stretched(pipe, tmp_path):
    view = playground(pipe, tmp_path)
    wide = np.concatenate([np.full((32, 32, 3), 9, np.uint8), PIXELS, np.full((32, 32, 3), 9, np.uint8)], 1)
    for upload in (view.view.source.upload, view.view.control.upload):
        upload.value = [uploaded("wide.png", file_of(wide))]
        assert "wide.png was cut to the ratio of “64 x 32, wide”, around its middle." in view.view.message.value
    for content in (view.parameters.image, view.parameters.control_image):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), PIXELS)
    for start in ({"image": file_of(wide)}, CONTROL | {"control_image": file_of(wide)}):
        with pytest.raises(ValueError, match=r"is 32x128 .* 32x64 is drawn, which would stretch it"):
            drawn(playground(pipe, tmp_path, **start))


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


def test_the_pipeline_keeps_its_own_adapters(tmp_path):
    """Loading, drawing and drawing beside another playground change nothing for other cells."""
    pipe = PixArtSigmaPipeline.from_pretrained(SIGMA)
    files = [trained(transformer(), seed=seed).save(tmp_path / str(seed)) for seed in (1, 2)]
    pipe.load_lora_weights(files[0], adapter_name="own")
    pipe.set_adapters(["own"], [0.25])
    own = expected(PixArtSigmaPipeline, pipe)
    view = playground(pipe, tmp_path, lcm_lora=files[1])
    assert view.parameters.adapters == (("own", 0.25),)
    assert np.array_equal(drawn(view), own)
    view.view.adapters.value = (("lcm", 1.0),)
    other = playground(pipe, tmp_path, lcm_lora=files[1])  # the cell runs again
    assert other.parameters.adapters == (("own", 0.25),)
    alone = drawn(view)
    assert not np.array_equal(alone, own)

    async def both():
        return await asyncio.gather(view.sample(), other.sample())

    together = asyncio.run(both())
    assert np.array_equal(together[0].images, alone)
    assert np.array_equal(together[1].images, own)
    assert pipe.get_active_adapters() == ["own"]
    assert np.array_equal(expected(PixArtSigmaPipeline, pipe), own)


def test_a_pipeline_keeps_adapters_that_are_switched_off_or_fused(tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(SIGMA)
    files = [trained(transformer(), seed=seed).save(tmp_path / str(seed)) for seed in (1, 2, 3)]
    pipe.load_lora_weights(files[0], adapter_name="own")
    pipe.set_adapters(["own"], [0.25])
    pipe.disable_lora()
    playground(pipe, tmp_path, lcm_lora=files[1])
    pipe.enable_lora()
    assert pipe.transformer.adapters.weights == {"own": 0.25}
    other = playground(pipe, tmp_path, lcm_lora=files[2])  # another file under the same name
    other.view.adapters.value = (("lcm", 1.0),)
    changed = drawn(other)
    pipe.delete_adapters("lcm")
    pipe.load_lora_weights(files[2], adapter_name="lcm")
    assert np.array_equal(changed, expected(PixArtSigmaPipeline, pipe))
    pipe.fuse_lora()
    view = playground(pipe, tmp_path, others={"model": str(SIGMA), "lora": [f"{files[0]}:0.25"]})
    drawn(view)
    (path,) = view.save()
    assert read_parameters(path)["lora"] == [f"{files[0]}:0.25"]
    assert view.load(path) == [f"LoRA {files[0]}:0.25"]


def test_loading_an_image_names_what_it_does_not_take(tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(SIGMA)
    file = trained(transformer(), seed=1).save(tmp_path / "lora")
    view = playground(pipe, tmp_path, others={"model": "mine"})
    view.load_lora(file, "one")
    drawn(view)
    (path,) = view.save()
    assert view.load(path) == []
    assert view.parameters.adapters == (("one", 1.0),)
    other = playground(PixArtSigmaPipeline.from_pretrained(SIGMA), tmp_path, others={"model": "other"})
    assert other.load(path) == ["model mine", f"LoRA {file}:1"]
    assert other.parameters == replace(view.parameters, adapters=())


def test_an_uploaded_lora_is_kept_and_never_replaced_by_another_of_its_name(tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(SIGMA)
    view, messages = playground(pipe, tmp_path / "saved"), []
    for seed in (1, 2):
        file = trained(transformer(), seed=seed).save(tmp_path / str(seed))
        view.view.adapters.upload.value = [uploaded("style.safetensors", file.read_bytes())]
        messages.append(view.view.message.value)
    again = uploaded("style.safetensors", file.read_bytes())
    view.view.adapters.upload.value = [again]
    assert view.view.message.value == "style.safetensors is loaded already."
    first, second = view.view.adapters.sliders
    assert messages == [f"Loaded {view._files[first]} as style", f"Loaded {view._files[second]} as {second}"]
    assert first == "style" and second.startswith("style_")
    assert len(list((tmp_path / "saved" / "adapters").iterdir())) == 2


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"mask": file_of(MASK)}, "a mask was given without an image"),
        ({"image": b"no image"}, "the image cannot be read .* expected a PNG, JPEG or WebP file"),
        ({"control_image": file_of(PIXELS)}, "a condition image was given without a ControlNet"),
        ({"controlnet": "x.pth"}, "a ControlNet was given without its condition image"),
        (CONTROL | {"image": file_of(PIXELS)}, "a ControlNet does not go with an image to start from"),
        (CONTROL | {"control_image": b"no image"}, "the image cannot be read .* expected a PNG, JPEG or WebP file"),
        (CONTROL | {"controlnet": "missing.pth"}, "missing.pth does not exist"),
        (CONTROL | {"controlnet": str(SIGMA / "transformer")}, "transformer holds no ControlNet"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(pipe, tmp_path, start, message):
    view = playground(pipe, tmp_path, **start)
    with pytest.raises(ValueError, match=message):
        drawn(view)
    assert message.split(" .*")[0] in view.view.message.value


# ---- a ControlNet


@pytest.fixture
def controlnet(pipe, tmp_path):
    """Path of a file with a ControlNet for the pipeline, without its base model."""
    rng = np.random.default_rng(1)
    tensors = {
        name: 0.3 * rng.standard_normal(parameter.shape).astype(np.float32)
        for name, parameter in PixArtControlNet.from_transformer(pipe.transformer, 1).parameters_and_names()
        if name.startswith("controlnet.")
    }
    save_file(tensors, tmp_path / "control.safetensors")
    return str(tmp_path / "control.safetensors")


def test_the_edges_of_a_result_are_followed_by_the_next_one(pipe, tmp_path, controlnet):
    view = playground(pipe, tmp_path, controlnet_conditioning_scale=0.75, control_guidance_end=0.6, guess_mode=True)

    async def run():
        first = (await view.sample()).images
        view.view.control.use.click()
        view.controls["controlnet"].value = f" {controlnet}"
        return first[0], (await view.sample()).images

    first, images = asyncio.run(run())
    condition = edges(first)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(view.parameters.control_image))), condition)
    net = load_controlnet(controlnet, base_model=pipe.transformer)
    call = {"image": condition, "controlnet_conditioning_scale": 0.75, "control_guidance_end": 0.6}
    call |= {"guess_mode": True}
    controlled = PixArtSigmaControlNetPipeline.from_pipe(pipe, controlnet=net)
    expected = controlled("a red cat", **CALL, **call, generator=np.random.default_rng((7, 0)), output_type="np")[0]
    assert np.array_equal(images, (expected * 255).round().astype(np.uint8))
    assert not np.array_equal(images[0], first)
    assert "control 0.75, guess mode, from 0 to 0.6 of the steps" in view.view.caption.value
    view.view.control.remove.click()
    view.controls["controlnet"].value = ""
    assert np.array_equal(drawn(view)[0], first)


def test_a_condition_is_a_file_or_its_edges_and_a_bad_one_is_said(pipe, tmp_path):
    view = playground(pipe, tmp_path)
    tab = view.view.control
    assert (tab.edges.disabled, tab.remove.disabled, tab.image.layout.display) == (True, True, "none")
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "WebP", lossless=True)
    tab.upload.value = [uploaded("lines.webp", stream.getvalue())]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(view.parameters.control_image))), PIXELS)
    tab.edges.click()
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(tab.png))), edges(PIXELS))
    before = tab.png
    tab.upload.value = [uploaded("lines.png", b"no image")]
    assert "the image cannot be read" in view.view.message.value
    assert tab.png == before
    tab.remove.click()
    tab.use.click()
    assert "There is no image yet" in view.view.message.value
    assert view.parameters.control_image == b""


def test_a_saved_result_with_control_is_repeated_by_a_configuration(pipe, tmp_path, controlnet):
    start = {"control_image": file_of(PIXELS), "controlnet": controlnet, "control_guidance_start": 0.4}
    view = playground(pipe, tmp_path, **start)
    images = drawn(view)
    (path,) = view.save()
    config = check_config(read_parameters(path) | {"output_path": str(tmp_path / "again")})
    assert (config.controlnet, config.control_guidance_start) == (controlnet, 0.4)
    (again,) = generate.sample(config)
    assert np.array_equal(np.asarray(Image.open(again)), images[0])
    view.controls["control_guidance_end"].value = 0.4
    with pytest.raises(ValueError, match="expected 0 <= start < end <= 1"):
        drawn(view)
    view.restore(view.history[0])
    assert view.parameters == view.history[0].parameters


def test_a_controlnet_is_read_again_only_when_it_changed_and_goes_with_loras(tmp_path, controlnet, monkeypatch):
    pipe, loads = PixArtSigmaPipeline.from_pretrained(SIGMA), []
    name = "pixart_nb.core.checkpoints.controlnet.load_controlnet"
    monkeypatch.setattr(name, lambda *args: loads.append(args) or load_controlnet(*args))
    view = playground(pipe, tmp_path, control_image=file_of(PIXELS), controlnet=controlnet, steps=2)
    first, again = drawn(view), drawn(view)
    assert len(loads) == 1
    assert np.array_equal(first, again)
    view.load_lora(trained(transformer(), seed=1).save(tmp_path / "lora"), "one")
    assert not np.array_equal(drawn(view), first)
    view.view.adapters.value = ()
    assert np.array_equal(drawn(view), first)
    assert len(loads) == 1


def test_an_official_file_brings_its_own_base_model_to_which_no_adapter_belongs(pipe, tmp_path):
    net, path = PixArtControlNet.from_transformer(pipe.transformer, 1), tmp_path / "official.safetensors"
    shutil.copy(SIGMA / "transformer" / "config.json", tmp_path)
    save_file({name: parameter.asnumpy() for name, parameter in net.parameters_and_names()}, path)
    view = playground(pipe, tmp_path, control_image=file_of(PIXELS), controlnet=str(path))
    plain = drawn(playground(pipe, tmp_path))
    assert np.abs(drawn(view).astype(int) - plain).max() <= 1  # a new ControlNet changes nothing
    own = PixArtSigmaPipeline.from_pretrained(SIGMA)
    view = playground(own, tmp_path, control_image=file_of(PIXELS), controlnet=str(path))
    view.load_lora(trained(transformer(), seed=1).save(tmp_path / "lora"), "one")
    with pytest.raises(ValueError, match="holds a base model of its own, which has no adapters"):
        drawn(view)


def test_what_is_typed_is_drawn_in_few_steps_and_sample_draws_it_in_full(tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(SIGMA)
    file = trained(transformer(), seed=1).save(tmp_path / "lcm")

    async def type_and_sample():
        widget = playground(pipe, tmp_path, lcm_lora=file)
        prompt, shown = widget.controls["prompt"], []
        prompt.value = "a blue cat"  # the box is not ticked yet
        widget.view.typing.value = True
        for text in ("a re", "a red", " ", "a red cat"):
            prompt.value = text
            await asyncio.sleep(0)
        await asyncio.wait([widget._loop.task])
        shown.append(widget.session.entry)
        assert widget.history == []
        prompt.value = " "
        await asyncio.wait([widget._loop.task])
        prompt.value = "a red cat"
        await asyncio.wait([widget._loop.task])
        shown.append(widget.session.entry)
        widget.view.typing.value = False
        prompt.value = "a red dog"
        return widget, shown, await widget.sample()

    widget, shown, full = asyncio.run(type_and_sample())
    assert widget.view.typing.layout.display == ""
    assert [entry.parameters.prompt for entry in shown] == ["a red cat", "a red cat"]
    few = {"num_inference_steps": 4, "guidance_scale": 1.0}
    pipe.set_adapters(["lcm"], [1.0])
    pipe.scheduler = "lcm"
    typed = expected(PixArtSigmaPipeline, pipe, **few)
    assert np.array_equal(shown[-1].images, typed)
    assert widget.history == [full] and full.parameters.adapters == ()
    assert playground(pipe, tmp_path).view.typing.layout.display == "none"


def test_an_error_while_typing_is_a_line_in_the_widget(tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(SIGMA)
    file = trained(transformer(), seed=1).save(tmp_path / "lcm")

    async def type_badly():
        widget = playground(pipe, tmp_path, lcm_lora=file, controlnet="missing")
        widget.view.typing.value = True
        widget.controls["prompt"].value = "a red cat with a hat"
        await asyncio.wait([widget._loop.task])
        return widget

    assert "without its condition image" in asyncio.run(type_badly()).view.message.value
