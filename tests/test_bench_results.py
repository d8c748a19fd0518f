"""Shipped results of benchmarks: files of today and of earlier versions are read, each with its machine."""

import json
from dataclasses import replace

import pytest

from sdlearn.bench import Benchmark, list_steps, run_benchmark, run_steps
from sdlearn.bench.results import OLD_KEYS, RESULTS, canonical_name, format_result, load_results, tabulate_steps
from sdlearn.checkpoint import CheckpointError

QUICK = Benchmark(preset="tiny", rounds=1, steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    (folder / "optimizations.json").write_text(json.dumps(run_steps(QUICK, list_steps("cpu", 3, 2, compiled=False))))
    (folder / "comparison.json").write_text(json.dumps(run_benchmark(QUICK, ("sdlearn", "diffusers"))))
    return folder


def test_an_empty_or_missing_folder_has_no_results(tmp_path):
    assert load_results(tmp_path) == load_results(tmp_path / "nowhere") == []
    assert tabulate_steps([])["the plain loop"] == []


def test_shipped_results_are_read():
    assert len(load_results()) == len(list(RESULTS.glob("*.json")))
    for one in load_results():
        assert one.rows and all(row.seconds > 0 for row in one.rows)


def test_a_result_has_its_machine_versions_and_date(folder):
    comparison, steps = sorted(load_results(folder), key=lambda one: one.kind)
    data = json.loads((folder / "optimizations.json").read_text())
    for one in (steps, comparison):
        assert all(word in one.title for word in (data["machine"], data["date"], data["versions"]["torch"], "tiny"))
    assert [row.name for row in steps.rows] == [one["name"] for one in data["optimization steps"]]
    assert [row.exact for row in steps.rows][-2:] == [False, False] and steps.decoding > 0
    assert [row.name for row in comparison.rows] == ["sdlearn", "diffusers"] and comparison.rows[0].relative_time == 1
    ratio = json.loads((folder / "comparison.json").read_text())["time of sdlearn to that of"]["diffusers"]
    assert comparison.rows[1].relative_time == pytest.approx(1 / ratio)


def test_files_without_differences_from_the_first_step_are_read(folder, tmp_path):
    [new] = [one for one in load_results(folder) if one.kind == "optimizations"]
    assert new.rows[0].difference_from_first == 0 and new.rows[-1].difference_from_first > 0
    assert "from the first by" in format_result(new)
    data = json.loads((folder / "optimizations.json").read_text())
    for one in data["optimization steps"]:
        for name in [name for name in one if name.endswith("the first") and name != "time relative to the first"]:
            del one[name]
        del one["the first's image"]
    (tmp_path / "optimizations.json").write_text(json.dumps(data))
    [old] = load_results(tmp_path)
    assert {row.difference_from_first for row in old.rows} == {None} and "from the first" not in format_result(old)
    assert [replace(row, difference_from_first=None) for row in new.rows] == list(old.rows)


def test_files_with_the_keys_of_earlier_versions_are_read(folder, tmp_path):
    names = {new: old for old, new in OLD_KEYS.items()}

    def old_keys(data):
        if isinstance(data, dict):
            return {names.get(key, key): old_keys(value) for key, value in data.items()}
        return [old_keys(value) for value in data] if isinstance(data, list) else data
    for file in folder.glob("*.json"):
        data = old_keys(json.loads(file.read_text()))
        assert "ladder" in data or "contenders" in data
        (tmp_path / file.name).write_text(json.dumps(data))
    assert load_results(tmp_path) == load_results(folder)


def test_steps_that_were_not_measured_are_none(folder):
    [steps] = [one for one in load_results(folder) if one.kind == "optimizations"]
    table = tabulate_steps([steps, steps])
    assert table["half precision"] == table["CUDA graphs"] == [None, None]
    assert table["fewer steps of DPM++ 2M"][0].name == "2 steps of DPM++ 2M"
    assert [row for rows in table.values() for row in rows[:1] if row] == list(steps.rows)
    assert canonical_name("the plain loop") == "the plain loop"


def test_images_that_differ_have_no_ratio(folder, tmp_path):
    data = json.loads((folder / "comparison.json").read_text())
    del data["time of sdlearn to that of"]
    (tmp_path / "comparison.json").write_text(json.dumps(data))
    [result] = load_results(tmp_path)
    assert [row.relative_time for row in result.rows] == [1.0, None]
    assert "not compared" in format_result(result) and format_result(result).startswith(result.title)


def test_a_table_has_a_line_for_each_row(folder):
    for one in load_results(folder):
        lines = format_result(one).splitlines()
        assert len(lines) == 1 + len(one.rows) and ("another image" in lines[-1]) == (one.kind == "optimizations")


@pytest.mark.parametrize("text", [
    "{}", '{"ladder": 3, "machine": "x", "date": "y", "versions": {"torch": "z"}}', "[]", "{"])
def test_a_file_without_a_result_is_named_in_the_error(tmp_path, text):
    (tmp_path / "strange.json").write_text(text)
    with pytest.raises(CheckpointError, match="strange.json"):
        load_results(tmp_path)
