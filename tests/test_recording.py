"""Values recorded by cells, and the texts that quote them."""

import copy
import json
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from sdlearn.__main__ import main
from sdlearn.explore import recording
from sdlearn.explore.recording import MIME_TYPE

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


def output(**values) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": {MIME_TYPE: values}}


def notebook(text: str, *outputs: dict) -> dict:
    code = {"cell_type": "code", "source": [], "metadata": {}, "execution_count": 1, "outputs": list(outputs)}
    return {"cells": [code, {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}],
            "metadata": {}, "nbformat": 4, "nbformat_minor": 4}


def test_markers_take_the_recorded_value_in_their_format():
    one = notebook("a <!--psnr:.1f-->?<!--/--> dB,\n<!--share:.0%--><!--/-->, <!--best-->dog<!--/-->, "
                   "<!--gap:.2f-->1<!--/-->",
                   output(psnr=28.53, share=0.184), output(best="cat", gap=-0.5))
    text = "".join(recording.fill_values(one)["cells"][1]["source"])
    assert text == ("a <!--psnr:.1f-->28.5<!--/--> dB,\n<!--share:.0%-->18%<!--/-->, <!--best-->cat<!--/-->, "
                    "<!--gap:.2f-->\u22120.50<!--/-->")
    assert recording.find_stale_values(one) == []


def test_filling_twice_changes_nothing():
    once = recording.fill_values(notebook("<!--n:d-->1<!--/--> and <!--n:d-->2<!--/-->", output(n=3)))
    assert recording.fill_values(copy.deepcopy(once)) == once


@pytest.mark.parametrize("text, complaint", [
    ("<!--n:d-->4<!--/-->", "cell 1 quotes n as 4; it is 3"),
    ("<!--m:d-->3<!--/-->", "cell 1 quotes m, which no cell recorded"),
])
def test_stale_values_are_listed(text, complaint):
    assert recording.find_stale_values(notebook(text, output(n=3))) == [complaint]


def test_ordinary_comments_are_no_markers():
    text = "<!-- a note --> 3 <!--/--> and <!--todo-->"
    assert recording.find_stale_values(notebook(text)) == []


def test_one_name_recorded_by_two_cells_is_an_error():
    with pytest.raises(ValueError, match="two cells record n"):
        recording.recorded_values(notebook("", output(n=3), output(n=3)))


def test_only_numbers_and_text_are_recorded():
    with pytest.raises(TypeError, match="n is a list"):
        recording.record(n=[1, 2])


def test_a_cell_records_and_shows_nothing(tmp_path):
    cells = [nbformat.v4.new_code_cell("import torch\nfrom sdlearn.explore.recording import record\n"
                                       "record(loss=torch.tensor(0.25), count=3, name='cat')")]
    executed = NotebookClient(nbformat.v4.new_notebook(cells=cells)).execute()
    [shown] = executed.cells[0].outputs
    assert list(shown.data) == [MIME_TYPE]
    assert recording.recorded_values(executed) == {"loss": 0.25, "count": 3, "name": "cat"}


def test_tensors_become_numbers(monkeypatch):
    shown = []
    monkeypatch.setattr(recording, "display", lambda data, raw: shown.append(data))
    recording.record(loss=torch.tensor([0.5]))
    assert shown == [{MIME_TYPE: {"loss": 0.5}}]


def test_command_writes_into_notebooks_and_texts(tmp_path, capsys):
    file, readme = tmp_path / "01_vae.ipynb", tmp_path / "README.md"
    file.write_text(json.dumps(notebook("<!--n:d-->?<!--/-->", output(n=3))))
    readme.write_text("| psnr | <!--01.n:d-->?<!--/--> |\n")
    assert main(["quote", str(file), str(readme), "--notebooks", str(tmp_path)]) == 0
    assert "<!--n:d-->3<!--/-->" in file.read_text()
    assert readme.read_text() == "| psnr | <!--01.n:d-->3<!--/--> |\n"
    assert nbformat.reads(file.read_text(), 4)
    readme.write_text("<!--01.m:d-->?<!--/-->")
    assert main(["quote", str(readme), "--notebooks", str(tmp_path)]) == 2
    assert "quotes 01.m, which no cell recorded" in capsys.readouterr().err


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_quote_what_their_cells_recorded(path):
    assert recording.find_stale_values(recording.read_notebook(path)) == []
