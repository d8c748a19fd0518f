"""The ladder: a rung changes one thing, exact ones paint the image of the one before, and what does not is told."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from sdlearn.__main__ import main
from sdlearn.bench import Race, Rung, climb, ladder, rungs_for
from sdlearn.bench.machine import PEAKS, peak_of
from sdlearn.bench.race import weights
from sdlearn.commands.ladder import table
from sdlearn.config import PRESETS
from sdlearn.diagnostics.costs import step_flops
from sdlearn.guidance import predict_x0
from sdlearn.schedule import NoiseSchedule

QUICK = Race(preset="tiny", rounds=1, batch=2)


@pytest.fixture(scope="module")
def climbed():
    return climb(QUICK, rungs_for("cpu", steps=4, fewer=3, compiled=False))


@pytest.mark.parametrize("device, missing", [("cpu", {"half precision", "CUDA graphs"}), ("cuda", set())])
def test_a_rung_changes_one_thing(device, missing):
    rungs = rungs_for(device)
    assert {rung.name for rung in rungs_for("cuda")} - {rung.name for rung in rungs} == missing
    for before, after in zip(rungs, rungs[1:], strict=False):
        changed = {f.name for f in fields(Rung) if getattr(before, f.name) != getattr(after, f.name)}
        assert changed - {"name", "exact"} in ({"sampler", "steps"}, *({one} for one in (
            "dtype", "fused", "channels_last", "one_batch", "reuse", "shared", "compiled", "interval")))
    assert [rung.name for rung in rungs if not rung.exact] == ["20 steps of DPM++ 2M", "guidance in an interval"]


def test_exact_rungs_paint_the_image_of_the_one_before(climbed):
    told = climbed["ladder"]
    assert [one["rung"] for one in told][:3] == ["the plain loop", "fused attention", "channels last"]
    assert all(one["the same image"] for one in told if one["exact"])
    assert not told[-2]["exact"] and not told[-2]["the same image"], "other steps"
    assert climbed["seconds to decode"] > 0 and climbed["machine"]


def test_exact_rungs_stay_with_the_first_image_too(climbed):
    told = climbed["ladder"]
    assert told[0]["largest difference from the first"] == told[0]["mean difference from the first"] == 0
    assert all(one["the first's image"] for one in told if one["exact"])
    assert not told[-2]["the first's image"], "other steps"


def test_small_steps_that_add_up_are_told():
    """Each is rounding from the one before; the third is beyond it from the first. In bfloat16 there is more room."""
    images = [np.full((1, 8, 8, 3), 100, np.uint8) for _ in range(3)]
    images[1][0, 0, 0, 0], images[2][0, 0, 0, 0] = 102, 104
    first, second, third = (ladder.Ready(Rung("one"), None, None, None, one, None) for one in images)
    near, far = ladder.from_first(first, second), ladder.from_first(first, third)
    assert ladder.compared([second, third], [[1.0], [1.0]])["the same image"] and near["the first's image"]
    assert far["largest difference from the first"] == 4 and not far["the first's image"]
    assert ladder.from_first(first, replace(third, rung=Rung("one", dtype="bfloat16")))["the first's image"]


def ready(value=100, **rung):
    return ladder.Ready(Rung("one", **rung), None, None, None, np.full((1, 8, 8, 3), value, np.uint8), None)


def test_a_ratio_is_of_the_time_to_that_of_the_rung_before():
    """Below 1 is faster. The median of the ratios turn by turn, not the ratio of the medians."""
    seconds = [[2.0, 4.0, 30.0], [1.0, 4.0, 3.0]]                # of the rung before, and of this one
    assert ladder.compared([ready(), ready()], seconds)["of the rung before"] == 0.5
    assert ladder.compared([ready(), ready()], seconds[::-1])["of the rung before"] == 2
    assert ladder.compared([ready()], [[3.0, 5.0]])["of the rung before"] == 1, "the first one has none before it"


def test_a_rung_that_takes_half_the_time_has_half_the_ratio(monkeypatch):
    """Through the whole run, with a clock that is given: a second for each rung, halved from one to the next."""
    rungs = rungs_for("cpu", steps=2, fewer=2, compiled=False)[:3]
    made, taken = ladder.painter, {}

    def painter(rung, model, guidance):
        paint = made(rung, model, guidance)
        taken[id(paint)] = 8 * 0.5 ** rungs.index(rung)
        return paint

    monkeypatch.setattr(ladder, "painter", painter)
    monkeypatch.setattr(ladder, "timed", lambda race, paint, given: taken.get(id(paint), 1.0))
    told = climb(replace(QUICK, rounds=3, batch=1), rungs)["ladder"]
    assert [one["seconds"] for one in told] == [8, 4, 2]
    assert [one["of the rung before"] for one in told] == [1, 0.5, 0.5]
    assert [one["of the first"] for one in told] == [1, 0.5, 0.25]
    assert [one["guided steps a second"] for one in told] == [0.25, 0.5, 1]
    lines = table({"ladder": told, "seconds to decode": 1.0}).splitlines()
    assert lines[0].split()[2:4] == ["before", "first"] and lines[3].split()[4:6] == ["0.50", "0.25"]


def test_a_rung_that_drifts_off_ends_the_command(monkeypatch, capsys):
    made = ladder.from_first
    monkeypatch.setattr(ladder, "from_first", lambda first, ready: made(first, ready) | {
        "the first's image": ready.rung.name != "text and time once"})
    assert main(["ladder", "--preset", "tiny", "--steps", "2", "--fewer", "2", "--rounds", "1", "--no-compile"]) == 2
    assert "and of the first, but do not: text and time once\n" in capsys.readouterr().err


def test_ratios_multiply_up(climbed):
    ratio = 1.0
    for one in climbed["ladder"]:
        ratio *= one["of the rung before"]
        assert one["of the first"] == pytest.approx(ratio)
        assert one["guided steps a second"] == pytest.approx(one["steps"] / one["seconds"])


def test_arithmetic_is_that_of_the_passes(climbed):
    """Two images, four steps, two passes each; in the last rung guidance is off at some steps."""
    flops = step_flops(PRESETS["tiny"].unet, PRESETS["tiny"].latent_size)
    plain, last = climbed["ladder"][0], climbed["ladder"][-1]
    assert plain["TFLOP/s"] * plain["seconds"] * 1e12 == pytest.approx(2 * 4 * 2 * flops)
    assert last["TFLOP/s"] * last["seconds"] * 1e12 < 2 * 3 * 2 * flops


def test_two_passes_are_one_batch():
    def network(x, t, context):
        return x * context.mean(dim=(1, 2))[:, None, None, None] + t
    schedule = NoiseSchedule(PRESETS["tiny"].noise)
    x, (context, uncond) = torch.randn(3, 4, 2, 2), torch.randn(2, 3, 7, 5)
    torch.testing.assert_close(ladder.two_passes(network, schedule, context, uncond, 4.0)(x, 500),
                               predict_x0(network, schedule, context, uncond, scale=4.0)(x, 500))


def test_a_rung_that_paints_another_image_is_told(monkeypatch, capsys, tmp_path):
    made = ladder.painter

    def off(rung, model, guidance):
        paint = made(rung, model, guidance)
        return (lambda noise: paint(noise) + 0.5) if rung.name == "channels last" else paint
    monkeypatch.setattr(ladder, "painter", off)
    out = tmp_path / "ladder.json"
    assert main(["ladder", "--preset", "tiny", "--steps", "2", "--fewer", "2", "--rounds", "1", "--no-compile",
                 "--out", str(out)]) == 2
    assert "do not: channels last, one batch for guidance" in capsys.readouterr().err
    assert len(json.loads(out.read_text())["ladder"]) == 8, "what was measured is written all the same"


def test_the_compiled_rung_paints_it_too():
    two = [rung for rung in rungs_for("cpu", steps=2) if rung.name in ("text and time once", "compiled kernels")]
    told = climb(Race(preset="tiny", rounds=1), two)["ladder"]
    assert told[1]["the same image"] and told[1]["rung"] == "compiled kernels"


def test_the_table_has_a_line_for_each(climbed):
    lines = table(climbed).splitlines()
    assert len(lines) == 2 + len(climbed["ladder"]) and lines[-2].endswith("another image")


@pytest.mark.parametrize("name, part", [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("Tesla T4", "T4"),
                                        ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"), ("NVIDIA GeForce GTX 970", None)])
def test_a_gpu_is_known_by_its_name(name, part):
    assert peak_of(name) == (PEAKS[part] if part else None)


def test_a_model_folder_takes_the_place_of_the_presets_weights(monkeypatch, tmp_path):
    folder, loaded = weights(QUICK, tmp_path / "model"), []
    load = ladder.StableDiffusion.load
    monkeypatch.setattr(ladder.StableDiffusion, "load", lambda source, **given: loaded.append(source) or load(
        source, **given))
    climb(QUICK, rungs_for("cpu", steps=2)[:1], folder=folder)
    assert loaded == [folder]
