"""Atomic writes of files and folders, and the checks of numbers that a caller gives."""

import math

import numpy as np
import pytest

from sdlearn.checks import check_positive, check_whole
from sdlearn.files import write_atomically


def test_a_file_is_created_in_a_missing_folder_and_replaced(tmp_path):
    file = tmp_path / "new" / "a.txt"
    for text in ("one", "two"):
        with write_atomically(file) as path:
            path.write_text(text)
            assert path != file and path.name == file.name
        assert file.read_text() == text and list(file.parent.iterdir()) == [file]


def test_a_folder_is_updated_file_by_file(tmp_path):
    folder = tmp_path / "folder"
    for names in (("a", "b/c"), ("a", "b/d")):
        with write_atomically(folder) as path:
            for name in names:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_text(str(names))
    assert {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()} == {
        "a": "('a', 'b/d')", "b/c": "('a', 'b/c')", "b/d": "('a', 'b/d')"}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_while_writing_preserves_the_old_file(error, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(type(error)), write_atomically(file) as path:
        path.write_text("half")
        raise error
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_an_unwritable_target_is_an_os_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "a.txt", tmp_path / ("x" * 300)):
        with pytest.raises(OSError, match=f"{target} cannot be written: [A-Z]"), write_atomically(target) as path:
            path.write_text("")


@pytest.mark.parametrize("value", [0, 6, 2.0, True, None, "2", math.nan])
def test_a_number_that_is_no_whole_number_in_its_range_raises(value):
    with pytest.raises(ValueError, match=f"^steps is {value}: give a whole number from 1 to 5$"):
        check_whole("steps", value, 1, 5)


def test_whole_numbers_in_range_pass():
    for value in (1, 5, np.int64(3)):
        check_whole("steps", value, 1, 5)
    check_whole("steps", 10**9, 0)
    with pytest.raises(ValueError, match="steps is -1: give a whole number of at least 0"):
        check_whole("steps", -1, 0)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, None, "1"])
def test_a_number_that_is_not_positive_and_finite_raises(value):
    with pytest.raises(ValueError, match=f"the rate is {value}: give a number above 0, such as 1e-4"):
        check_positive("the rate", value, ", such as 1e-4")
    check_positive("the rate", 1e-4)
