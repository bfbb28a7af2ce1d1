"""The playground without a browser: its widgets, and its place in a kernel."""

import asyncio
import io
import json
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel
from PIL import Image
from playground_pipe import CUP, Pipe, expected_image

from pixart_nb.core.sampling.images import read_parameters
from pixart_nb.viz.playground import Playground
from pixart_nb.viz.playground_run import Parameters


def played(act, pipe=None, **start):
    """Run ``act(playground)`` where an event loop runs, as in a kernel, and give back the playground."""

    async def main():
        playground = Playground(
            pipe or Pipe(),
            [(32, 48), (48, 32), (30, 30)],
            ["dpm++", "euler"],
            **{"prompt": "a red cup", "steps": 5} | start,
        )
        await act(playground)
        return playground

    return asyncio.run(main())


async def pressed(playground, button="sample"):
    getattr(playground.view, button).click()
    if playground._loop.task:
        await asyncio.wait([playground._loop.task])


def shown(playground):
    return np.asarray(Image.open(io.BytesIO(playground.view.image.png)).convert("RGB"))


def test_pressing_sample_shows_the_image_and_what_it_is():
    playground = played(pressed)
    assert (shown(playground) == expected_image(replace(CUP, seed=0), 0)).all()
    assert playground.view.caption.value.startswith(playground.parameters.summary + " · ")
    assert [len(playground.view.cards.children), playground.view.message.value] == [1, ""]


def test_the_controls_are_the_parameters_both_ways():
    def change(playground):
        playground.parameters = wanted
        assert playground.parameters == wanted
        return asyncio.sleep(0)

    wanted = Parameters("x", 48, 32, "y", 33, 7.25, "euler", 12, 4)
    playground = played(change)
    assert playground.controls["size"].label == "32 x 48, tall"
    assert playground.controls["guidance"].value == 7.25


def test_an_example_becomes_the_prompt_and_can_be_chosen_again():
    playground = Playground(Pipe(), [(32, 48)], examples=["a red cup", "a blue fish"], prompt="x")
    view, prompt = playground.view, playground.controls["prompt"]
    for _ in range(2):
        view.examples.value = "a blue fish"
        assert [prompt.value, view.examples.value] == ["a blue fish", ""]
        prompt.value = "edited"
    assert view.examples.layout.display == ""
    assert Playground(Pipe(), [(32, 48)]).view.examples.layout.display == "none"


def test_parameters_beyond_the_controls_widen_them():
    playground = Playground(Pipe(), [(32, 48)], seed=2**40)
    assert playground.parameters.seed == 2**40
    wanted = Parameters("x", 64, 80, "y", 60, 20.0, "ddim", 12, 16)
    playground.parameters = wanted
    assert playground.parameters == wanted
    with pytest.raises(ValueError, match=r"controls reach .*seed=0.* only; asked for .*seed=-1"):
        playground.parameters = replace(wanted, seed=-1)


def test_a_card_of_a_sweep_beyond_the_sliders_comes_back_with_its_image():
    async def act(playground):
        (wide,) = await playground.sweep("guidance", "20")
        await pressed(playground)
        playground.restore(wide)
        return wide

    playground = Playground(Pipe(), [(32, 48)], prompt="a red cup", steps=3)
    wide = asyncio.run(act(playground))
    assert playground.session.entry is wide
    assert playground.parameters == wide.parameters


def test_a_card_that_is_clicked_again_shows_its_last_step():
    async def act(playground):
        entry = await playground.sample()
        playground.view.step.value = 1
        playground.restore(entry)
        return entry

    playground = Playground(Pipe(), [(32, 48)], prompt="a red cup", steps=3)
    entry = asyncio.run(act(playground))
    assert playground.view.step.value == 3
    assert playground.session.images is entry.images


def test_it_begins_with_the_parameters_given_even_outside_the_choices():
    wanted = Parameters("x", 64, 80, "y", 120, 20.0, "ddim", 12, 16)
    playground = Playground(Pipe(), [(32, 48)], ["dpm++"], **vars(wanted))
    assert playground.parameters == wanted
    assert len(playground.controls["size"].options) == 2


def test_only_buttons_that_do_something_can_be_pressed():
    seen = []

    def look(playground):
        view = playground.view
        buttons = (view.sample, view.cancel, view.save)
        seen.append(("".join("-X"[not b.disabled] for b in buttons), view.progress.layout.display))

    async def act(playground):
        look(playground)
        playground.view.sample.click()
        await asyncio.sleep(0)
        look(playground)
        playground.view.sample.click()  # twice is not two runs
        playground.view.cancel.click()
        look(playground)
        await playground._loop.task
        look(playground)
        await pressed(playground)
        look(playground)

    playground = played(act)
    assert seen == [("X--", "none"), ("-X-", "flex"), ("---", "flex"), ("X--", "none"), ("X-X", "none")]
    assert len(playground.history) == 1


