"""Every published form of diffusiondb-pixelart gives the same labels, without names of users or unsafe images."""

import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.mutated_files import peak_megabytes
from pixart_nb.core.data.diffusiondb import import_diffusiondb
from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.labels import load_labels
from pixart_nb.core.errors import FolderInUseError, WriteError
from pixart_nb.core.io import folder_lock
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
from pixart_nb.pixelart.objects import UNSEEN_OBJECTS
from pixart_nb.pixelart.split import is_held_out

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
    """Images that only the metadata describe."""
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
def test_every_form_gives_the_same_labels_and_images(published, tmp_path, form):
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


def test_images_that_the_metadata_do_not_know_are_left_out(tmp_path):
    rows = sample_rows(5)
    write_part(tmp_path / "part-000001.zip", rows)
    write_metadata(tmp_path / "metadata.parquet", rows[:3])
    report = import_diffusiondb(tmp_path / "part-000001.zip", tmp_path / "target", test_count=0)
    assert labels_in(tmp_path / "target") == expected(rows[:3])
    assert report.left_out == {"without an NSFW score": 2}


def test_only_images_and_prompts_are_required(tmp_path):
    rows = sample_rows(3)
    names = pq.read_schema(write_table(tmp_path / "t.parquet", rows)).names
    write_table(tmp_path / "t.parquet", rows, drop=[name for name in names if name not in ("image", "text")])
    assert import_diffusiondb(tmp_path / "t.parquet", tmp_path / "target", test_count=1).training == 2


def test_what_cannot_be_used_is_named_row_by_row_and_the_others_are_kept(tmp_path):
    rows = sample_rows(8)
    rows[1]["png"] = rows[1]["png"][:-200]
    rows[2]["text"] = "  "
    rows[3]["png"] = b"no image"
    rows[4]["png"] = None
    rows[5]["text"] = None
    rows[6]["png"] = rows[0]["png"]
    report = import_diffusiondb(write_table(tmp_path / "t.parquet", rows), tmp_path / "target", test_count=1)
    assert labels_in(tmp_path / "target") == expected([rows[0]])
    assert [problem.split(":")[0] for problem in report.problems] == [f"t.parquet row {n}" for n in range(1, 6)]
    assert report.left_out["that an earlier row has too"] == 1
    assert "cut off or damaged" in report.problems[0] and "row 5" in str(report)


def test_an_image_of_the_test_set_is_never_trained_on(tmp_path):
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
    monkeypatch.setattr("pixart_nb.core.data.sources.MAX_BYTES", 100_000)
    rows = sample_rows(2, side=128)
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


def test_a_second_import_changes_nothing_and_another_filter_is_asked_for(published, tmp_path):
    folder, rows = published
    import_diffusiondb(folder, tmp_path, max_nsfw=1, test_count=3)
    (tmp_path / "images" / "mine.png").write_bytes(b"of the user")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    labels = (tmp_path / "labels.json").read_bytes()
    import_diffusiondb(folder, tmp_path, max_nsfw=1, test_count=3)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()} == before
    assert (tmp_path / "labels.json").read_bytes() == labels
    with pytest.raises(DataError, match=r"labels of another import.*--overwrite"):
        import_diffusiondb(folder, tmp_path, max_nsfw=0.1, test_count=0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()} == before
    report = import_diffusiondb(folder, tmp_path, max_nsfw=0.1, test_count=0, overwrite=True)
    kept = {path.name for path in (tmp_path / "images").iterdir()}
    assert kept == {Path(label["path"]).name for label in labels_in(tmp_path)} | {"mine.png"}
    assert 0 < report.training < len(rows) and not (tmp_path / "labels_test.json").exists()


def test_a_data_set_of_many_parts_holds_few_files_open(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(60):
        content = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(content, "PNG")
        with zipfile.ZipFile(raw / f"part-{number:06d}.zip", "w") as part:
            part.writestr(f"{number}.png", content.getvalue())
            part.writestr(f"{number}.json", json.dumps({f"{number}.png": {"p": f"image {number}"}}))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, before[1]))
    try:
        assert import_diffusiondb(raw, tmp_path / "out", test_count=0).training == 60
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_import_that_was_killed_between_its_label_files_is_completed(published, tmp_path):
    folder, _ = published
    import_diffusiondb(folder, tmp_path, max_nsfw=1, test_count=3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "labels.json").unlink()
    import_diffusiondb(folder, tmp_path, max_nsfw=1, test_count=3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "labels.json").unlink()
    (tmp_path / "labels_test.json").write_text('[{"path": "mine.png", "prompt": "mine"}]')
    with pytest.raises(DataError, match="labels of another import"):
        import_diffusiondb(folder, tmp_path, max_nsfw=1, test_count=3)


