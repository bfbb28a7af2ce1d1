"""Every published form of diffusiondb-pixelart gives the same labels, without names of users or unsafe pictures."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixart_nb.core.data.diffusiondb import import_diffusiondb
from pixart_nb.core.data.errors import DataError
from pixart_nb.core.data.labels import load_labels
from pixart_nb.core.errors import WriteError
from pixart_nb.pixelart.datasets import (
    METADATA,
    TABLE,
    finetuning_scenes,
    part_json,
    repeat_scenes,
    sample_rows,
    write_metadata,
    write_part,
    write_published,
    write_table,
)
from pixart_nb.pixelart.scenes import UNSEEN_OBJECTS, split_scenes

COUNT = 12


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The whole published layout, and its rows."""
    folder = tmp_path_factory.mktemp("published")
    return folder, write_published(folder, COUNT)


def unpacked(folder, target):
    """The parts unpacked, each into a folder of its own, with the metadata."""
    for path in sorted((folder / "images").glob("*.zip")):
        zipfile.ZipFile(path).extractall(target / "images" / path.stem)
    shutil.copy(folder / METADATA, target / METADATA)
    return target


def without_json(folder, target):
    """Pictures that only the metadata describe."""
    unpacked(folder, target)
    for path in target.rglob("*.json"):
        path.unlink()
    return target


FORMS = {
    "table": lambda folder, target: folder / TABLE,
    "folder of the table": lambda folder, target: folder / "2k_all",
    "everything": lambda folder, target: folder,
    "parts": lambda folder, target: folder / "images",
    "metadata": lambda folder, target: folder / METADATA,
    "unpacked": unpacked,
    "without json": without_json,
}


def labels_in(target, name="labels.json"):
    return json.loads((target / name).read_text(encoding="utf-8"))


def expected(rows):
    names = [f"images/{hashlib.sha256(row['png']).hexdigest()[:16]}.png" for row in rows]
    sizes = [(row["height"], row["width"]) for row in rows]
    return [
        {"path": path, "prompt": row["text"], "sharegpt4v": "", "height": h, "width": w, "ratio": h / w}
        for path, row, (h, w) in zip(names, rows, sizes, strict=True)
    ]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_labels_and_pictures(published, tmp_path, form):
    folder, rows = published
    source, target = FORMS[form](folder, tmp_path / "source"), tmp_path / "target"
    report = import_diffusiondb(source, target, max_nsfw=1, test_count=3)
    order = sorted(rows[:6], key=lambda r: r["name"]) + sorted(rows[6:], key=lambda r: r["name"])
    rows = order if form == "without json" else rows  # nothing else tells their order
    assert labels_in(target) == expected(rows[:-3])
    assert labels_in(target, "labels_test.json") == expected(rows[-3:])
    assert (report.training, report.testing, report.left_out, report.problems) == (COUNT - 3, 3, {}, [])
    for row, label in zip(rows, labels_in(target) + labels_in(target, "labels_test.json"), strict=True):
        assert (target / label["path"]).read_bytes() == row["png"]
    assert len(load_labels(target / "labels.json", target, decode=True)) == COUNT - 3


def test_one_part_alone_has_no_scores_and_says_so(published, tmp_path):
    folder, rows = published
    shutil.copy(folder / "images" / "part-000002.zip", tmp_path / "part-000002.zip")
    report = import_diffusiondb(tmp_path / "part-000002.zip", tmp_path / "target", test_count=0)
    assert labels_in(tmp_path / "target") == expected(rows[6:])
    assert "no NSFW scores" in report.notes[0] and report.testing == 0
    assert not (tmp_path / "target" / "labels_test.json").exists()


def test_one_part_finds_the_metadata_above_it(published, tmp_path):
    folder, rows = published
    report = import_diffusiondb(folder / "images" / "part-000001.zip", tmp_path, max_nsfw=0.15, test_count=0)
    assert not report.notes
    assert labels_in(tmp_path) == expected([row for row in rows[:6] if row["image_nsfw"] <= 0.15])


@pytest.mark.parametrize("form", ["table", "parts"])
def test_names_of_users_are_nowhere(published, tmp_path, form):
    folder, rows = published
    import_diffusiondb(FORMS[form](folder, None), tmp_path, test_count=3)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(row["user_name"].encode() in written for row in rows)
    assert b"timestamp" not in written


def test_scores_filter_and_the_split_stays_where_it_is(published, tmp_path):
    folder, rows = published
    limit = float(np.median([row["image_nsfw"] for row in rows]))
    report = import_diffusiondb(folder, tmp_path, max_nsfw=limit, test_count=4)
    kept = [max(row["image_nsfw"], row["prompt_nsfw"]) <= limit for row in rows]
    safe = [[row for row, keep in zip(part, keeps, strict=True) if keep] for part, keeps in
            ((rows[:-4], kept[:-4]), (rows[-4:], kept[-4:]))]  # fmt: skip
    assert labels_in(tmp_path) == expected(safe[0])
    assert labels_in(tmp_path, "labels_test.json") == expected(safe[1])
    assert report.left_out == {f"with an NSFW score above {limit:g}": kept.count(False)}