def test_words_that_the_model_does_not_know_are_named_and_forgotten_with_the_next_run():
    class Reader(Pipe):
        def _steps(self, noise, count):
            if len(self.used) == 1:
                warnings.warn("'castle' is not in the training captions of this model", stacklevel=2)
            yield from super()._steps(noise, count)

    texts = []

    async def act(playground):
        for _ in range(2):
            await playground.sample()
            texts.append(playground.view.message.value)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        played(act, Reader())
    assert "castle" in texts[0] and "castle" not in texts[1]


def test_a_cancelled_run_says_after_which_step():
    async def act(playground):
        playground.session.pipe.step_cost = lambda: asyncio.get_running_loop().call_soon(playground.view.cancel.click)
        await pressed(playground)

    playground = played(act)
    assert playground.view.message.value == "Cancelled after step 1 of 5."
    assert playground.history == []
    assert shown(playground).size > 0


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"height": 30, "width": 30}, "height and width are 30x30; both must be multiples of 16"),
        ({"prompt": "a &lt;b&gt;cup&lt;/b&gt;"}, ""),
    ],
)
def test_what_is_wrong_is_a_line_in_the_widget(start, message, capfd):
    playground = played(pressed, **start)
    assert message in playground.view.message.value
    assert ("pixart-wrong" in playground.view.message._dom_classes) == bool(message)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert not playground.view.sample.disabled


def test_a_failure_of_the_model_is_named_and_the_next_run_clears_it():
    pipe = Pipe()

    def fail():
        pipe.step_cost = lambda: None
        raise MemoryError("no room for 3 GB")

    async def act(playground):
        pipe.step_cost = fail
        await pressed(playground)
        assert playground.view.message.value == "MemoryError: no room for 3 GB"
        await pressed(playground)

    playground = played(act, pipe)
    assert (playground.view.message.value, len(playground.history)) == ("", 1)
    assert "pixart-wrong" not in playground.view.message._dom_classes


def test_called_by_code_errors_are_raised_too():
    with pytest.raises(ValueError, match="the prompt is empty"):
        played(lambda playground: playground.sample(), prompt="")


def test_texts_are_shown_as_they_are():
    playground = played(pressed, prompt="<script>alert(1)</script> & more")
    assert playground.view.caption.value.startswith("&lt;script&gt;alert(1)&lt;/script&gt; &amp; more")


def test_a_card_of_the_history_brings_back_its_parameters_and_image():
    async def act(playground):
        await pressed(playground)
        playground.parameters = replace(playground.parameters, seed=9, prompt="a blue cup", scheduler="euler")
        await pressed(playground)
        newest, oldest = playground.view.cards.children
        assert "pixart-chosen" in newest._dom_classes
        oldest.children[1].click()
        assert "pixart-chosen" in oldest._dom_classes
        assert "pixart-chosen" not in newest._dom_classes

    playground = played(act)
    assert playground.parameters == playground.history[0].parameters
    assert (shown(playground) == playground.history[0].images[0]).all()
    assert playground.view.cards.children[1].children[1].description == "1: a red cup"


def test_the_old_image_does_not_stand_under_a_new_prompt():
    seen = []

    async def act(playground):
        await pressed(playground)
        playground.session.pipe.step_cost = lambda: seen.append(
            (shown(playground).shape, playground.view.caption.value)
        )
        await pressed(playground)

    played(act)
    assert seen[0] == ((1, 1, 3), "")


def test_the_steps_of_a_run_can_be_looked_at_again():
    async def act(playground):
        playground.view.step.value = 3
        await pressed(playground)
        first = playground.history[0]
        assert (playground.view.step.value, playground.view.step.max) == (5, 5)
        assert (shown(playground) == first.images[0]).all()
        playground.view.step.value = 2
        assert np.abs(shown(playground).astype(float) - 2 / 5 * first.images[0]).max() <= 1
        playground.view.step.value = 5
        assert (shown(playground) == first.images[0]).all()
        assert playground.session.entry is first

    played(act)


def test_one_parameter_is_swept_and_all_of_its_images_are_shown_and_kept():
    async def act(playground):
        playground.view.swept.value, playground.view.values.value = "seed", "3, 7,11"
        await pressed(playground, "sweep")

    playground = played(act)
    assert [entry.parameters.seed for entry in playground.history] == [3, 7, 11]
    assert shown(playground).shape == (65, 97, 3)
    assert (shown(playground)[:32, :48] == playground.history[0].images[0]).all()
    assert playground.view.caption.value == "a red cup: seed 3, 7, 11, in reading order. Each is in the history."
    assert playground.view.save.disabled


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("steps", "2, x", "the values of steps are '2, x'; expected numbers"),
        ("guidance", " ,", "0 values of guidance were given; expected 1 to 24"),
        ("height", "16", "'height' cannot be swept; expected one of guidance, steps, seed, scheduler"),
    ],
)
def test_values_that_cannot_be_swept_are_refused(name, values, message):
    with pytest.raises(ValueError, match=message):
        played(lambda playground: playground.sweep(name, values))


