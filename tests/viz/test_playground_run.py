"""The playground's runs, history and files, without widgets."""

import asyncio
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from playground_pipe import CUP, Pipe, expected_image

from pixart_nb.config import check_config
from pixart_nb.core.sampling.images import read_parameters
from pixart_nb.viz.pixels import png_bytes, tiles
from pixart_nb.viz.playground_run import Session, State, history_figure, save_entry, thinned


def sampled(session, parameters):
    return asyncio.run(session.sample(parameters))


# ---- the run


def test_a_run_ends_with_the_images_of_its_seed_in_the_history():
    session = Session(Pipe())
    entry = sampled(session, replace(CUP, count=3))
    assert (session.state, session.entry, session.history) == (State.IDLE, entry, [entry])
    assert (entry.number, entry.parameters.count, session.progress.done) == (1, 3, 5)
    assert entry.images.dtype == np.uint8
    for number in range(3):
        np.testing.assert_array_equal(entry.images[number], expected_image(CUP, number))
    np.testing.assert_array_equal(session.images, entry.images)


def test_other_tasks_run_between_two_steps():
    ticks, seen = [0], []

    async def tick():
        while True:
            ticks[0] += 1
            await asyncio.sleep(0)

    async def main():
        ticking = asyncio.ensure_future(tick())
        await Session(Pipe(lambda: seen.append(ticks[0]))).sample(CUP)
        ticking.cancel()

    asyncio.run(main())
    assert np.diff(seen).min() >= 1


def cancelled_at(step, **changes):
    """A session whose run is cancelled while that step, counted from 1, is computed."""
    session = Session(pipe := Pipe())

    async def main():
        loop, computed = asyncio.get_running_loop(), []

        def compute():
            computed.append(1)
            if len(computed) == step:
                loop.call_soon(session.cancel)

        pipe.step_cost = compute
        return await session.sample(replace(CUP, **changes)), len(computed)

    return session, *asyncio.run(main())


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_cancelled_run_ends_after_the_step_it_was_at_and_leaves_nothing_behind(step):
    session, entry, computed = cancelled_at(step)
    assert (entry, computed) == (None, step)
    assert (session.state, session.entry, session.history, session.pipe.closed) == (State.IDLE, None, [], 1)
    assert session.progress.done == step
    assert sampled(session, CUP).number == 1


def test_a_run_can_be_cancelled_while_its_images_are_decoded():
    session = Session(pipe := Pipe())

    def decode():
        if session.progress.done == 5:
            session.cancel()

    pipe.decode_cost = decode
    assert sampled(session, replace(CUP, count=4)) is None
    assert sum(rows for rows, *_ in pipe.decoded if rows == 1) == 1
    assert session.state is State.IDLE


def test_cancel_without_a_run_does_nothing():
    session = Session(Pipe())
    session.cancel()
    assert session.state is State.IDLE
    assert sampled(session, CUP) is not None


def test_a_second_run_at_once_is_refused_and_the_first_goes_on():
    async def main():
        session = Session(Pipe())
        first = asyncio.ensure_future(session.sample(CUP))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="a run is under way"):
            await session.sample(CUP)
        return await first, session.history

    entry, history = asyncio.run(main())
    assert history == [entry]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "  \n"}, "the prompt is empty; write what to draw"),
        ({"count": 0}, "number of images is 0; expected at least 1"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"height": 30}, "30x48; both must be multiples of 16"),
    ],
)
def test_wrong_parameters_are_refused_and_the_session_stays_usable(change, message):
    session = Session(Pipe())
    with pytest.raises(ValueError, match=message):
        sampled(session, replace(CUP, **change))
    assert (session.state, session.history) == (State.IDLE, [])
    assert sampled(session, CUP).number == 1


def test_the_chosen_scheduler_is_used_and_the_pipeline_keeps_its_own():
    session = Session(Pipe())
    sampled(session, replace(CUP, scheduler="euler"))
    with pytest.raises(ValueError, match="multiples"):
        sampled(session, replace(CUP, height=30, scheduler="unipc"))
    assert session.pipe.used == ["euler"]
    assert session.pipe.scheduler == "own"