def test_overwriting_removes_no_file_that_an_import_did_not_write(published, tmp_path):
    folder, _ = published
    target = tmp_path / "target"
    mine = [tmp_path / "precious.png", target / "photos" / "a.png", target / "images" / "b.png"]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
    paths = ["../precious.png", str(mine[0]), "photos/a.png", "images/b.png", "images/../../precious.png"]
    (target / "labels.json").write_text(json.dumps([{"path": path, "prompt": "mine"} for path in paths]))
    import_diffusiondb(folder, target, max_nsfw=1, test_count=0, overwrite=True)
    assert [path.read_bytes() for path in mine] == [b"mine"] * 3


def test_an_image_that_was_damaged_since_is_written_again(published, tmp_path):
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
        "empty": "no parquet file with images, no zip part and no images",
        "bad.zip": "no zip archive",
        "bad.parquet": "cannot be read as parquet",
        other.name: "has the columns text, seed",
        silent.name: "expected one of prompt, text, caption",
    }.items():
        with pytest.raises(DataError, match=expected):
            import_diffusiondb(tmp_path / source, tmp_path / "target", test_count=0)
    assert not (tmp_path / "target").exists()


def test_images_without_any_prompt_are_refused(published, tmp_path):
    source = without_json(published[0], tmp_path / "source")
    (source / METADATA).unlink()
    with pytest.raises(DataError, match=r"no JSON of their prompts, and no metadata\.parquet"):
        import_diffusiondb(source, tmp_path / "target", test_count=0)


def test_splits_and_targets_that_cannot_be_are_refused(published, tmp_path):
    folder, _ = published
    with pytest.raises(DataError, match=f"test_count is 400, and .* has {COUNT} images"):
        import_diffusiondb(folder, tmp_path)
    with pytest.raises(DataError, match="outside of the source"):
        import_diffusiondb(folder, folder / "out", test_count=0)
    with pytest.raises(DataError, match=r"no image to train on is left.*NSFW score above 0"):
        import_diffusiondb(folder, tmp_path, max_nsfw=0, test_count=0)
    assert not (tmp_path / "labels.json").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True).returncode:
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
    assert written and all(hashlib.sha256(path.read_bytes()).hexdigest()[:16] == path.stem for path in written)
    assert {path.stem for path in written} < known


def archive(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as part:
        for name, content in files.items():
            part.writestr(name, content if isinstance(content, bytes) else json.dumps(content))
    return path


def prompts_in(target):
    return {label["prompt"]: (target / label["path"]).read_bytes() for label in labels_in(target)}


def test_another_source_into_the_same_target_is_refused_before_it_writes_an_image(published, tmp_path):
    folder, _ = published
    for number in (1, 2):
        source = folder / "images" / f"part-00000{number}.zip"
        if number == 1:
            import_diffusiondb(source, tmp_path / "target", max_nsfw=1, test_count=0)
            before = sorted(tmp_path.rglob("*"))
        else:
            with pytest.raises(DataError, match="labels of another import"):
                import_diffusiondb(source, tmp_path / "target", max_nsfw=1, test_count=0)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_second_process_is_refused_while_the_first_writes(published, tmp_path):
    folder, _ = published
    with folder_lock(tmp_path), pytest.raises(FolderInUseError):
        import_diffusiondb(folder, tmp_path, max_nsfw=1, test_count=0)
    assert import_diffusiondb(folder, tmp_path, max_nsfw=1, test_count=0).training == COUNT


def test_equal_names_in_two_folders_of_a_part_are_two_images(tmp_path):
    one, two = (row["png"] for row in sample_rows(2))
    beside = {"x/1.png": one, "y/1.png": two, "x/p.json": {"1.png": {"p": "one"}}, "y/p.json": {"1.png": "two"}}
    by_path = {"x/1.png": one, "y/1.png": two, "p.json": {"x/1.png": {"p": "one"}, "y/1.png": {"p": "two"}}}
    for number, files in enumerate((beside, by_path)):
        import_diffusiondb(archive(tmp_path / f"{number}.zip", files), tmp_path / str(number), test_count=0)
        assert prompts_in(tmp_path / str(number)) == {"one": one, "two": two}


def test_a_prompt_that_may_mean_two_images_is_named(tmp_path):
    one, two, three = (row["png"] for row in sample_rows(3))
    files = {"x/1.png": one, "y/1.png": two, "y/2.png": three, "p.json": {"1.png": "one?", "2.png": "three"}}
    report = import_diffusiondb(archive(tmp_path / "p.zip", files), tmp_path / "target", test_count=0)
    assert prompts_in(tmp_path / "target") == {"three": three}
    assert report.problems == ["p: 1.png: may mean x/1.png or y/1.png; expected its path in the JSON"]


def test_images_that_the_json_does_not_name_are_counted(tmp_path):
    one, two = (row["png"] for row in sample_rows(2))
    path = archive(tmp_path / "p.zip", {"1.png": one, "2.png": two, "p.json": {"1.png": {"p": "one"}}})
    report = import_diffusiondb(path, tmp_path / "target", test_count=0)
    assert report.training == 1 and report.problems == ["p: 2.png: prompt is None (NoneType); expected a text"]


def test_a_part_packed_by_macos_is_read(tmp_path):
    rows = sample_rows(3)
    fork = b"\0\5\x16\7" + b"\xff" * 50
    files = {f"part/{row['name']}": row["png"] for row in rows}
    files |= {f"__MACOSX/part/._{row['name']}": fork for row in rows} | {"__MACOSX/part/._part.json": fork}
    path = archive(tmp_path / "source" / "part.zip", files | {"part/part.json": part_json(rows)})
    (tmp_path / "source" / "._part.zip").write_bytes(fork)
    (tmp_path / "source" / "._0000.parquet").write_bytes(fork)
    assert import_diffusiondb(path.parent, tmp_path / "target", test_count=0).training == 3


def test_other_json_files_beside_the_images_are_left_alone(tmp_path):
    rows = sample_rows(2)
    source = tmp_path / "part"
    source.mkdir()
    for row in rows:
        (source / row["name"]).write_bytes(row["png"])
    (source / "dataset_infos.json").write_text(json.dumps({"license": "CC0", "homepage": "x"}))
    (source / "broken.json").write_text("{")
    (source / "list.json").write_text("[1]")
    (source / "part.json").write_text(json.dumps(part_json(rows)))
    report = import_diffusiondb(source, tmp_path / "target", test_count=0)
    assert report.training == 2 and not report.problems
    (source / "part.json").unlink()
    with pytest.raises(DataError, match=r"no JSON of their prompts.*broken\.json is not JSON"):
        import_diffusiondb(source, tmp_path / "other", test_count=0)


def test_links_as_in_a_cache_of_the_hub_are_followed(published, tmp_path):
    folder, rows = published
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    shutil.copytree(folder, blobs)
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "0000.parquet").symlink_to(blobs / TABLE)
    unpacked(folder, tmp_path / "parts")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "images").symlink_to(tmp_path / "parts" / "images")
    (tmp_path / "linked" / "images" / "loop").symlink_to(tmp_path / "linked")
    for source in (snapshot, tmp_path / "linked"):
        target = tmp_path / f"target-{source.name}"
        assert import_diffusiondb(source, target, max_nsfw=1, test_count=0).training == COUNT
        assert labels_in(target) == expected(rows)