@pytest.mark.parametrize("score", [2.0, 0.6, float("nan"), None])
@pytest.mark.parametrize("column", ["image_nsfw", "prompt_nsfw"])
def test_either_score_leaves_a_row_out_and_so_does_an_unknown_one(tmp_path, column, score):
    rows = sample_rows(4)
    rows[1][column] = score
    report = import_diffusiondb(write_table(tmp_path / "t.parquet", rows), tmp_path / "target", test_count=1)
    assert labels_in(tmp_path / "target") == expected([rows[0], rows[2]])
    assert sum(report.left_out.values()) == 1


def test_pictures_that_the_metadata_do_not_know_are_left_out(tmp_path):
    rows = sample_rows(5)
    write_part(tmp_path / "part-000001.zip", rows)
    write_metadata(tmp_path / "metadata.parquet", rows[:3])
    report = import_diffusiondb(tmp_path / "part-000001.zip", tmp_path / "target", test_count=0)
    assert labels_in(tmp_path / "target") == expected(rows[:3])
    assert report.left_out == {"without an NSFW score": 2}


def test_only_pictures_and_prompts_are_required(tmp_path):
    rows = sample_rows(3)
    names = pq.read_schema(write_table(tmp_path / "t.parquet", rows)).names
    write_table(tmp_path / "t.parquet", rows, drop=[name for name in names if name not in ("image", "text")])
    assert import_diffusiondb(tmp_path / "t.parquet", tmp_path / "target", test_count=1).training == 2


def test_what_cannot_be_used_is_named_row_by_row_and_the_others_are_kept(tmp_path):
    rows = sample_rows(8)
    rows[1]["png"] = rows[1]["png"][:-200]
    rows[2]["text"] = "  "
    rows[3]["png"] = b"no picture"
    rows[4]["png"] = None
    rows[5]["text"] = None
    rows[6]["png"] = rows[0]["png"]
    report = import_diffusiondb(write_table(tmp_path / "t.parquet", rows), tmp_path / "target", test_count=1)
    assert labels_in(tmp_path / "target") == expected([rows[0]])
    assert [problem.split(":")[0] for problem in report.problems] == [
        f"t.parquet row {n}" for n in range(1, 6)
    ]
    assert report.left_out["that an earlier row has too"] == 1
    assert "cut or damaged" in report.problems[0] and "row 5" in str(report)


def test_a_picture_of_the_test_set_is_never_trained_on(tmp_path):
    rows = sample_rows(6)
    rows[5]["png"] = rows[0]["png"]
    import_diffusiondb(write_table(tmp_path / "t.parquet", rows), tmp_path / "target", test_count=2)
    names = ("labels.json", "labels_test.json")
    names = ("labels.json", "labels_test.json")
    sides = [{label["path"] for label in labels_in(tmp_path / "target", name)} for name in names]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 5


def test_a_zip_part_whose_json_names_what_is_not_there(tmp_path):
    rows = sample_rows(3)
    said = part_json(rows) | {"gone.png": {"p": "a cat"}, "odd.png": 5, "../../../etc/passwd": {"p": "a cat"}}
    path = write_part(tmp_path / "part-000001.zip", [])
    with zipfile.ZipFile(path, "w") as archive:
        for row in rows:
            archive.writestr(f"deep/../../{row['name']}", row["png"])
        archive.writestr("part-000001.json", json.dumps(said))
    report = import_diffusiondb(path, tmp_path / "target", test_count=0)
    assert report.training == 3 and len(report.problems) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"part-000001.zip", "target"}


def test_a_bomb_in_a_zip_part_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("pixart_nb.core.data.published_forms.MOST_BYTES", 10_000)
    rows = sample_rows(2, side=32)
    path = write_part(tmp_path / "part-000001.zip", rows)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(10**7))
    with zipfile.ZipFile(path, "r") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents["part-000001.json"] = json.dumps(part_json(rows) | {"bomb.png": {"p": "a bomb"}}).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    report = import_diffusiondb(path, tmp_path / "target", test_count=0)
    assert report.training == 2 and "unpacks to 10000000 bytes" in report.problems[0]


def test_a_second_import_changes_nothing_and_one_with_another_filter_removes(published, tmp_path):
    folder, rows = published
    import_diffusiondb(folder, tmp_path, max_nsfw=1, test_count=3)
    (tmp_path / "images" / "mine.png").write_bytes(b"of the user")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    labels = (tmp_path / "labels.json").read_bytes()
    import_diffusiondb(folder, tmp_path, max_nsfw=1, test_count=3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()} == before
    assert (tmp_path / "labels.json").read_bytes() == labels
    report = import_diffusiondb(folder, tmp_path, max_nsfw=0.1, test_count=0)
    kept = {path.name for path in (tmp_path / "images").iterdir()}
    assert kept == {Path(label["path"]).name for label in labels_in(tmp_path)} | {"mine.png"}
    assert 0 < report.training < len(rows) and not (tmp_path / "labels_test.json").exists()


