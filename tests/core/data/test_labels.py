"""Label files are checked as a whole: everything that is wrong is in one list, and nothing else stops them."""

import json
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pixart_nb.core.data.files import SHOWN
from pixart_nb.core.data.labels import LabelError, caption_problem, load_labels


@pytest.fixture
def folder(tmp_path):
    """Three images, (height, width) = (8, 12), and a fourth outside."""
    images = tmp_path / "images"
    images.mkdir()
    for path in (*(images / f"{n}.png" for n in "abc"), tmp_path / "secret.png"):
        Image.new("RGB", (12, 8)).save(path)
    return images


def entry(path="a.png", prompt="a cat", **more):
    return {"path": path, "prompt": prompt, **more}


def load(folder, entries, **options):
    path = folder.parent / "labels.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    return load_labels(path, folder, **options)


def problems(folder, entries, **options):
    with pytest.raises(LabelError) as caught:
        load(folder, entries, **options)
    return caught.value.problems


def test_the_shipped_labels_are_sound_and_stay_in_order(project):
    folder = project / "data" / "pixelart"
    labels = load_labels(folder / "labels.json", folder, decode=True)
    written = json.loads((folder / "labels.json").read_text())
    assert [label.as_json() for label in labels] == written
    assert all(label.file.is_file() for label in labels)


def test_only_path_and_prompt_are_required(folder):
    (label,) = load(folder, [entry(other="kept out")])
    assert (label.sharegpt4v, label.height, label.width, label.ratio) == ("", 8, 12, 8 / 12)


@pytest.mark.parametrize("absent", [None, ""])
def test_a_description_may_be_absent(folder, absent):
    assert load(folder, [entry(sharegpt4v=absent)])[0].sharegpt4v == ""


def test_a_byte_order_mark_does_no_harm(folder):
    assert len(load(folder, "\ufeff" + json.dumps([entry()]))) == 1


def test_sizes_come_from_the_upright_image_and_contradictions_are_counted(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 8)).save(folder / "a.png", exif=exif)
    with pytest.warns(UserWarning, match="1 entries state another"):
        first, second = load(folder, [entry(height=8, width=12), entry("b.png", height=8, width=12)])
    assert (first.height, first.width) == (12, 8) and (second.height, second.width) == (8, 12)


def test_all_problems_are_named_at_once(folder):
    (folder / "b.png").write_bytes(b"no image")
    bad = [
        entry(prompt=" "),
        entry("b.png", 5, height="8"),
        "a cat",
        entry("missing.png"),
        {"path": "c.png"},
        entry("c.png", ratio=-1),
    ]
    found = problems(folder, [entry(), *bad])
    expected = {
        "entry 1: prompt is empty",
        "entry 2: prompt is 5 (int)",
        "entry 2: height is '8' (str)",
        "entry 2: path 'b.png': ",
        "entry 3: is 'a cat' (str)",
        "entry 4: path 'missing.png': ",
        "entry 5: prompt is missing",
        "entry 6: ratio is -1 (int)",
    }
    assert len(found) == len(expected)
    assert all(any(problem.startswith(start) for problem in found) for start in expected), found


def test_of_a_long_list_the_first_are_shown_and_the_others_counted(folder):
    with pytest.raises(LabelError, match="100 problems") as caught:
        load(folder, [entry(prompt="")] * 100)
    lines = str(caught.value).splitlines()
    assert len(lines) == SHOWN + 2 and lines[-1].strip() == f"and {100 - SHOWN} more"


@pytest.mark.parametrize("path", ["../secret.png", "x/../../secret.png", "/etc/passwd", "\0", ""])
def test_a_path_that_leaves_the_folder_is_refused(folder, path):
    (problem,) = problems(folder, [entry(path)])
    assert "leaves the folder" in problem or "expected a path relative" in problem


def test_an_absolute_path_is_refused_even_into_the_folder(folder):
    (problem,) = problems(folder, [entry(str(folder / "a.png"))])
    assert "expected a path relative" in problem


def test_the_folder_itself_may_be_a_link_and_paths_may_wander_within(folder):
    (folder / "sub").mkdir()
    link = folder.parent / "elsewhere"
    link.symlink_to(folder)
    assert len(load(link, [entry("sub/../a.png")])) == 1


def test_links_that_are_in_the_folder_are_followed_and_no_path_goes_up_through_them(folder):
    (folder / "link").symlink_to(folder.parent)
    (folder / "link.png").symlink_to("../secret.png")
    for path in ("link.png", "link/secret.png"):
        (label,) = load(folder, [entry(path)])
        assert (label.path, label.file) == (path, folder / path)
    assert load(folder, [entry("link/../a.png")])[0].file == folder / "a.png"
    assert "leaves the folder" in problems(folder, [entry("link/../../secret.png")])[0]
    (folder / "gone.png").symlink_to("nowhere.png")
    assert "a link whose target is missing" in problems(folder, [entry("gone.png")])[0]


