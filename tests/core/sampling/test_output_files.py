"""``pixart-nb sample`` replaces no image, loses none, and takes no path from one."""

import numpy as np
import pytest
from PIL import Image
from reference_data import diffusers

from pixart_nb.config import ConfigError, check_config
from pixart_nb.core.errors import WriteError
from pixart_nb.core.sampling import generate, images
from pixart_nb.core.sampling.images import read_parameters, write_image

FOLDER = diffusers("sigma")[0]
PIXELS = np.zeros((16, 16, 3), np.uint8)
STORED = {"model": "data/tiny-sigma", "prompt": ["a red cup"], "image_height": 64, "image_width": 64, "seed": 3}


def sampled(folder, **changes):
    values = {"model": str(FOLDER), "image_height": 32, "image_width": 32, "prompt": ["a red cup"]}
    values |= {"sampling_steps": 1, "output_path": str(folder)}
    return generate.sample(check_config(values | changes))


def test_another_seed_does_not_replace_the_image_of_the_first(tmp_path):
    (first,) = sampled(tmp_path)
    before = first.read_bytes()
    (second,) = sampled(tmp_path, seed=1)
    assert [path.name for path in (first, second)] == ["000_a-red-cup.png", "000_a-red-cup-2.png"]
    assert first.read_bytes() == before
    assert read_parameters(second)["seed"] == 1
    (again,) = sampled(tmp_path, seed=1)  # the same image is there already
    assert again == second
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_overwriting_is_asked_for(tmp_path):
    sampled(tmp_path)
    (path,) = sampled(tmp_path, seed=1, overwrite=True)
    assert [found.name for found in tmp_path.glob("*.png")] == ["000_a-red-cup.png"]
    assert read_parameters(path)["seed"] == 1


def test_an_image_drawn_like_another_one_with_a_change_does_not_replace_it(tmp_path):
    (first,) = sampled(tmp_path)
    before = first.read_bytes()
    config = generate.like(first, model=str(FOLDER), guidance_scale=2.0, output_path=str(tmp_path))
    (second,) = generate.sample(config)
    assert second != first
    assert first.read_bytes() == before


def test_an_output_folder_that_cannot_be_written_is_an_error_before_anything_is_drawn(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(generate, "load_pipeline", lambda *given: pytest.fail("loaded"))
    with pytest.raises(WriteError, match="could not be written"):
        sampled(tmp_path / "file" / "out")


def test_an_image_that_cannot_be_saved_is_saved_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "rescue").mkdir()
    monkeypatch.setattr(images.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "rescue"))

    def full(path, *given):
        if "rescue" not in str(path):
            raise WriteError(f"{path} could not be written (No space left on device).")
        write_image(path, *given)

    monkeypatch.setattr(images, "write_image", full)
    with pytest.warns(UserWarning, match=r"No space left on device.*saved as .*rescue"):
        (path,) = sampled(tmp_path / "out")
    assert path == tmp_path / "rescue" / "000_a-red-cup.png"
    assert Image.open(path).size == (32, 32)


def test_no_path_is_taken_from_an_image(tmp_path):
    stored = STORED | {"output_path": "/elsewhere", "prompt_path": "/secret", "stages_path": "/elsewhere"}
    write_image(tmp_path / "stranger.png", PIXELS, stored | {"memory_limit": 1e9, "overwrite": True})
    config = generate.like(tmp_path / "stranger.png", output_path=str(tmp_path))
    assert (config.seed, config.prompt, config.output_path) == (3, ["a red cup"], str(tmp_path))
    assert (config.prompt_path, config.stages_path, config.memory_limit) == ("", "", 0.0)
    assert not config.overwrite
    assert config.model.endswith("data/tiny-sigma")
    assert generate.like(tmp_path / "stranger.png").output_path == "outputs/sample"


@pytest.mark.parametrize("key", ["model", "checkpoint", "vae_root", "upscale_from"])
def test_weights_that_an_image_names_must_be_given(tmp_path, key):
    write_image(tmp_path / "stranger.png", PIXELS, STORED | {key: "//server/share"})
    with pytest.raises(ConfigError, match=f"was drawn with {key} '//server/share'. Paths are not taken"):
        generate.like(tmp_path / "stranger.png")
    own = {"upscale_from": "", "stages_path": ""} if key == "upscale_from" else {key: str(FOLDER)}
    assert generate.like(tmp_path / "stranger.png", **own)


def test_many_images_in_stages_hold_few_files_open(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    drawn = 18
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], _open_files() + 12), before[1]))
    try:
        paths = sampled(
            tmp_path / "out", prompt=[f"a cup {n}" for n in range(drawn)], stages_path=str(tmp_path / "state")
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(paths) == drawn


def _open_files():
    import psutil

    return psutil.Process().num_fds()
