"""Optimization steps: each changes one thing, exact ones keep the image, and one that changes it is reported."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from sdlearn.__main__ import main
from sdlearn.bench import Benchmark, OptimizationStep, list_steps, optimizations, run_steps
from sdlearn.bench.comparison import save_weights
from sdlearn.bench.peaks import PEAKS, find_peak
from sdlearn.commands.optimizations import format_table
from sdlearn.config import PRESETS
from sdlearn.diagnostics.costs import step_flops
from sdlearn.guidance import predict_x0
from sdlearn.schedule import NoiseSchedule

QUICK = Benchmark(preset="tiny", rounds=1, batch=2)
COMMAND = ("optimizations", "--preset", "tiny", "--steps", "2", "--fewer", "2", "--rounds", "1", "--no-compile")


@pytest.fixture(scope="module")
def result():
    return run_steps(QUICK, list_steps("cpu", steps=4, fewer=3, compiled=False))


@pytest.mark.parametrize("device, missing", [("cpu", {"half precision", "CUDA graphs"}), ("cuda", set())])
def test_each_step_changes_one_thing(device, missing):
    steps = list_steps(device)
    assert {step.name for step in list_steps("cuda")} - {step.name for step in steps} == missing
    for previous, step in zip(steps, steps[1:], strict=False):
        changed = {f.name for f in fields(OptimizationStep) if getattr(previous, f.name) != getattr(step, f.name)}
        assert changed - {"name", "exact"} in ({"sampler", "steps"}, *({one} for one in (
            "dtype", "fused", "channels_last", "one_batch", "reuse", "shared", "compiled", "interval")))
    assert [step.name for step in steps if not step.exact] == ["20 steps of DPM++ 2M", "guidance in an interval"]


def test_exact_steps_make_the_image_of_the_previous_step(result):
    rows = result["optimization steps"]
    assert [one["name"] for one in rows][:3] == ["the plain loop", "fused attention", "channels last"]
    assert all(one["the same image"] for one in rows if one["exact"])
    assert not rows[-2]["exact"] and not rows[-2]["the same image"], "other steps"
    assert result["seconds to decode"] > 0 and result["machine"]


def test_exact_steps_make_the_image_of_the_first_step(result):
    rows = result["optimization steps"]
    assert rows[0]["largest difference from the first"] == rows[0]["mean difference from the first"] == 0
    assert all(one["the first's image"] for one in rows if one["exact"])
    assert not rows[-2]["the first's image"], "other steps"


def prepared(images, **step):
    return optimizations.PreparedStep(OptimizationStep("one", **step), None, None, None, images, None)


def test_rounding_that_adds_up_over_steps_is_found():
    """Each differs from the previous one by rounding, the third from the first by more. bfloat16 has a wider bound."""
    images = [np.full((1, 8, 8, 3), 100, np.uint8) for _ in range(3)]
    images[1][0, 0, 0, 0], images[2][0, 0, 0, 0] = 102, 104
    first, second, third = map(prepared, images)
    near, far = optimizations.compare_with_first(first, second), optimizations.compare_with_first(first, third)
    assert optimizations.compare_with_previous([second, third], [[1.0], [1.0]])["the same image"]
    assert near["the first's image"]
    assert far["largest difference from the first"] == 4 and not far["the first's image"]
    assert optimizations.compare_with_first(first, prepared(images[2], dtype="bfloat16"))["the first's image"]


def test_relative_time_is_the_median_of_the_ratios_to_the_previous_step():
    """Below 1 is faster. The median of the ratios turn by turn, not the ratio of the medians."""
    one, key = prepared(np.zeros((1, 8, 8, 3), np.uint8)), "time relative to the previous"
    seconds = [[2.0, 4.0, 30.0], [1.0, 4.0, 3.0]]                # of the previous step, and of this one
    assert optimizations.compare_with_previous([one, one], seconds)[key] == 0.5
    assert optimizations.compare_with_previous([one, one], seconds[::-1])[key] == 2
    assert optimizations.compare_with_previous([one], [[3.0, 5.0]])[key] == 1, "the first step has no previous one"


def test_a_step_that_takes_half_the_time_has_half_the_relative_time(monkeypatch):
    """Through the whole run, with a fake clock: every step takes half the time of the previous one."""
    steps = list_steps("cpu", steps=2, fewer=2, compiled=False)[:3]
    build, seconds = optimizations.build_sampler, {}

    def build_sampler(step, model, guidance):
        sample = build(step, model, guidance)
        seconds[id(sample)] = 8 * 0.5 ** steps.index(step)
        return sample

    monkeypatch.setattr(optimizations, "build_sampler", build_sampler)
    monkeypatch.setattr(optimizations, "time_call", lambda benchmark, sample, noise: seconds.get(id(sample), 1.0))
    rows = run_steps(replace(QUICK, rounds=3, batch=1), steps)["optimization steps"]
    assert [one["seconds"] for one in rows] == [8, 4, 2]
    assert [one["time relative to the previous"] for one in rows] == [1, 0.5, 0.5]
    assert [one["time relative to the first"] for one in rows] == [1, 0.5, 0.25]
    assert [one["guided steps a second"] for one in rows] == [0.25, 0.5, 1]
    lines = format_table({"optimization steps": rows, "seconds to decode": 1.0}).splitlines()
    assert lines[0].split()[2:4] == ["previous", "first"] and lines[3].split()[4:6] == ["0.50", "0.25"]


def test_a_step_with_another_image_than_the_first_fails_the_command(monkeypatch, capsys):
    compare = optimizations.compare_with_first
    monkeypatch.setattr(optimizations, "compare_with_first", lambda first, other: compare(first, other) | {
        "the first's image": other.step.name != "text and time once"})
    assert main([*COMMAND]) == 2
    assert "and of the first one, but do not: text and time once\n" in capsys.readouterr().err


def test_relative_times_to_the_first_are_products(result):
    ratio = 1.0
    for one in result["optimization steps"]:
        ratio *= one["time relative to the previous"]
        assert one["time relative to the first"] == pytest.approx(ratio)
        assert one["guided steps a second"] == pytest.approx(one["steps"] / one["seconds"])


def test_flops_are_those_of_the_passes(result):
    """Two images, four steps, two passes each; in the last step guidance is off at some steps."""
    flops = step_flops(PRESETS["tiny"].unet, PRESETS["tiny"].latent_size)
    plain, last = result["optimization steps"][0], result["optimization steps"][-1]
    assert plain["TFLOP/s"] * plain["seconds"] * 1e12 == pytest.approx(2 * 4 * 2 * flops)
    assert last["TFLOP/s"] * last["seconds"] * 1e12 < 2 * 3 * 2 * flops


def test_guidance_in_two_passes_equals_one_batch():
    def network(x, t, context):
        return x * context.mean(dim=(1, 2))[:, None, None, None] + t
    schedule = NoiseSchedule(PRESETS["tiny"].noise)
    x, (context, uncond) = torch.randn(3, 4, 2, 2), torch.randn(2, 3, 7, 5)
    torch.testing.assert_close(optimizations.denoise_in_two_passes(network, schedule, context, uncond, 4.0)(x, 500),
                               predict_x0(network, schedule, context, uncond, guidance_scale=4.0)(x, 500))


def test_an_exact_step_that_changes_the_image_fails_the_command(monkeypatch, capsys, tmp_path):
    build = optimizations.build_sampler

    def build_sampler(step, model, guidance):
        sample = build(step, model, guidance)
        return (lambda noise: sample(noise) + 0.5) if step.name == "channels last" else sample
    monkeypatch.setattr(optimizations, "build_sampler", build_sampler)
    out = tmp_path / "result.json"
    assert main([*COMMAND, "--out", str(out)]) == 2
    assert "do not: channels last, one batch for guidance" in capsys.readouterr().err
    assert len(json.loads(out.read_text())["optimization steps"]) == 8, "the result is written nevertheless"


def test_compiled_kernels_make_the_same_image():
    two = [step for step in list_steps("cpu", steps=2) if step.name in ("text and time once", "compiled kernels")]
    rows = run_steps(Benchmark(preset="tiny", rounds=1), two)["optimization steps"]
    assert rows[1]["the same image"] and rows[1]["name"] == "compiled kernels"


def test_the_table_has_a_line_for_each_step(result):
    lines = format_table(result).splitlines()
    assert len(lines) == 2 + len(result["optimization steps"]) and lines[-2].endswith("another image")


@pytest.mark.parametrize("name, part", [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H200"), ("Tesla T4", "T4"),
                                        ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4"), ("NVIDIA GeForce GTX 970", None)])
def test_peaks_are_found_by_the_name_of_the_gpu(name, part):
    assert find_peak(name) == (PEAKS[part] if part else None)


def test_a_model_folder_replaces_the_weights_of_the_preset(monkeypatch, tmp_path):
    folder, loaded = save_weights(QUICK, tmp_path / "model"), []
    load = optimizations.StableDiffusion.load
    monkeypatch.setattr(optimizations.StableDiffusion, "load", lambda source, **given: loaded.append(source) or load(
        source, **given))
    run_steps(QUICK, list_steps("cpu", steps=2)[:1], folder=folder)
    assert loaded == [folder]


def test_the_commands_earlier_name_still_runs_with_a_message(monkeypatch, capsys):
    from sdlearn.commands import optimizations as command
    monkeypatch.setattr(command, "run", lambda args: None)
    assert main(["ladder", "--steps", "2"]) == 0
    assert capsys.readouterr().err == "`ladder` is now called `optimizations`\n"
