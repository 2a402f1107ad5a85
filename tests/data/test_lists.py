"""List files in both formats against a slow reference; errors quote the bad lines."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_list

from workbench import data
from workbench.data import DataError, lists


def listed(tmp_path: Path, *rows: str) -> pd.DataFrame:
    return data.read_list(write_list(tmp_path / "list.txt", *rows), tmp_path)


@pytest.mark.parametrize(
    "row, file, label",
    [
        ("a/with some spaces.jpg 3", "a/with some spaces.jpg", 3),
        ("a/2 3.jpg 4", "a/2 3.jpg", 4),
        ("a/two  spaces.jpg  4", "a/two  spaces.jpg ", 4),
        ("ä/猫 1.png 0", "ä/猫 1.png", 0),
        ("a/0.png 007", "a/0.png", 7),
        ("a/0.png -1", "a/0.png", -1),
        ("a/0.png +5", "a/0.png", 5),
        ("a\u2028b\x0c\x85c.png 3", "a\u2028b\x0c\x85c.png", 3),  # only a newline ends a row
        ('{"filename": "a b/ä 猫.png", "label": 3}', "a b/ä 猫.png", 3),
        ('{"filename": "a/0.png", "label": "3"}', "a/0.png", 3),
        ('{"filename": "a/0.png", "label": ["5"]}', "a/0.png", 5),
        ('{"label": 1, "extra": {"x": []}, "filename": "\\u732b 7"}', "猫 7", 1),
    ],
)
def test_rows_of_both_formats_also_among_plain_ones(tmp_path, row, file, label):
    form = '{{"filename": "n/{0}.png", "label": {0}}}' if row.startswith("{") else "n/{0}.png {0}"
    rows = [form.format(i) for i in range(20)]
    alone, frame = listed(tmp_path, row), listed(tmp_path, *rows[:9], row, *rows[9:])
    for found, at in ((alone, 0), (frame, 9)):
        assert (found.file[at], found.label[at]) == (file, label)
        assert found.path[at] == str(tmp_path / file) and found.label.dtype == np.int64
    others = frame.drop(index=9).reset_index(drop=True)
    pd.testing.assert_frame_equal(others, listed(tmp_path, *rows))


@pytest.mark.parametrize("lines", [["a 1", "b 2"], ['{"filename": "a", "label": 1}'] * 2])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_windows_line_ends_bom_and_blank_lines_are_ignored(tmp_path, lines, end, mark):
    plain = listed(tmp_path, *lines)
    text = mark + end + lines[0] + end + "   " + end + end + lines[1]  # no end of the last line
    (tmp_path / "list.txt").write_bytes(text.encode("utf-8"))
    pd.testing.assert_frame_equal(data.read_list(tmp_path / "list.txt", tmp_path), plain)


@pytest.mark.parametrize(
    "row, says",
    [
        ("17", "is not `path label`"),
        ("\u00a0 1", "is not `path label`"),
        ("a/0.png\t17", "not a tab"),
        ("a/0.png 1.5", "'1.5' is no whole number"),
        ("a 0x1f", "'0x1f' is no whole number"),
        ("a/0.png ", "no whole number"),
        ("a/0.png 99999999999999999999", "no whole number"),
        ("a\x00.png 1", "zero byte"),
        ('{"filename": "a.png"}', "no JSON object"),
        ('{"filename": "a.png", "label": [1, 2]}', "2 labels"),
        ('{"filename": "a.png", "label": []}', "0 labels"),
        ('{"filename": "a", "label": 1e0}', "1.0"),
        ('{"filename": "a", "label": 9999999999}', "no whole number"),
        ('{"filename": "a.png", "label": true}', "True"),
        ('{"filename": "a.png", "label": null}', "None"),
        ('{"filename": "", "label": 1}', "no file name"),
        ('{"filename": 5, "label": 1}', "no file name"),
        ('{"filename": "\\u0000", "label": 1}', "no file name"),
        ('{"filename": "\\ud800", "label": 1}', "no file name"),
        ('{"filename": "a.png", "label": 1', "JSON"),
        ('{"filename": "a", "label": 1} {"filename": "b", "label": 2}', "JSON"),
    ],
)
def test_a_bad_row_is_quoted_with_its_line(tmp_path, row, says):
    good = '{"filename": "a", "label": 0}' if row.startswith("{") else "a 0"
    with pytest.raises(DataError, match=f"(?s)list.txt.*line 2: .*{says}"):
        listed(tmp_path, good, row, good)


def test_many_bad_rows_are_counted_not_all_quoted(tmp_path):
    with pytest.raises(DataError) as caught:
        listed(tmp_path, *["bad"] * 20)
    assert str(caught.value).count("\n  line ") == 5 and "and 15 more" in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"\n \r\n", b"\xef\xbb\xbf", b"caf\xe9.jpg 1\n"])
def test_a_list_without_readable_rows_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match="list.txt.*(is empty|cannot be read)"):
        data.read_list(tmp_path / "list.txt", tmp_path)


@pytest.mark.parametrize(
    "file, outside",
    [
        ("a/0.png", False),
        ("./a/../b/0.png", False),
        ("..a/0.png", False),
        ("a/../../x/0.png", True),
        ("/etc/passwd", True),
        ("../root2/0.png", True),
    ],
)
@pytest.mark.parametrize("root", ["absolute", "relative", "."])
def test_entries_that_leave_their_root_are_marked(tmp_path, monkeypatch, file, outside, root):
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path / "root" if root == "." else tmp_path)
    root = {"absolute": tmp_path / "root", "relative": "root", ".": "."}[root]
    frame = data.read_list(write_list(tmp_path / "list.txt", f"{file} 0"), root)
    assert frame.outside.tolist() == [outside]


def line_by_line(path: Path, root: Path) -> pd.DataFrame:
    """A slow reference for lists without faults."""
    rows = []
    for line in filter(str.strip, path.read_text(encoding="utf-8").split("\n")):
        if line.startswith('{"'):
            entry = json.loads(line)
            file, label = entry["filename"], entry["label"]
        else:
            file, _, label = line.rpartition(" ")
        inside = os.path.abspath(root / file).startswith(f"{root}/")
        rows.append((file, int(label), os.path.join(root, file), 0, not inside))
    return pd.DataFrame(rows, columns=["file", "label", "path", "list", "outside"])


ODD = ["a b/c  d.png", "猫/1.png", "../x.png", "/etc/x.png", "a/../b.png", "a/..b/c.png", "./a",
       "a/.", "/x/../y", "a//b.png", ".", "..", "/", "猫", "a.", "\u00a0x", "0x1f", "{a",
       "é.png"]  # fmt: skip


@pytest.mark.parametrize("odd", [[], *([name] for name in ODD), ODD])
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_list_equals_the_slow_reference(tmp_path, form, odd):
    files = [*(f"n{i % 7}/image {i}.JPEG" for i in range(40)), *odd, f"{tmp_path}/inside.png"]
    labels = np.random.default_rng(0).permutation(len(files)).tolist()
    rows = [f"{file} {label}" for file, label in zip(files, labels, strict=True)]
    if form == "json":
        pairs = zip(files, labels, strict=True)
        rows = [json.dumps({"filename": file, "label": label, "x": [1]}) for file, label in pairs]
    path = write_list(tmp_path / "list.txt", *rows, "", "")
    pd.testing.assert_frame_equal(data.read_list(path, tmp_path), line_by_line(path, tmp_path))


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_line_of_a_plain_list_is_read_in_python(tmp_path, form):
    """Ten times as fast that way: a trace counts the calls of functions of the module."""
    line = '{{"filename": "{}", "label": {}}}' if form == "json" else "{} {}"
    rows = [line.format(f"n{i % 10}/{i}.jpg", i % 10) for i in range(500)]
    path, calls = write_list(tmp_path / "list.txt", *rows), []

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename == lists.__file__:
            calls.append(frame.f_code.co_name)

    sys.setprofile(count)
    try:
        data.read_list(path, tmp_path)
    finally:
        sys.setprofile(None)
    assert "read_list" in calls and len(calls) < 20
