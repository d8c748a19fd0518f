"""The side-by-side benchmark: both make the same images, relative times, and no ratio where images differ."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._inductor.graph
from torch import nn

from sdlearn.__main__ import main
from sdlearn.bench import Benchmark, ImagesDiffer, diffusers_compile, run_benchmark
from sdlearn.bench import comparison as bench
from sdlearn.bench.peaks import PEAKS
from sdlearn.bench.roofline import least_seconds_of_run
from sdlearn.commands.bench import format_table
from sdlearn.config import PRESETS
from sdlearn.diagnostics.costs import step_flops
from sdlearn.pipeline import SettingsError
from sdlearn.pipeline.compiled import compiler_settings

PAIR = ("sdlearn", "diffusers")
QUICK = {"preset": "tiny", "steps": 2, "rounds": 2}


@pytest.fixture
def no_processes(monkeypatch):
    """Memory is measured in a process of its own, which takes seconds to load the libraries."""
    monkeypatch.setattr(bench, "measure_peak_memory", lambda *_: 1.0)


@pytest.mark.parametrize("sampler, batch, size", [("ddim", 2, None), ("euler", 1, 24), ("dpmpp_2m", 1, None)])
def test_both_implementations_make_the_same_images(no_processes, sampler, batch, size):
    result = run_benchmark(Benchmark(**QUICK, sampler=sampler, batch=batch, size=size), PAIR)
    assert result["alike"]
    assert result["time of sdlearn to that of"]["diffusers"] > 0
    for one in result["implementations"].values():
        assert len(one["seconds of each turn"]) == 2
        assert one["images a second"] == pytest.approx(batch / one["seconds"])


def test_a_ratio_is_the_median_over_turns(no_processes, monkeypatch):
    """The median of a / b turn by turn, not the ratio of medians."""
    times = {"sdlearn": [1.0, 4.0, 3.0], "diffusers": [2.0, 2.0, 30.0]}
    same = np.zeros((1, 2, 2, 3), np.uint8)
    result = bench.summarize(Benchmark(**QUICK), PAIR, times, dict.fromkeys(PAIR, same), dict.fromkeys(PAIR, 1.0))
    assert result["time of sdlearn to that of"]["diffusers"] == 0.5
    assert result["implementations"]["sdlearn"]["seconds"] == 3.0
    assert "0.50 of it" in format_table(result)


def test_a_faster_side_has_a_ratio_below_one_and_more_of_everything_a_second():
    times, same = {"sdlearn": [1.0], "diffusers": [4.0]}, dict.fromkeys(PAIR, np.zeros((2, 2, 2, 3), np.uint8))
    result = bench.summarize(Benchmark(preset="tiny", steps=8, batch=2), PAIR, times, same, dict.fromkeys(PAIR, 1.0))
    assert result["time of sdlearn to that of"] == {"diffusers": 0.25}
    fast, slow = (result["implementations"][name] for name in PAIR)
    assert (fast["images a second"], slow["images a second"]) == (2.0, 0.5)
    assert (fast["guided steps a second"], slow["guided steps a second"]) == (8.0, 2.0)
    assert fast["TFLOP/s of the U-Net"] == pytest.approx(4 * slow["TFLOP/s of the U-Net"])


def test_guidance_takes_two_passes_of_the_network_and_none_takes_one():
    same, flops = dict.fromkeys(PAIR, np.zeros((2, 2, 2, 3), np.uint8)), {}
    for guidance in (1.0, 5.0):
        benchmark = Benchmark(preset="tiny", steps=8, batch=2, guidance=guidance)
        result = bench.summarize(benchmark, PAIR, dict.fromkeys(PAIR, [1.0]), same, dict.fromkeys(PAIR, 1.0))
        flops[guidance] = result["implementations"]["sdlearn"]["TFLOP/s of the U-Net"] * 1e12
    config = PRESETS["tiny"]
    assert flops[1.0] == pytest.approx(2 * 8 * step_flops(config.unet, config.latent_size))
    assert flops[5.0] == pytest.approx(2 * flops[1.0])


@pytest.mark.parametrize("device, gpu, known", [("cuda", "NVIDIA H100 80GB HBM3", True), ("cuda", "Some GPU", False),
                                                ("cpu", None, False)])
def test_the_share_of_the_roofline_is_given_for_known_gpus(monkeypatch, device, gpu, known):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: gpu)
    benchmark = Benchmark(preset="mini", steps=20, batch=2, device=device, dtype="bfloat16")
    same = dict.fromkeys(PAIR, np.zeros((1, 2, 2, 3), np.uint8))
    result = bench.summarize(benchmark, PAIR, {"sdlearn": [0.5], "diffusers": [1.0]}, same, dict.fromkeys(PAIR, 1.0))
    shares = [one.get("share of the roofline") for one in result["implementations"].values()]
    least = least_seconds_of_run(PRESETS["mini"], benchmark.side, PEAKS["H100"], steps=20, batch=2)
    assert shares == ([pytest.approx(least / 0.5), pytest.approx(least)] if known else [None, None])
    assert ("of the roofline" in format_table(result)) == known
    assert len({len(line) for line in format_table(result).splitlines()}) == 1, "columns"


def test_compiled_diffusers_is_configured_as_in_its_guide_and_makes_the_same_images(no_processes, monkeypatch):
    """All but the compiler, which needs a GPU for these options: projections fused, channels last, flags given."""
    asked, seen = [], []

    @torch.no_grad()
    def as_on_a_gpu(pipe, gpu):
        given = torch.randn(2, 4, 8, 8), 500, torch.randn(2, 77, pipe.unet.config.cross_attention_dim)
        seen.append(pipe.unet(*given).sample)
        diffusers_compile.compile_pipeline(pipe, gpu=True)
        seen.append(pipe.unet(*given).sample)
    monkeypatch.setattr(bench, "compile_pipeline", as_on_a_gpu)
    monkeypatch.setattr(torch, "compile", lambda part, **how: asked.append((part, how)) or part)
    result = run_benchmark(Benchmark(**QUICK), ("diffusers", "diffusers compiled"))
    assert result["alike"] and result["implementations"]["diffusers compiled"]["largest difference"] <= 1
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
    [(unet, how), (_, decoder)] = asked
    assert how == decoder and how["fullgraph"] and diffusers_compile.INDUCTOR_OPTIONS.items() <= how["options"].items()
    assert how["options"]["max_autotune"] and how["options"]["triton.cudagraphs"]
    assert {type(one).__name__ for one in unet.attn_processors.values()} == {"FusedAttnProcessor2_0"}
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_compiler_options_apply_to_one_implementation_alone(monkeypatch):
    """What the compiler is set to while it lowers a graph, and afterwards."""
    seen, config = [], torch._inductor.config

    def flags():
        return {name: getattr(config, name) for name in diffusers_compile.INDUCTOR_OPTIONS}

    def lower(*_):
        seen.append((flags(), config.freezing))
        raise RuntimeError("seen enough")
    monkeypatch.setattr(torch._inductor.graph.GraphLowering, "run", lower)
    before, pipe = flags(), SimpleNamespace(fuse_qkv_projections=lambda: None, unet=nn.Conv2d(2, 2, 1), vae=nn.Conv2d(
        2, 2, 1))
    pipe.vae.decode = pipe.vae.forward
    diffusers_compile.compile_pipeline(pipe, gpu=True)
    ours = torch.compile(nn.Conv2d(2, 2, 1), fullgraph=True, dynamic=False)
    for call, inside in ((pipe.unet, nullcontext()), (ours, compiler_settings(freezing=True)),
                         (pipe.vae.decode, nullcontext())):
        with torch.no_grad(), inside, pytest.raises(Exception, match="seen enough"):
            call(torch.zeros(1, 2, 4, 4))
        assert flags() == before
    torch._dynamo.reset()
    assert before != diffusers_compile.INDUCTOR_OPTIONS
    options = diffusers_compile.INDUCTOR_OPTIONS
    assert seen == [(options, False), (before, True), (options, False)]


def test_every_turn_begins_with_another_implementation():
    assert [list(bench.rotate(("a", "b", "c"), turn)) for turn in range(3)] == [
        ["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_different_images_get_no_ratio(no_processes, monkeypatch, tmp_path, capsys):
    """The result is written nevertheless."""
    made = bench.load_diffusers

    def off(benchmark, folder, compiled):
        images = made(benchmark, folder, compiled)
        return lambda noise: images(noise) // 2
    monkeypatch.setattr(bench, "load_diffusers", off)
    result = run_benchmark(Benchmark(**QUICK), PAIR)
    assert not result["alike"] and not any("time of" in key for key in result)
    out = tmp_path / "bench.json"
    assert main(["bench", "--preset", "tiny", "--steps", "2", "--rounds", "1", "--out", str(out)]) == 2
    assert "no ratio" in capsys.readouterr().err
    assert json.loads(out.read_text())["alike"] is False
    assert issubclass(ImagesDiffer, FloatingPointError)


def test_the_command_measures_and_writes(tmp_path, capsys):
    """With memory, each side in a process of its own, and nobody to compare with."""
    out = tmp_path / "bench.json"
    assert main(["bench", "--preset", "tiny", "--steps", "2", "--rounds", "1", "--against", "none", "--threads", "1",
                 "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(result["implementations"]) == ["sdlearn"]
    assert result["implementations"]["sdlearn"]["peak memory, MiB"] > 100
    assert result["benchmark"]["size"] == PRESETS["tiny"].image_size
    assert result["versions"]["torch"] == torch.__version__
    assert "sdlearn" in capsys.readouterr().out


@pytest.mark.parametrize("settings, words", [({"preset": "huge"}, "no preset 'huge'"),
                                             ({"sampler": "heun"}, "'heun' is not among")])
def test_unknown_presets_and_samplers_raise(settings, words):
    with pytest.raises(SettingsError, match=words):
        Benchmark(**settings)


def test_a_bad_output_file_is_refused_before_the_benchmark(capsys, tmp_path):
    assert main(["bench", "--out", str(tmp_path / "figures.txt")]) == 2
    assert ".json" in capsys.readouterr().err
