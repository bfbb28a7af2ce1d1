"""A folder of images with captions becomes a label file, or every reason why not is listed."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.folder import import_folder
from pixart_nb.core.data.labels import LabelError, load_labels
from pixart_nb.core.errors import FolderInUseError
from pixart_nb.core.io import folder_lock


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them in a folder below, (height, width) = (8, 12)."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "sub/c.webp"):
        Image.new("RGB", (12, 8)).save(folder / name)
    return folder


def captioned(folder, **texts):
    for name, text in texts.items():
        place = next(folder.rglob(f"{name}.*"))
        place.with_suffix(".txt").write_text(text, encoding="utf-8")
    return folder


def written(folder):
    labels = load_labels(folder / "labels.json", folder, decode=True)
    return {label.path: (label.prompt, label.sharegpt4v) for label in labels}


def test_captions_beside_the_images(folder):
    captioned(folder, a="a cat\non grass\n", b="\ufeffein Bär", c=" 猫 ")
    report = import_folder(folder)
    assert written(folder) == {"a.png": ("a cat on grass", ""), "b.JPG": ("ein Bär", ""), "sub/c.webp": ("猫", "")}
    assert (report.training, report.files) == (3, [folder / "labels.json"])


def test_the_label_file_has_the_official_keys(folder):
    import_folder(captioned(folder, a="a cat", b="a dog", c="an owl"))
    first = json.loads((folder / "labels.json").read_text())[0]
    assert first == {"path": "a.png", "prompt": "a cat", "sharegpt4v": "", "height": 8, "width": 12, "ratio": 8 / 12}


def test_hidden_files_are_left_alone(folder):
    captioned(folder, a="a cat", b="a dog", c="an owl")
    (folder / ".trash").mkdir()
    (folder / ".trash" / "d.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "._a.png").write_bytes(b"what another system leaves")
    assert import_folder(folder).training == 3


TABLES = {
    "metadata.csv": 'file_name,text,extra\na.png,"a cat, sleeping",1\nb.JPG,a dog,2\nsub/c.webp,an owl,3\n',
    "metadata.jsonl": '{"file_name": "a.png", "text": "a cat, sleeping"}\n\n{"file_name": "b.JPG", "text": "a dog"}\n'
    '{"file_name": "sub/c.webp", "text": "an owl"}\n',
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("beside", [True, False])
def test_captions_in_a_table(folder, tmp_path, name, beside):
    table = folder / name if beside else tmp_path / name
    table.write_text(TABLES[name])
    import_folder(folder, None if beside else table)
    prompts = {"a.png": ("a cat, sleeping", ""), "b.JPG": ("a dog", ""), "sub/c.webp": ("an owl", "")}
    assert written(folder) == prompts


def test_each_folder_below_may_have_its_table(folder):
    (folder / "train").mkdir()
    for name in ("a.png", "b.JPG"):
        (folder / name).rename(folder / "train" / name)
    (folder / "train" / "metadata.csv").write_text("file_name,text\na.png,a cat\nb.JPG,a dog\n")
    (folder / "old_metadata.csv").write_text("a table of another name")
    (folder / "Metadata.CSV").write_text("and one in other letters")
    pq.write_table(pa.table({"file_name": ["c.webp"], "text": ["an owl"], "n": [1]}), folder / "sub/metadata.parquet")
    import_folder(folder)
    expected = {"sub/c.webp": ("an owl", ""), "train/a.png": ("a cat", ""), "train/b.JPG": ("a dog", "")}
    assert written(folder) == expected
    import_folder(folder, folder / "train" / "metadata.csv", overwrite=True)
    assert written(folder).keys() == {"train/a.png", "train/b.JPG"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("meta_cap.json", '{"a.png": {"caption": "a cat", "tags": "cat"}, "b.JPG": "a dog"}'),
        ("videos.csv", "dir,text\na.png,a cat\nb.JPG,a dog\n"),
    ],
)
def test_tables_of_other_trainers(folder, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    import_folder(folder, tmp_path / name)
    assert written(folder) == {"a.png": ("a cat", ""), "b.JPG": ("a dog", "")}


def test_a_parquet_table_that_is_none_is_named(folder, tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"t\.parquet cannot be read as parquet"):
        import_folder(folder, tmp_path / "t.parquet")
    pq.write_table(pa.table({"file_name": ["a.png"], "likes": [3]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"has the columns 'file_name' \(str\); expected one of path,"):
        import_folder(folder, tmp_path / "t.parquet")


def test_a_table_may_have_descriptions_and_need_not_name_all(folder, tmp_path):
    (tmp_path / "t.tsv").write_text("path\tprompt\tsharegpt4v\na.png\ta cat\ta grey cat on grass\nb.JPG\ta dog\t\n")
    report = import_folder(folder, tmp_path / "t.tsv")
    assert written(folder) == {"a.png": ("a cat", "a grey cat on grass"), "b.JPG": ("a dog", "")}
    assert "1 images of" in report.notes[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"file_name;text\na.png;a cat, sleeping\nb.JPG;a dog\nsub/c.webp;an owl\n"),
        ("t.json", json.dumps([{"file_name": n, "text": t} for n, t in
                               (("a.png", "a cat, sleeping"), ("b.JPG", "a dog"), ("sub/c.webp", "an owl"))]).encode()),
        ("t.csv", TABLES["metadata.csv"].encode("utf-16")),
    ],
)  # fmt: skip
def test_tables_of_other_programs_are_read(folder, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    import_folder(folder, tmp_path / name)
    assert [prompt for prompt, _ in written(folder).values()] == ["a cat, sleeping", "a dog", "an owl"]


def test_a_table_with_several_captions_of_an_image(folder, tmp_path):
    (tmp_path / "t.csv").write_text("image,caption\na.png,a cat\na.png,a pet\nb.JPG,a dog\n")
    report = import_folder(folder, tmp_path / "t.csv")
    labels = load_labels(folder / "labels.json", folder)
    assert [label.prompts for label in labels] == [("a cat", "a pet"), ("a dog",)]
    assert "1 entries name an image again" in report.notes[0]
    assert json.loads((folder / "labels.json").read_text())[0]["prompt"] == "a cat"


def test_a_caption_with_an_unquoted_comma_is_not_cut(folder, tmp_path):
    (tmp_path / "t.csv").write_text("file_name,text\na.png,a cat, sleeping\n")
    with pytest.raises(LabelError, match="line 2: has more fields than the header; quote captions"):
        import_folder(folder, tmp_path / "t.csv")


def test_texts_in_capitals_and_in_utf_16_are_read(folder):
    captioned(folder, b="a dog", c="an owl")
    (folder / "a.TXT").write_bytes("ein Bär".encode("utf-16"))
    import_folder(folder)
    assert written(folder)["a.png"] == ("ein Bär", "")


def test_captions_from_the_names_of_files_and_folders(tmp_path):
    for name in ("cat/red_fox-01.png", "cat/123.png", "dog/white dog.png"):
        (tmp_path / "icons" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "icons" / name)
    with pytest.raises(DataError, match=r"none of its 3 images has a caption.*--caption_from file"):
        import_folder(tmp_path / "icons")
    report = import_folder(tmp_path / "icons", skip=True, caption_from="file")
    assert report.problems == ["cat/123.png: has the file name '123', which has no words"]
    assert [text for text, _ in written(tmp_path / "icons").values()] == ["red fox 01", "white dog"]
    import_folder(tmp_path / "icons", overwrite=True, caption_from="folder")
    assert [text for text, _ in written(tmp_path / "icons").values()] == ["cat", "cat", "dog"]
    with pytest.raises(DataError, match="expected one of text, file, folder"):
        import_folder(tmp_path / "icons", caption_from="name")


def test_a_second_process_is_refused_while_the_first_writes(folder):
    captioned(folder, a="a cat", b="a dog", c="an owl")
    with folder_lock(folder, name=".labels.json.lock"), pytest.raises(FolderInUseError):
        import_folder(folder)
    assert import_folder(folder).training == 3


def test_a_caption_of_gigabytes_is_named_and_not_read(folder):
    captioned(folder, b="a dog", c="an owl")
    with (folder / "a.txt").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(LabelError, match=r"a\.txt: has 8589934592 bytes; expected at most"):
        import_folder(folder)


def test_links_to_images_elsewhere_are_followed(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.png").symlink_to(folder / "a.png")
    (tmp_path / "linked" / "below").symlink_to(folder / "sub")
    (tmp_path / "linked" / "a.txt").write_text("a cat")
    (folder / "sub" / "c.txt").write_text("an owl")
    import_folder(tmp_path / "linked")
    assert written(tmp_path / "linked") == {"a.png": ("a cat", ""), "below/c.webp": ("an owl", "")}


def spoilt(folder):
    """One sound image, and everything that can be wrong."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("cut", "empty", "latin"):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    captioned(folder, a="a cat", cut="cut", empty=" \n", latin="x")
    (folder / "latin.txt").write_bytes("ein Bär".encode("latin-1"))
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-3000])
    return folder