def test_an_image_that_is_named_again_gets_more_captions(folder):
    entries = [entry(), entry("b.png"), entry("./a.png", "a pet", sharegpt4v="a grey cat"), entry()]
    with pytest.warns(UserWarning, match="2 entries name an image again; their captions were added"):
        first, second = load(folder, entries)
    assert first.captions == ("a cat", "a pet", "a grey cat") and second.captions == ("a cat",)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ('[\n  {"path": "a.png", "prompt": "a cat, ]", "ratio": 0.6667,},\n]', ("a cat, ]",)),
        ('[{"path": "a.png", "prompt": "a \\",}\\\\",},]', ('a ",}\\',)),
        ('{"path": "a.png", "prompt": "a cat"}\n', ("a cat",)),
        ('{"file_name": "a.png", "text": "a cat"}\n\n{"file_name": "a.png", "text": "a pet"}\n', ("a cat", "a pet")),
        ('[{"image": "a.png", "caption": "a cat"}]', ("a cat",)),
        ('[{"path": "a.png", "prompt": ["a cat", "a pet", "a cat"]}]', ("a cat", "a pet")),
        ('[{"path": "a.png", "prompt": "a cat", "captions": ["a cat", "a pet"]}]', ("a cat", "a pet")),
        ('[{"path": "a.png", "prompts": ["a cat"], "sharegpt4v": null}]', ("a cat",)),
        ('[{"path": "a.png", "prompt": null, "text": "a cat"}]', ("a cat",)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*name an image again")
def test_labels_as_people_write_them_are_read(folder, text, prompts):
    (label,) = load(folder, text)
    assert label.prompts == prompts
    with_captions = [label.as_json()]
    assert load(folder, with_captions) == [label]


def test_a_table_may_have_spaces_after_its_commas(folder):
    (folder.parent / "t.csv").write_text('path, prompt\na.png, "a cat, asleep"\n')
    (label,) = load_labels(folder.parent / "t.csv", folder)
    assert label.prompts == ("a cat, asleep",)


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_name_with_accents_is_found_in_both_forms_of_unicode(folder, stored):
    name = "\u00e9t\u00e9 \U0001f600.png"
    (folder / "a.png").rename(folder / unicodedata.normalize(stored, name))
    for form in ("NFC", "NFD"):
        (label,) = load(folder, [entry(unicodedata.normalize(form, name))])
        assert label.file.is_file()


@pytest.mark.parametrize("content", ['["' + '\\"' * 200_000, "[" + ", " * 400_000, '[{"a": ' * 50_000])
def test_a_long_broken_file_is_refused_at_once(folder, content):
    started = time.process_time()
    assert "is not JSON" in problems(folder, content)[0]
    assert time.process_time() - started < 2


def test_a_pipe_in_place_of_an_image_does_not_hang(folder):
    os.mkfifo(folder / "pipe.png")
    assert "is a folder, pipe or device" in problems(folder, [entry("pipe.png")])[0]
    assert "is a folder, pipe or device" in problems(folder, [entry(".")])[0]


def test_a_pointer_of_git_lfs_is_named(folder):
    (folder / "a.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git lfs pull" in problems(folder, [entry()])[0]


def test_a_cut_image_is_found_when_all_are_decoded(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    os.truncate(folder / "a.png", 6000)
    assert len(load(folder, [entry(), entry("b.png")])) == 2
    (problem,) = problems(folder, [entry(), entry("b.png")], decode=True)
    assert "entry 0" in problem and "cut off or damaged" in problem


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is not JSON"),
        ("[{]", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("{}", "holds a dict"),
        ('"text"', "holds a str"),
        ("[]", "is an empty list"),
    ],
)
def test_a_file_that_is_no_list_of_labels_is_named(folder, content, expected):
    assert expected in problems(folder, content)[0]


def test_missing_places_are_named(folder, tmp_path):
    with pytest.raises(LabelError, match=r"nothing\.json.*\n.*cannot be read"):
        load_labels(tmp_path / "nothing.json", folder)
    with pytest.raises(LabelError, match="image_dir"):
        load(tmp_path / "nowhere", [entry()])


@pytest.mark.parametrize("text", ["a cat", "猫", "🐈", "ein Bär", "x"])
def test_text_of_any_language_is_a_caption(text):
    assert caption_problem("prompt", text) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["path", "prompt", "sharegpt4v", "height", "ratio", "x"]), inner, max_size=5)
    ),
    max_leaves=12,
)


ENTRY = st.fixed_dictionaries({"path": st.just("a.png") | JSON, "prompt": JSON})


@given(JSON | st.lists(ENTRY, min_size=1, max_size=3))
def test_whatever_the_json_says_it_is_read_or_named(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    if not (folder / "a.png").exists():
        Image.new("RGB", (4, 4)).save(folder / "a.png")
    try:
        labels = load(folder, value)
    except LabelError:
        return
    assert [label.path for label in labels] == ["a.png"] and labels[0].prompt.strip()


def test_damaged_files_are_handled_or_named(tmp_path):
    """350 of them; ``python tests/damaged_data.py FOLDER 1001`` reads as many as one likes."""
    script = Path(__file__).parents[2] / "damaged_data.py"
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "350", "--quiet"], capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    told = json.loads(run.stdout)
    found = {kind: Counter(outcomes) for kind, outcomes in told["found"].items()}
    assert sum(outcomes.total() for outcomes in found.values()) == 350
    assert found.pop("entries") == {"named": 50}
    assert all(outcomes["named"] > 15 and outcomes["handled"] > 1 for outcomes in found.values()), found
    assert max(told["slowest"].values()) < 5 and told["grown_megabytes"] < 100, told
    shutil.rmtree(tmp_path)
