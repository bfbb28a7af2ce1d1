"""``pixart-nb sample --staged``: a configuration drawn in stages, and what is refused before it begins."""

import numpy as np
import pytest
from PIL import Image
from reference_data import diffusers
from typer.testing import CliRunner

from pixart_nb.cli import app
from pixart_nb.config import ConfigError, check_config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.sampling import generate as sample
from pixart_nb.core.sampling import planning
from pixart_nb.core.sampling.planning import drawn_size

FOLDER = diffusers("sigma")[0]
VALUES = {
    "model": str(FOLDER),
    "image_height": 96,
    "image_width": 64,
    "prompt": ["a red cup", "a blue cup"],
    "sampling_steps": 2,
    "batch_size": 1,
    "tile_size": 64,
}


def drawn(tmp_path, name, **changes):
    config = check_config(VALUES | {"output_path": str(tmp_path / name)} | changes)
    return [np.asarray(Image.open(path)) for path in sample.sample(config)]


def test_stages_draw_what_the_pipeline_draws(tmp_path):
    staged = drawn(tmp_path, "staged", stages_path=str(tmp_path / "state"))
    for ours, theirs in zip(staged, drawn(tmp_path, "whole"), strict=True):
        assert np.array_equal(ours, theirs)


def test_the_picture_is_repeated_from_its_file_without_the_stages(tmp_path):
    (first, _) = drawn(tmp_path, "staged", stages_path=str(tmp_path / "state"))
    (path,) = (tmp_path / "staged").glob("000*.png")
    again = sample.sample(sample.like(path, model=str(FOLDER), output_path=str(tmp_path / "again")))
    assert np.array_equal(np.asarray(Image.open(again[0])), first)


@pytest.mark.parametrize("how", ["whole", "stream"])
def test_a_finished_run_is_not_drawn_again_and_t5_may_be_streamed(tmp_path, monkeypatch, how):
    state = str(tmp_path / "state")
    first = drawn(tmp_path, "staged", stages_path=state, t5_load=how)
    monkeypatch.setattr(sample, "load_pipeline", lambda *given: pytest.fail("loaded"))
    assert np.array_equal(drawn(tmp_path, "again", stages_path=state, t5_load="whole")[0], first[0])


def test_a_picture_is_enlarged_from_the_stages_of_a_smaller_one_and_repeated_from_its_file(tmp_path):
    (small, _) = drawn(tmp_path, "small", stages_path=str(tmp_path / "state"), image_height=48, image_width=32)
    changes = {"stages_path": str(tmp_path / "larger"), "upscale_from": str(tmp_path / "state"), "strength": 0.5}
    (first, second) = drawn(tmp_path, "large", **changes)
    assert small.shape == (48, 32, 3) and first.shape == (96, 64, 3)
    path = next((tmp_path / "large").glob("001*.png"))
    again = sample.sample(
        sample.like(
            path,
            model=str(FOLDER),
            upscale_from=changes["upscale_from"],
            output_path=str(tmp_path / "again"),
            stages_path=str(tmp_path / "b"),
        )
    )
    assert np.array_equal(np.asarray(Image.open(again[0])), second)


def test_enlarging_needs_a_folder_for_its_stages_and_costs_only_the_steps_that_it_takes(tmp_path):
    with pytest.raises(ConfigError, match="upscale_from is given, so expected stages_path"):
        check_config(VALUES | {"upscale_from": "state"})
    config = check_config(
        VALUES | {"upscale_from": "state", "stages_path": "new", "sampling_steps": 20, "strength": 0.3}
    )
    networks, _ = planning.networks_of(config)
    assert planning.run_settings(config, networks).steps == 6


def command(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " ".join(result.output.split())


def test_the_command_refuses_the_folder_of_another_run_in_one_line(tmp_path):
    words = ["sample", "--model", FOLDER, "--image-height", 64, "--image-width", 64, "--sampling-steps", 2]
    words += ["--stages_path", tmp_path / "state", "-o", tmp_path / "out"]
    assert command(*words, "--prompt", "a red cup")[0] == 0
    code, said = command(*words, "--prompt", "a blue cup")
    assert code == 2
    assert "prompt: 'a red cup' there, 'a blue cup' here" in said
    assert "Traceback" not in said


def test_a_size_without_a_bin_is_refused():
    config = check_config(VALUES | {"image_height": 8192, "image_width": 512})
    with pytest.raises(ConfigError, match=r"8192x512, a ratio of 16.*0\.25 to 4\.0.*8192x2048"):
        drawn_size(config, PixArtConfig(input_size=512))
    assert drawn_size(
        check_config(VALUES | {"image_height": 4000, "image_width": 4100}), PixArtConfig(input_size=512)
    ) == (4096, 4096)
    free = check_config(VALUES | {"image_height": 8192, "image_width": 512, "use_resolution_binning": False})
    assert drawn_size(free, PixArtConfig(input_size=512)) == (8192, 512)
    without_a_table = PixArtConfig(input_size=16)
    with pytest.raises(ValueError, match="multiples of 16, for example 4096x4096"):
        drawn_size(check_config(VALUES | {"image_height": 4096, "image_width": 4100}), without_a_table)


def test_what_numbers_depend_on_is_told_apart(tmp_path):
    known = sample.network_identity(check_config(VALUES))
    assert known == sample.network_identity(check_config(VALUES | {"t5_load": "stream"}))
    assert known != sample.network_identity(check_config(VALUES | {"t5_load": "int8"}))
    assert known != sample.network_identity(check_config(VALUES | {"sampling_method": "ddim"}))
    other = sample.network_identity(check_config(VALUES | {"vae_root": str(diffusers("alpha")[0] / "vae")}))
    assert {name for name in known if known[name] != other[name]} == {"vae"}


@pytest.mark.parametrize("changes", [{"kv_compress": True, "kv_compress_layer": [1]}, {"sample_size": 64}])
def test_the_same_checkpoint_as_another_network_is_told_apart(changes):
    values = VALUES | {"checkpoint": str(FOLDER / "transformer")}
    known, other = (sample.network_identity(check_config(values | extra)) for extra in ({}, changes))
    assert known != other and known["transformer"] == other["transformer"]
    assert known == sample.network_identity(check_config(values | {"image_height": 64}))