@pytest.mark.parametrize("compression", ["brotli", "zstd", "gzip"])
def test_a_small_table_that_unpacks_to_gigabytes_is_refused(tmp_path, compression):
    """Each row is the same image of 128 MB, stored once: 4 KB that ask for 4 GB."""
    one = pa.array([bytes(2**27)], pa.binary())
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(32, np.int32)), one)
    table = pa.table({"image": images, "text": ["a cat"] * 32})
    pq.write_table(table, tmp_path / "t.parquet", compression=compression, write_statistics=False)
    before = peak_megabytes()
    with pytest.raises(DataError, match="unpacks from"):
        import_diffusiondb(tmp_path / "t.parquet", tmp_path / "target", test_count=0)
    assert peak_megabytes() - before < 100


def test_a_zip_part_with_a_damaged_directory_is_named(tmp_path):
    path = write_part(tmp_path / "part-000001.zip", sample_rows(2))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 6] = 247  # the version of zip that is needed
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is no zip archive, or cut off: zip file version 24\.7"):
        import_diffusiondb(path, tmp_path / "target", test_count=0)


def test_captions_in_lists_and_scores_in_texts_are_read(tmp_path):
    image = {"bytes": sample_rows(1)[0]["png"], "path": "a.png"}
    columns = {"image": [image], "caption": [["a cat", "a pet"]], "image_nsfw": ["0.1"], "prompt_nsfw": ["0.1"]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    import_diffusiondb(tmp_path / "t.parquet", tmp_path / "target", test_count=0)
    (label,) = load_labels(tmp_path / "target" / "labels.json", tmp_path / "target")
    assert label.prompts == ("a cat", "a pet")


def test_files_get_the_mode_of_the_umask(published, tmp_path):
    before = os.umask(0o022)
    try:
        import_diffusiondb(published[0], tmp_path, max_nsfw=1, test_count=3)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {0o644}


KILLED = """
import sys
from pixart_nb.core.data.diffusiondb import import_diffusiondb
print("ready", flush=True)
import_diffusiondb(sys.argv[1], sys.argv[2], 1, 3)
"""


def test_a_sample_to_finetune_on_shows_each_scene_once_and_keeps_the_held_out_ones():
    scenes = finetuning_scenes(60, seed=1)
    assert len(set(scenes)) == 60
    assert sum(scene.things[0].object == next(iter(UNSEEN_OBJECTS)) for scene in scenes) == 40
    assert not any(is_held_out(scene) for scene in scenes)
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