def test_all_that_is_wrong_is_listed_and_nothing_written(folder):
    with pytest.raises(LabelError, match="5 problems") as caught:
        import_folder(spoilt(folder))
    named = {"b.JPG: has no b.txt", "sub/c.webp: has no c.txt", "cut.txt: ", "empty.txt: ", "latin.txt: "}
    assert all(any(problem.startswith(start) for problem in caught.value.problems) for start in named)
    assert not (folder / "labels.json").exists()


def test_with_skip_it_is_left_out_and_reported(folder):
    report = import_folder(spoilt(folder), skip=True)
    assert written(folder) == {"a.png": ("a cat", "")}
    assert len(report.problems) == 5 and "empty.txt" in str(report)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ('{"path": "a.png", "prompt": 5}', "line 1: prompt is 5"),
        ('{"path": "../x.png", "prompt": "x"}', "line 1: path '../x.png' (str) leaves the folder"),
        ('{"path": "a.png", "prompt": "x"}\n{broken', "line 2: is '{broken'"),
        ('{"path": "a.png", "prompt": "x"}\n{"path": "a.png"}', "line 2: prompt is missing"),
        ('{"path": "z.png", "prompt": "x"}', "line 1: path 'z.png': "),
    ],
)
def test_lines_of_a_table_are_named(folder, tmp_path, table, expected):
    (tmp_path / "t.jsonl").write_text(table)
    with pytest.raises(LabelError) as caught:
        import_folder(folder, tmp_path / "t.jsonl")
    assert expected in caught.value.problems[0]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.csv", b"name,words\na.png,a cat\n", "has the columns 'name'"),
        ("t.csv", b"", "no images"),
        ("t.csv", b'path,prompt\na.png,"never ends\n', "is no CSV table"),
        ("t.csv", b"path,prompt\na.png,\xff\n", "is not JSON or CSV in UTF-8"),
        ("t.jsonl", b"\xff", "is not JSON or CSV in UTF-8"),
    ],
)
def test_tables_that_cannot_be_used_are_named(folder, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        import_folder(folder, tmp_path / name)


def test_places_that_cannot_be_used_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="is no folder"):
        import_folder(tmp_path / "nothing")
    with pytest.raises(DataError, match="cannot be read"):
        import_folder(folder, tmp_path / "nothing.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images; expected files that end in \.png"):
        import_folder(tmp_path / "empty")