def test_a_saved_image_gives_its_parameters_back(tmp_path):
    first = played(pressed, folder=tmp_path, height=48, width=64, scheduler="ddim", steps=3, guidance=2.5, seed=8)
    (path,) = first.save()
    other = Playground(Pipe(), [(32, 48)], prompt="x")
    other.load(path)
    assert other.parameters == first.parameters
    upload = {"type": "image/png", "size": 1, "last_modified": datetime.now(timezone.utc)}
    other.view.load.value = [upload | {"name": "cup.png", "content": path.read_bytes()}]
    assert other.view.message.value == "Parameters of cup.png; Sample draws it again."
    other.view.load.value = [upload | {"name": "x.png", "content": b"no"}]
    assert "x.png cannot be read as a PNG" in other.view.message.value
    assert other.parameters == first.parameters


def test_save_writes_what_is_shown_and_says_where(tmp_path):
    async def act(playground):
        assert playground.save() == []
        assert "no finished image to save" in playground.view.message.value
        await pressed(playground)
        await pressed(playground, "save")

    playground = played(act, folder=tmp_path, others={"model": "m"})
    path = tmp_path / "a-red-cup_seed-0_0.png"
    assert playground.view.message.value == f"Saved {path}"
    assert read_parameters(path) == playground.parameters.configuration(0) | {"model": "m"}


def test_a_folder_that_cannot_be_written_is_a_line_in_the_widget(tmp_path):
    (tmp_path / "file").touch()
    playground = played(pressed, folder=tmp_path / "file")
    assert playground.save() == []
    assert "could not be written" in playground.view.message.value
    assert "file" in playground.view.message.value


def test_seeds_go_on_by_one_or_at_random():
    async def act(playground):
        await pressed(playground, "next_seed")
        assert playground.parameters.seed == 1
        await pressed(playground, "random_seed")

    assert played(act).parameters.seed not in (0, 1)


def test_a_press_on_another_thread_acts_on_the_kernels_loop():
    threads = []

    async def act(playground):
        playground.session.pipe.step_cost = lambda: threads.append(threading.current_thread())
        presser = threading.Thread(target=playground.view.sample.click)
        presser.start()
        presser.join()
        while not playground.history:
            await asyncio.sleep(0.01)

    played(act)
    assert set(threads) == {threading.main_thread()}


def test_it_shows_itself_as_a_widget():
    bundle = Playground(Pipe(), [(32, 48)])._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == "Playground: run this cell to use it"


def test_there_must_be_something_to_choose_from():
    with pytest.raises(ValueError, match="need a size and a scheduler"):
        Playground(Pipe(), [])


def test_the_playground_does_not_load_mindspore():
    check = "import sys, pixart_nb.viz.playground; print('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout.strip() == "False"


# ---- in a kernel

IN_KERNEL = """
import json, sys, time
sys.path[:0] = {path}
from playground_pipe import Pipe
from pixart_nb.viz.playground import Playground
def compute(end=0.15, stamps=[]):
    stamps.append(time.time())
    while time.time() < stamps[-1] + end:
        pass
playground = Playground(Pipe(compute), [(32, 48)], prompt="a red cup", steps=50)
stamps = compute.__defaults__[1]
print(json.dumps([button.comm.comm_id for button in (playground.view.sample, playground.view.cancel)]))
"""


def printed(client, code):
    out = []
    client.execute_interactive(code, output_hook=lambda message: out.append(message["content"]), timeout=120)
    return json.loads("".join(content["text"] for content in out if content.get("name") == "stdout"))


def pressed_in_kernel(client, comm, subshell):
    content = {"comm_id": comm, "data": {"method": "custom", "content": {"event": "click"}}}
    message = client.session.msg("comm_msg", content)
    message["header"]["subshell_id"] = subshell
    client.shell_channel.send(message)
    return time.time()


@pytest.mark.notebook
@pytest.mark.parametrize("by_cell", [False, True], ids=["started by a press", "started by a cell"])
@pytest.mark.parametrize("in_subshell", [False, True], ids=["main shell", "subshell"])
def test_in_a_kernel_cancel_waits_for_one_step_and_no_more(in_subshell, by_cell):
    """Jupyter front ends deliver presses in the kernel's main shell or, as JupyterLab does, in a subshell."""
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        sample, cancel = printed(client, IN_KERNEL.format(path=sys.path))
        subshell = None
        if in_subshell:
            client.control_channel.send(client.session.msg("create_subshell_request"))
            subshell = client.control_channel.get_msg(timeout=30)["content"]["subshell_id"]
        if by_cell:
            client.execute("await playground.sample()")
        else:
            pressed_in_kernel(client, sample, subshell)
        time.sleep(1.5)
        at = pressed_in_kernel(client, cancel, subshell)
        time.sleep(1.5)
        code = "print(json.dumps([playground.session.state, playground.view.message.value, stamps]))"
        state, said, stamps = printed(client, code)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert state == "idle"
    assert said == f"Cancelled after step {len(stamps)} of 50."
    assert 1 < len(stamps) < 40
    assert sum(stamp > at for stamp in stamps) <= 2  # the message itself takes a moment to arrive