def test_a_picture_that_was_damaged_since_is_written_again(published, tmp_path):
    folder, rows = published
    import_diffusiondb(folder, tmp_path, max_nsfw=1, test_count=0)
    path = tmp_path / labels_in(tmp_path)[0]["path"]
    path.write_bytes(bytes(len(rows[0]["png"])))
    import_diffusiondb(folder, tmp_path, max_nsfw=1, test_count=0)
    assert path.read_bytes() == rows[0]["png"]


def test_sources_that_cannot_be_used_are_named(published, tmp_path):
    folder, _ = published
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    other = write_table(tmp_path / "other.parquet", sample_rows(2), drop=["image"])
    silent = write_table(tmp_path / "silent.parquet", sample_rows(2), drop=["text"])
    shutil.copy(folder / METADATA, tmp_path / "empty" / METADATA)
    for source, expected in {
        "nothing": "does not exist",
        "empty": "no parquet file with pictures, no zip part and no pictures",
        "bad.zip": "no zip archive",
        "bad.parquet": "cannot be read as parquet",
        other.name: "has the columns text, seed",
        silent.name: "expected one of text, prompt",
    }.items():
        with pytest.raises(DataError, match=expected):
            import_diffusiondb(tmp_path / source, tmp_path / "target", test_count=0)
    assert not (tmp_path / "target").exists()


def test_pictures_without_any_prompt_are_refused(published, tmp_path):
    source = without_json(published[0], tmp_path / "source")
    (source / METADATA).unlink()
    with pytest.raises(DataError, match=r"no JSON of their prompts, and no metadata\.parquet"):
        import_diffusiondb(source, tmp_path / "target", test_count=0)


def test_splits_and_targets_that_cannot_be_are_refused(published, tmp_path):
    folder, _ = published
    with pytest.raises(DataError, match=f"test_count is 400, and .* has {COUNT} pictures"):
        import_diffusiondb(folder, tmp_path)
    with pytest.raises(DataError, match="outside of the source"):
        import_diffusiondb(folder, folder / "out", test_count=0)
    with pytest.raises(DataError, match=r"no picture to train on is left.*NSFW score above 0"):
        import_diffusiondb(folder, tmp_path, max_nsfw=0, test_count=0)
    assert not (tmp_path / "labels.json").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a file system, as root has")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_told_and_nothing_half_written_stays(tmp_path, small_disk):
    rng = np.random.default_rng(0)
    rows = sample_rows(20)
    for row in rows:
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
        row["png"] = file.getvalue()
    with pytest.raises(WriteError, match=r"No space left on device.*Free space"):
        import_diffusiondb(write_table(tmp_path / "t.parquet", rows), small_disk, test_count=0)
    written = [path for path in small_disk.rglob("*") if path.is_file()]
    known = {hashlib.sha256(row["png"]).hexdigest()[:16] for row in rows}
    assert written and all(
        hashlib.sha256(path.read_bytes()).hexdigest()[:16] == path.stem for path in written
    )
    assert {path.stem for path in written} < known


KILLED = """
import sys
from pixart_nb.core.data.diffusiondb import import_diffusiondb
print("ready", flush=True)
import_diffusiondb(sys.argv[1], sys.argv[2], 1, 3)
"""


def test_a_sample_to_finetune_on_shows_each_scene_once_and_keeps_the_held_out_ones():
    scenes = finetuning_scenes(60, seed=1)
    assert len(set(scenes)) == 60
    assert sum(scene.object == UNSEEN_OBJECTS[0] for scene in scenes) == 40
    assert not set(scenes) & set(split_scenes()[1])
    assert finetuning_scenes(60, seed=1) == scenes != finetuning_scenes(60, seed=2)
    rows = repeat_scenes(scenes, 15, 3)
    assert len(rows) == 3 * 45 + 15
    assert rows[-15:] == scenes[-15:]
    assert not set(rows[:-15]) & set(rows[-15:])
    assert repeat_scenes(scenes[:2], 5, 3) == scenes[:2]


def test_killed_at_any_moment_it_goes_on_to_the_same_data(tmp_path):
    rows = write_published(tmp_path / "source", 60)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "source" / TABLE), str(tmp_path / "target")]
    rng, killed = np.random.default_rng(0), 0
    while killed < 8:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        killed += 1
        if (tmp_path / "target" / "labels.json").exists():
            load_labels(tmp_path / "target" / "labels.json", tmp_path / "target", decode=True)
    import_diffusiondb(tmp_path / "source", tmp_path / "target", 1, 3)
    assert killed > 1
    assert labels_in(tmp_path / "target") == expected(rows[:-3])
    assert sorted(os.listdir(tmp_path / "target")) == ["images", "labels.json", "labels_test.json"]
    assert len(os.listdir(tmp_path / "target" / "images")) == 60