class Clock:
    """Seconds that pass only when something is computed."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def cost(self, seconds):
        return lambda: setattr(self, "now", self.now + seconds)


@pytest.mark.parametrize(("decode_cost", "previews"), [(0.1, 39), (1.0, 10), (30.0, 1)])
def test_previews_take_a_small_share_of_the_time(decode_cost, previews):
    pipe, clock = Pipe(), Clock()
    pipe.step_cost, pipe.decode_cost = clock.cost(1.0), clock.cost(decode_cost)
    sampled(Session(pipe, clock=clock), replace(CUP, steps=40, count=2))
    shown = [shape for shape in pipe.decoded if shape[0] == 2]
    assert len(shown) == pytest.approx(previews, abs=2)
    assert len(pipe.decoded) == len(shown) + 2  # and each finished image by itself


def test_what_is_shown_approaches_the_finished_image():
    shown, session = [], Session(Pipe(), clock=Clock())  # nothing takes time, so every preview is due
    session._on_change = lambda: shown.append(session.images)
    entry = sampled(session, CUP)
    distances = [np.abs(images.astype(int) - entry.images).mean() for images in shown if images is not None]
    assert len(set(distances)) == 5
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == 0


def test_progress_tells_the_seconds_that_are_left():
    pipe, clock, told = Pipe(), Clock(), []
    pipe.step_cost = clock.cost(2.0)
    session = Session(pipe, lambda: told.append((session.progress.done, session.progress.seconds_left)), clock=clock)
    sampled(session, CUP)
    assert told[0] == (0, None)
    assert {(1, 8.0), (2, 6.0), (3, 4.0), (4, 2.0), (5, 0.0)} <= set(told)


@pytest.mark.parametrize(
    ("shape", "thin"),
    [((1, 4, 16, 32), (1, 4, 16, 32)), ((2, 4, 128, 128), (2, 4, 32, 32)), ((1, 4, 64, 256), (1, 4, 8, 32))],
)
def test_large_latents_are_thinned_for_a_preview(shape, thin):
    assert thinned(np.zeros(shape)).shape == thin


def test_the_history_keeps_the_latest_entries_and_goes_back_to_any():
    session = Session(Pipe(), history_limit=3)
    entries = [sampled(session, replace(CUP, seed=seed)) for seed in range(5)]
    assert session.history == entries[2:]
    assert [entry.number for entry in entries] == [1, 2, 3, 4, 5]
    session.show(entries[2])
    assert session.entry is entries[2]
    np.testing.assert_array_equal(session.images, entries[2].images)


def test_parameters_are_a_configuration_that_the_command_understands():
    config = check_config(replace(CUP, scheduler="dpm++").configuration(2) | {"model": "m"})
    assert (config.prompt, config.image_height, config.image_width) == (["a red cup"], 32, 48)
    assert (config.seed, config.first_image, config.sampling_steps) == (3, 2, 5)
    assert not config.use_resolution_binning


# ---- images


def test_tiles_hold_every_image_with_clear_gaps():
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 64, 3), dtype=np.uint8)
    sheet = tiles(images)
    assert sheet.shape == (2 * 32 + 2, 3 * 64 + 4, 4)
    np.testing.assert_array_equal(sheet[34:66, 66:130, :3], images[4])
    assert not sheet[32:34].any()
    assert not sheet[34:, 132:].any()
    assert sheet[:32, :64, 3].min() == 255


def test_a_thumbnail_keeps_its_shape():
    assert Image.open(io.BytesIO(png_bytes(np.zeros((100, 400, 3), np.uint8), 200))).size == (200, 50)
    assert Image.open(io.BytesIO(png_bytes(np.zeros((10, 40, 3), np.uint8), 200))).size == (40, 10)


def test_saved_images_carry_what_repeats_each(tmp_path):
    entry = sampled(Session(Pipe()), replace(CUP, prompt="A Red/../cup!", count=2))
    paths = save_entry(entry, tmp_path / "new", {"model": "m"})
    assert [path.name for path in paths] == ["a-red-cup_seed-3_0.png", "a-red-cup_seed-3_1.png"]
    for number, path in enumerate(paths):
        assert read_parameters(path) == entry.parameters.configuration(number) | {"model": "m"}
        np.testing.assert_array_equal(np.asarray(Image.open(path)), entry.images[number])


def test_saving_never_replaces_another_image(tmp_path):
    session = Session(Pipe())
    first, other = sampled(session, CUP), sampled(session, replace(CUP, guidance=2.0))
    names = [save_entry(entry, tmp_path)[0].name for entry in (first, other, first, other)]
    assert names == ["a-red-cup_seed-3_0.png", "a-red-cup_seed-3_0-2.png"] * 2
    (tmp_path / "a-red-cup_seed-3_0.png").write_bytes(b"not an image")
    assert save_entry(first, tmp_path)[0].name == "a-red-cup_seed-3_0-3.png"
    assert (tmp_path / "a-red-cup_seed-3_0.png").read_bytes() == b"not an image"


def test_the_history_as_a_figure_shows_each_entry_with_its_parameters():
    session = Session(Pipe())
    sampled(session, CUP)
    sampled(session, replace(CUP, count=4, prompt="a blue cup"))
    figure = history_figure(session.history)
    titles = [" · ".join(place.get_title().splitlines()) for place in figure.axes]  # they break at dots
    assert titles == [f"{entry.number}: {entry.parameters.summary}" for entry in session.history]
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), session.history[0].images[0])
    assert figure.axes[1].images[0].get_array()[32, 0].tolist() == [255, 255, 255]  # a gap
    with pytest.raises(ValueError, match="the history is empty; sample something first"):
        history_figure([])