def test_another_label_file_is_only_replaced_when_asked(folder):
    captioned(folder, a="a cat", b="a dog", c="an owl")
    import_folder(folder)
    import_folder(folder)  # the same again is no change
    captioned(folder, a="a tiger")
    with pytest.raises(DataError, match="--overwrite"):
        import_folder(folder)
    assert written(folder)["a.png"] == ("a cat", "")
    import_folder(folder, overwrite=True)
    assert written(folder)["a.png"] == ("a tiger", "")


def test_the_label_file_may_lie_elsewhere(folder, tmp_path):
    report = import_folder(captioned(folder, a="a cat", b="a dog", c="an owl"), output=tmp_path / "out" / "mine.json")
    assert report.files == [tmp_path / "out" / "mine.json"]
    assert len(load_labels(tmp_path / "out" / "mine.json", folder)) == 3


def test_images_that_a_table_does_not_name_are_counted_whatever_else_is_wrong(folder):
    table = folder / "mine.csv"
    rows = ["a.png,a cat", "a.png,a kitten", "b.JPG,", "missing.png,a dog", "gone.png,a dog"]
    table.write_text("\n".join(["path,prompt", *rows]) + "\n")
    report = import_folder(folder, table, skip=True)
    assert f"1 images of {folder} are not in {table}" in report.notes  # sub/c.webp
    assert len(report.problems) == 3


def test_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    captioned(folder, a="a cat", b="a dog", c="an owl")
    closed = folder / "closed"
    closed.mkdir()
    scan = os.scandir

    def refusing(path):
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"closed cannot be read \(Permission denied\)"):
        import_folder(folder)
