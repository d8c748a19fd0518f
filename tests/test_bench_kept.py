"""Kept measurements: any number of files, what they hold is told with its machine, and nothing is guessed."""

import json
from dataclasses import replace

import pytest

from sdlearn.bench import Race, climb, run, rungs_for
from sdlearn.bench.kept import KEPT, kept, named, rung_table, table
from sdlearn.checkpoint import CheckpointError

QUICK = Race(preset="tiny", rounds=1, steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench")
    (place / "ladder.json").write_text(json.dumps(climb(QUICK, rungs_for("cpu", 3, 2, compiled=False))))
    (place / "race.json").write_text(json.dumps(run(QUICK, ("sdlearn", "diffusers"))))
    return place


def test_no_folder_and_no_file_are_no_measurements(tmp_path):
    assert kept(tmp_path) == kept(tmp_path / "nowhere") == []
    assert rung_table([])["the plain loop"] == []


def test_what_is_kept_with_the_package_can_be_read():
    assert len(kept()) == len(list(KEPT.glob("*.json")))
    for one in kept():
        assert one.rows and all(row.seconds > 0 for row in one.rows)


def test_a_file_is_told_with_its_machine(folder):
    ladder, race = sorted(kept(folder), key=lambda one: one.kind)
    data = json.loads((folder / "ladder.json").read_text())
    for one in (ladder, race):
        assert all(word in one.title for word in (data["machine"], data["date"], data["versions"]["torch"], "tiny"))
    assert [row.name for row in ladder.rows] == [one["rung"] for one in data["ladder"]]
    assert [row.exact for row in ladder.rows][-2:] == [False, False] and ladder.decoding > 0
    assert [row.name for row in race.rows] == ["sdlearn", "diffusers"] and race.rows[0].times == 1
    ratio = json.loads((folder / "race.json").read_text())["time of sdlearn to that of"]["diffusers"]
    assert race.rows[1].times == pytest.approx(1 / ratio)


def test_an_older_ladder_does_not_tell_how_far_the_first_is(folder, tmp_path):
    [new] = [one for one in kept(folder) if one.kind == "ladder"]
    assert new.rows[0].from_first == 0 and new.rows[-1].from_first > 0 and "from the first by" in table(new)
    data = json.loads((folder / "ladder.json").read_text())
    for one in data["ladder"]:
        for name in [name for name in one if name.endswith("the first") and name != "of the first"]:
            del one[name]
        del one["the first's image"]
    (tmp_path / "ladder.json").write_text(json.dumps(data))
    [old] = kept(tmp_path)
    assert {row.from_first for row in old.rows} == {None} and "from the first" not in table(old)
    assert [replace(row, from_first=None) for row in new.rows] == list(old.rows)


def test_what_was_not_measured_is_none(folder):
    [ladder] = [one for one in kept(folder) if one.kind == "ladder"]
    table = rung_table([ladder, ladder])
    assert table["half precision"] == table["CUDA graphs"] == [None, None]
    assert table["fewer steps of DPM++ 2M"][0].name == "2 steps of DPM++ 2M"
    assert [row for rows in table.values() for row in rows[:1] if row] == list(ladder.rows)
    assert named("the plain loop") == "the plain loop"


def test_images_that_differ_have_no_ratio(folder, tmp_path):
    data = json.loads((folder / "race.json").read_text())
    del data["time of sdlearn to that of"]
    (tmp_path / "race.json").write_text(json.dumps(data))
    [race] = kept(tmp_path)
    assert [row.times for row in race.rows] == [1.0, None]
    assert "not compared" in table(race) and table(race).startswith(race.title)


def test_a_table_has_a_line_for_each_row(folder):
    for one in kept(folder):
        lines = table(one).splitlines()
        assert len(lines) == 1 + len(one.rows) and ("another image" in lines[-1]) == (one.kind == "ladder")


@pytest.mark.parametrize("text", [
    "{}", '{"ladder": 3, "machine": "x", "date": "y", "versions": {"torch": "z"}}', "[]", "{"])
def test_what_is_no_measurement_is_told_with_its_file(tmp_path, text):
    (tmp_path / "strange.json").write_text(text)
    with pytest.raises(CheckpointError, match="strange.json"):
        kept(tmp_path)
