"""Drawing in stages: the pipeline's own picture, again after a kill, and nothing of another run."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from staged_run import load, picture

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core.errors import FolderInUseError, WriteError
from pixart_nb.core.io import CheckpointError, load_tensors, save_tensors
from pixart_nb.core.sampling.images import resize_and_crop, to_images, to_uint8
from pixart_nb.core.sampling.samplers import image_generators
from pixart_nb.core.sampling.stages import run_stages

HERE = Path(__file__).parents[2]


def finished(drawing, loader=load):
    parts = list(run_stages([drawing], loader))
    assert drawing.files.has("pixels")
    return parts


def whole_pipeline():
    return load(("tokenizer", "text_encoder", "transformer", "scheduler", "vae"))


def called(pipe, drawing, output_type="np"):
    call = dict(height=drawing.drawn[0], width=drawing.drawn[1], num_inference_steps=drawing.steps)
    return pipe(
        drawing.prompt,
        guidance_scale=drawing.guidance_scale,
        generator=image_generators(drawing.seed[0], [drawing.seed[1]]),
        use_resolution_binning=False,
        output_type=output_type,
        **call,
    )[0]


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_a_picture_in_stages_is_the_pipelines_own(tmp_path, guidance):
    drawing = picture(tmp_path, drawn=(64, 96), size=(64, 96), steps=3, tile=96, guidance_scale=guidance, seed=(7, 2))
    parts = finished(drawing)
    assert np.array_equal(drawing.pixels(), to_uint8(called(whole_pipeline(), drawing))[0])
    assert [(part.stage, part.done) for part in parts[-5:]] == [
        ("denoise", 1),
        ("denoise", 2),
        ("denoise", 3),
        ("decode", 0),
        ("decode", 1),
    ]


def test_a_picture_of_another_size_is_scaled_and_cut_before_it_is_rounded(tmp_path):
    drawing = picture(tmp_path, drawn=(64, 96), size=(50, 70), steps=2, tile=96)
    finished(drawing)
    pipe = whole_pipeline()
    decoded = pipe.vae.decode(called(pipe, drawing, "latent") / pipe.vae.config.scaling_factor)[0]
    assert np.array_equal(drawing.pixels(), to_uint8(resize_and_crop(to_images(decoded), 50, 70))[0])


def test_a_picture_larger_than_a_tile_is_the_tiled_pipelines_own(tmp_path):
    drawing = picture(tmp_path, steps=2)
    finished(drawing)
    pipe = whole_pipeline()
    pipe.vae.enable_tiling(64)
    assert np.array_equal(drawing.pixels(), to_uint8(called(pipe, drawing))[0])


def start(folder, solver):
    return subprocess.Popen(
        [sys.executable, str(HERE / "staged_run.py"), str(folder), solver], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["dpm++", "sa-solver"])
def test_a_run_that_is_killed_twice_ends_with_the_same_picture(tmp_path, solver):
    """Once in the middle of the steps, with a solver that remembers and one that draws noise, once between tiles."""
    whole = picture(tmp_path / "whole", models={"scheduler": solver})
    finished(whole, lambda names: load(names, solver))
    killed = picture(tmp_path / "killed", models={"scheduler": solver})
    for moment in ("denoise 4", "decode 2"):
        process = start(killed.folder, solver)
        for line in process.stdout:
            if line.strip() == moment:
                os.kill(process.pid, signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL
        assert not killed.files.has("pixels")
    parts = finished(killed, lambda names: load(names, solver))
    assert {part.stage for part in parts} == {"decode"}
    assert np.array_equal(killed.pixels(), whole.pixels())
    assert np.array_equal(killed.files.load("latents")["latents"], whole.files.load("latents")["latents"])


def test_steps_that_are_kept_are_not_computed_again(tmp_path):
    drawing, loaded = picture(tmp_path), []
    for part in run_stages([drawing], lambda names: loaded.append(load(names)) or loaded[-1]):
        if (part.stage, part.done) == ("denoise", 4):
            break
    passes = []
    again = load(("transformer", "scheduler"))
    last = again.transformer.unpatchify  # the end of every pass
    again.transformer.unpatchify = lambda *given: passes.append(1) or last(*given)
    stages = run_stages([drawing], lambda names: again if "transformer" in names else load(names))
    assert next(part for part in stages).done == 4
    list(stages)
    assert len(passes) == 2


def test_what_is_finished_is_not_drawn_again_and_leaves_nothing_half_done(tmp_path):
    drawing = picture(tmp_path, steps=2)
    finished(drawing)
    assert finished(drawing, lambda names: pytest.fail(f"loaded {names}")) == []
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "embeddings.safetensors",
        "latents.safetensors",
        "pixels.safetensors",
    ]
    measured = drawing.files.measured()
    assert list(measured) == ["encode", "denoise", "decode"]
    assert all(stage["seconds"] > 0 and stage["peak_bytes"] > 1e6 for stage in measured.values())


def test_what_is_done_with_the_progress_is_not_measured_as_the_stages_work(tmp_path):
    drawing, begin = picture(tmp_path, steps=2), time.perf_counter()
    for part in run_stages([drawing], load):
        if (part.stage, part.done) == ("decode", 0):
            time.sleep(2)
    took = time.perf_counter() - begin
    measured = drawing.files.measured().values()
    assert 0 < sum(stage["seconds"] + stage["load_seconds"] for stage in measured) < took - 1.9


def test_every_stage_has_its_own_components_only(tmp_path):
    held = []

    def watched(names):
        pipe = load(names)
        parts = (pipe.tokenizer, pipe.text_encoder, pipe.transformer, pipe.scheduler, pipe.vae)
        held.append([part is not None for part in parts])
        return pipe

    finished(picture(tmp_path, steps=2, drawn=(64, 64), size=(64, 64)), watched)
    assert held == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]


def test_several_pictures_load_each_component_once(tmp_path):
    loads = []
    drawings = [
        picture(tmp_path / name, prompt=f"a {name} cup", steps=2, drawn=(64, 64), size=(64, 64), seed=(0, n))
        for n, name in enumerate(("red", "blue"))
    ]
    parts = list(run_stages(drawings, lambda names: loads.append(names) or load(names)))
    assert loads == [("tokenizer", "text_encoder"), ("transformer", "scheduler"), ("vae",)]
    assert {part.image for part in parts} == {0, 1}
    assert not np.array_equal(*(drawing.pixels() for drawing in drawings))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "a blue cup"}, "prompt: 'a red mushroom on grass' there, 'a blue cup' here"),
        ({"steps": 7}, "steps: 6 there, 7 here"),
        ({"seed": (1, 0)}, r"seed: \[0, 0\] there, \[1, 0\] here"),
        ({"models": {"transformer": "other"}}, "transformer: not set there, 'other' here"),
    ],
)
def test_the_folder_of_another_run_is_refused_with_the_differences(tmp_path, change, said):
    drawing = picture(tmp_path)
    next(run_stages([drawing], load))
    with pytest.raises(CheckpointError, match=said):
        next(run_stages([replace(drawing, **change)], load))


def test_a_file_of_another_run_is_refused(tmp_path):
    drawing, other = picture(tmp_path / "one"), picture(tmp_path / "two", prompt="a blue cup")
    for each in (drawing, other):
        next(part for part in run_stages([each], load) if part.stage == "denoise")
    drawing.files.path("embeddings").write_bytes(other.files.path("embeddings").read_bytes())
    with pytest.raises(CheckpointError, match=r"embeddings\.safetensors belongs to another run.*remove the file"):
        list(run_stages([drawing], load))
    drawing.files.path("embeddings").unlink()
    save_tensors(drawing.files.path("prediction-0000"), {"noise": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError, match="it does not say which"):
        list(run_stages([drawing], load))


def test_a_damaged_file_is_named(tmp_path):
    drawing = picture(tmp_path)
    next(part for part in run_stages([drawing], load) if part.stage == "denoise")
    path = drawing.files.path("embeddings")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"embeddings\.safetensors .* truncated"):
        list(run_stages([drawing], load))


def test_two_processes_do_not_draw_in_one_folder(tmp_path):
    drawing = picture(tmp_path)
    stages = run_stages([drawing], load)
    next(stages)
    with pytest.raises(FolderInUseError, match="is writing into"):
        next(run_stages([replace(drawing)], load))
    stages.close()
    assert next(run_stages([replace(drawing)], load)).stage == "encode"


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WriteError, match="could not be written"):
        next(run_stages([picture(tmp_path / "file" / "run")], lambda names: pytest.fail("loaded")))


def test_a_full_disk_is_said_and_leaves_the_stage_as_it_was(tmp_path, monkeypatch):
    drawing = picture(tmp_path)

    def full(tensors, path, metadata=None):
        raise OSError(28, "No space left on device")

    stages = run_stages([drawing], load)
    next(part for part in stages if (part.stage, part.done) == ("denoise", 2))
    monkeypatch.setattr("pixart_nb.core.io.save_file", full)
    with pytest.raises(WriteError, match=r"prediction-0002.*No space left on device"):
        next(stages)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("prediction-*"))) == 2
    finished(drawing)
    assert load_tensors(drawing.files.path("pixels"))["pixels"].shape == (160, 96, 3)


def test_a_picture_is_enlarged_from_another_ones_latents_as_the_pipeline_does_it(tmp_path):
    small = picture(tmp_path / "small", drawn=(80, 48), size=(80, 48), steps=2)
    finished(small)
    large = picture(tmp_path / "large", upscale_from=small.folder, strength=0.5)
    parts = [part for part in finished(large) if part.stage == "denoise"]
    assert (parts[-1].done, parts[-1].total) == (3, 3)
    pipe = whole_pipeline()
    steps = pipe.sample(
        large.prompt,
        height=160,
        width=96,
        num_inference_steps=6,
        generator=image_generators(0, [0]),
        image_latents=small.files.load("latents")["latents"].repeat(2, 2).repeat(2, 3),
        strength=0.5,
    )
    assert np.array_equal(large.files.load("latents")["latents"], list(steps)[-1].latents)
    with pytest.raises(CheckpointError, match=r"strength: 0\.5 there, 0\.9 here"):
        next(run_stages([replace(large, strength=0.9)], load))


def test_what_is_not_drawn_yet_cannot_be_enlarged(tmp_path):
    with pytest.raises(CheckpointError, match="none holds no run in stages"):
        next(run_stages([picture(tmp_path / "large", upscale_from=tmp_path / "none")], load))
    small = picture(tmp_path / "small")
    next(run_stages([small], load))
    with pytest.raises(CheckpointError, match="is not finished; finish it before upscaling"):
        next(run_stages([picture(tmp_path / "large", upscale_from=small.folder)], load))
    with pytest.raises(ValueError, match="strength is 0"):
        next(run_stages([picture(tmp_path / "large", strength=0)], load))
    assert not (tmp_path / "large").exists()


def test_the_hook_around_the_model_sees_every_call_of_the_scheduler():
    pipe: PixArtSigmaPipeline = load(("tokenizer", "text_encoder", "transformer", "scheduler"))
    seen = []

    def around(predict):
        def counted(latents, timestep):
            seen.append(timestep)
            return predict(latents, timestep)

        return counted

    steps = list(pipe.sample("a cup", height=64, width=64, num_inference_steps=3, wrap_predict=around))
    assert seen == [step.timestep for step in steps[1:]]


def test_a_scheduler_with_two_predictions_for_each_step_resumes_too(tmp_path):
    whole, stopped = (picture(tmp_path / name, drawn=(64, 64), size=(64, 64), tile=64) for name in ("whole", "stopped"))
    finished(whole, lambda names: load(names, "heun"))
    stages = run_stages([stopped], lambda names: load(names, "heun"))
    for part in stages:
        if (part.stage, part.done) == ("denoise", 3):
            stages.close()
    parts = finished(stopped, lambda names: load(names, "heun"))
    assert [part.done for part in parts if part.stage == "denoise"][1:] == [4, 5, 6]
    assert np.array_equal(whole.pixels(), stopped.pixels())
