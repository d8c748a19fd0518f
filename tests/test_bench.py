"""The benchmark makes both sides do the same, says how they compare, and will not compare what differs."""

import json

import numpy as np
import pytest
import torch

from sdlearn.__main__ import main
from sdlearn.bench import PicturesDiffer, Race, run
from sdlearn.bench import race as bench
from sdlearn.commands.bench import table
from sdlearn.config import PRESETS
from sdlearn.pipeline import SettingsError

PAIR = ("sdlearn", "diffusers")
QUICK = {"preset": "tiny", "steps": 2, "rounds": 2}


@pytest.fixture
def no_processes(monkeypatch):
    """Memory is measured in a process that loads the libraries anew: seconds each time."""
    monkeypatch.setattr(bench, "in_a_process", lambda *_: 1.0)


@pytest.mark.parametrize("sampler, batch, size", [("ddim", 2, None), ("euler", 1, 24), ("dpmpp_2m", 1, None)])
def test_both_make_the_same_pictures_of_noise(no_processes, sampler, batch, size):
    result = run(Race(**QUICK, sampler=sampler, batch=batch, size=size), PAIR)
    assert result["alike"]
    assert result["time of sdlearn to that of"]["diffusers"] > 0
    for told in result["contenders"].values():
        assert len(told["seconds of each turn"]) == 2
        assert told["pictures a second"] == pytest.approx(batch / told["seconds"])


def test_a_ratio_is_that_of_turns(no_processes, monkeypatch):
    """Times that are told: the median of a / b turn by turn, not the ratio of medians."""
    times = {"sdlearn": [1.0, 4.0, 3.0], "diffusers": [2.0, 2.0, 30.0]}
    same = np.zeros((1, 2, 2, 3), np.uint8)
    result = bench.report(Race(**QUICK), PAIR, times, dict.fromkeys(PAIR, same), dict.fromkeys(PAIR, 1.0))
    assert result["time of sdlearn to that of"]["diffusers"] == 0.5
    assert result["contenders"]["sdlearn"]["seconds"] == 3.0
    assert "0.50 of it" in table(result)


def test_every_turn_begins_with_another():
    assert [list(bench.rotated(("a", "b", "c"), turn)) for turn in range(3)] == [
        ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_different_pictures_get_no_ratio(no_processes, monkeypatch, tmp_path, capsys):
    """What was measured is written all the same."""
    made = bench.theirs

    def off(race, folder, compiled):
        pictures = made(race, folder, compiled)
        return lambda noise: pictures(noise) // 2
    monkeypatch.setattr(bench, "theirs", off)
    result = run(Race(**QUICK), PAIR)
    assert not result["alike"] and not any("time of" in key for key in result)
    out = tmp_path / "bench.json"
    assert main(["bench", "--preset", "tiny", "--steps", "2", "--rounds", "1", "--out", str(out)]) == 2
    assert "no ratio" in capsys.readouterr().err
    assert json.loads(out.read_text())["alike"] is False
    assert issubclass(PicturesDiffer, FloatingPointError)


def test_the_command_measures_and_writes(tmp_path, capsys):
    """With memory, each side in a process of its own, and nobody to compare with."""
    out = tmp_path / "bench.json"
    assert main(["bench", "--preset", "tiny", "--steps", "2", "--rounds", "1", "--against", "none", "--threads", "1",
                 "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    assert list(told["contenders"]) == ["sdlearn"] and told["contenders"]["sdlearn"]["peak memory, MiB"] > 100
    assert told["race"]["size"] == PRESETS["tiny"].image_size and told["versions"]["torch"] == torch.__version__
    assert "sdlearn" in capsys.readouterr().out


@pytest.mark.parametrize("settings, words", [({"preset": "huge"}, "no preset 'huge'"),
                                             ({"sampler": "heun"}, "'heun' is not among")])
def test_a_race_that_cannot_be_run_says_so(settings, words):
    with pytest.raises(SettingsError, match=words):
        Race(**settings)


def test_a_figure_that_cannot_be_written_is_told_before(capsys, tmp_path):
    assert main(["bench", "--out", str(tmp_path / "figures.txt")]) == 2
    assert ".json" in capsys.readouterr().err
