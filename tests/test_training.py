"""The recipes at small size: they learn, stop, go on where they were, and ship what they learned."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recipes import scene_config

from sdlearn.__main__ import main
from sdlearn.checkpoint import load_folder
from sdlearn.clip import CLIP, contrastive_loss
from sdlearn.commands import train as command
from sdlearn.config import PRESETS
from sdlearn.data import CORE, WORLDS, World
from sdlearn.data.captions import CAPTION_LABELS
from sdlearn.data.world import world_name
from sdlearn.images import psnr, to_images, to_tensor
from sdlearn.training import stages
from sdlearn.training.card import package_weights
from sdlearn.training.clip import (
    CLIPRecipe,
    CLIPWithClassifier,
    hard_negative_accuracy,
    hard_negative_loss,
    relation_accuracy,
    retrieval_accuracy,
    trim_padding,
)
from sdlearn.training.loop import (
    EMA,
    Progress,
    Threads,
    choose_precision,
    fit,
    load_state,
    load_weights,
    save_state,
)
from sdlearn.training.unet import LatentCache, UNetRecipe, draw_shifted_timesteps, validation_prompts
from sdlearn.training.vae import VAERecipe, gradient_loss, init_vae, measure_scaling_factor
from sdlearn.vae import VAE, DiagonalGaussian

MINUTE = 1 / 60


@pytest.fixture(scope="module")
def config():
    return scene_config()


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run with a second of every stage behind it."""
    folder = tmp_path_factory.mktemp("run")
    stages.train_tokenizer(config, folder, captions=2000)
    for name, options in {"vae": {}, "clip": {"batch_size": 8}, "unet": {"batch_size": 4, "first": 50}}.items():
        recipe = stages.STAGES[name].make(config, folder, **options)
        recipe.warmup = 1
        for _ in fit(recipe, folder, minutes=1 * MINUTE, report_minutes=60):
            pass
    return folder


def steps(recipe, folder, count, **options):
    """`count` steps of training, then a clean end."""
    loop = fit(recipe, folder, minutes=10, **options)
    for progress, _ in loop:
        if progress.step >= count:
            return progress
    raise AssertionError("the budget ended first")


def test_every_stage_leaves_state_figures_and_a_sheet(run):
    for name in ("vae", "clip", "unet"):
        progress = load_state(run / f"{name}-state.pt")["progress"]
        assert progress["step"] > 0 and progress["samples"] > 0 and 0 < progress["seconds"] < 60
        assert math.isfinite(progress["loss"]) and progress["history"][-1]["step"] == progress["step"]
        assert list(run.glob(f"{name}-*.png"))
    assert not list(run.glob("*.part"))


def test_a_run_goes_on_where_it_was(config, tmp_path, monkeypatch):
    class Counting(VAERecipe):
        def report(self, averaged, folder, step):
            return {}

    for _ in fit(Counting(config, batch_size=1), tmp_path, minutes=0.3 * MINUTE):
        pass
    first = load_state(tmp_path / "vae-state.pt")
    again = Counting(config, batch_size=1)
    progress, _ = next(fit(again, tmp_path, minutes=1))
    assert progress.step == first["progress"]["step"] + 1
    assert progress.samples > first["progress"]["samples"] and progress.seconds > first["progress"]["seconds"]
    far = max((again.model.state_dict()[key] - value).abs().max() for key, value in first["model"].items())
    assert 0 < far < 0.1, "the weights are one step away from the stored ones"


def test_an_optimiser_that_starts_anew_is_warmed_up(config, tmp_path):
    """Shipped weights come without one: its first steps would be as large as any, in a direction that is noise."""
    recipe = VAERecipe(config, batch_size=1)
    recipe.warmup, recipe.learning_rate = 1000, 1.0
    weights = {key: value.clone() for key, value in recipe.model.state_dict().items()}
    save_state(tmp_path / "vae-state.pt", {"model": weights, "average": weights, "progress": {"step": 5000}})
    progress, _ = next(fit(recipe, tmp_path, minutes=1))
    assert progress.step == 5001 and progress.worlds == ["core", "full"]
    # AdamW's first step is the learning rate in each parameter, and weight decay
    far = max((recipe.model.state_dict()[key] - value).abs().max() for key, value in weights.items())
    assert 0 < far < 2e-3


def test_a_kill_loses_less_than_a_minute(tmp_path):
    """Killed for good while it trains, at any moment: what is on disk is whole and can be gone on with."""
    code = ("from dataclasses import replace; from pathlib import Path; from sdlearn.config import PRESETS, VAEConfig\n"
            "from sdlearn.training.vae import VAERecipe; from sdlearn.training.loop import fit\n"
            "small = VAEConfig(channels=(4, 4, 8, 8), layers_per_block=1, groups=2)\n"
            "config = replace(PRESETS['tiny'], vae=small, image_size=128)\n"
            f"for p, _ in fit(VAERecipe(config), Path({str(tmp_path)!r}), minutes=5, save_seconds=0.05): "
            "print(p.step, flush=True)\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    told = 0
    while told < 12:
        told = int(process.stdout.readline())
    time.sleep(0.05)
    process.kill()
    process.wait()
    state = load_state(tmp_path / "vae-state.pt")
    assert 0 < state["progress"]["step"] and set(state["model"]) == set(state["average"])


def test_the_default_saves_often_enough():
    assert fit.__kwdefaults__["save_seconds"] < 60


def test_a_state_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "vae-state.pt"
    save_state(file, {"step": 1})

    def broken(state, beside):
        Path(beside).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_state(file, {"step": 2})
    assert load_state(file) == {"step": 1}
    assert load_state(tmp_path / "none.pt") is None


def test_a_damaged_state_is_told(tmp_path):
    file = tmp_path / "vae-state.pt"
    save_state(file, {"weights": torch.zeros(1000)})
    whole = file.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", b"nothing of the kind"):
        file.write_bytes(damaged)
        with pytest.raises(OSError, match="vae-state.pt' is damaged"):
            load_state(file)


@pytest.mark.parametrize("args", [["--minutes", "0"], ["--minutes", "nan"], ["--batch", "-1"], ["--batch", "1.5"],
                                  ["--rate", "x"], ["--report-minutes", "inf"]])
def test_settings_of_training_that_make_no_sense_are_told(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "vae", *args])
    assert stopped.value.code == 2
    assert "is not a number above zero" in capsys.readouterr().err


def test_the_loss_falls_on_one_batch(config):
    recipe = VAERecipe(config)
    batch = recipe.batch(torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(recipe.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss, _ = recipe.loss(recipe.model, *batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_a_nan_stops_the_run_and_keeps_the_state(config, tmp_path):
    recipe = VAERecipe(config, batch_size=1)
    recipe.report = lambda *_: {}
    for _ in fit(recipe, tmp_path, minutes=0.2 * MINUTE):
        pass
    broken = VAERecipe(config, batch_size=1)
    broken.loss = lambda model, pixels: (model.encode(pixels).mean.sum() * float("nan"), {})
    with pytest.raises(FloatingPointError, match="became NaN at step"):
        list(fit(broken, tmp_path, minutes=1))
    assert all(value.isfinite().all() for value in load_state(tmp_path / "vae-state.pt")["model"].values())


def test_the_average_follows_and_lags():
    model = torch.nn.Linear(2, 2)
    average = EMA(model, decay=0.9)
    start = average.model.weight.clone()
    with torch.no_grad():
        model.weight += 1
    average.update(model, step=1000)
    torch.testing.assert_close(average.model.weight, start + 0.1)
    average.update(model, step=0)                   # at the start it keeps one part in ten
    torch.testing.assert_close(average.model.weight, model.weight - 0.9 * 0.1)


class Uphill:
    """One number, which every step moves by the learning rate."""

    name, batch_size, learning_rate, warmup, decay_share = "uphill", 1, 0.1, 1, 0.0

    def __init__(self):
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.moves = []

    def batch(self, generator):
        time.sleep(0.02)
        return torch.ones(1, 1),

    def loss(self, model, x):
        self.moves.append(float(self.model.weight.detach()))
        return -model(x).sum(), {}

    def report(self, averaged, folder, step):
        return {}


def test_annealing_ends_at_rest_and_averages_itself_alone(tmp_path):
    """Without it the rate stays, and the average holds what was long ago."""
    for _ in fit(Uphill(), tmp_path, minutes=0.02, precision="no", compiled=False):
        pass
    plain = load_state(tmp_path / "uphill-state.pt")
    before, after = Uphill(), Uphill()
    for _ in fit(before, tmp_path, minutes=0.02, precision="no", compiled=False):
        pass
    moves = torch.tensor(before.moves).diff()
    assert moves[-1] == pytest.approx(float(moves[1]), rel=0.1)
    for _ in fit(after, tmp_path, minutes=0.03, precision="no", compiled=False, anneal=True):
        pass
    moves, state = torch.tensor(after.moves).diff(), load_state(tmp_path / "uphill-state.pt")
    assert moves[-1] < 0.2 * moves[1] and (moves.diff() < 1e-4).all()
    assert after.moves[0] < float(state["average"]["weight"]) < float(state["model"]["weight"])
    assert state["progress"]["step"] == plain["progress"]["step"] + len(before.moves) + len(after.moves)


def test_bf16_is_never_chosen_where_it_is_emulated(config, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert choose_precision(VAERecipe(config), torch.device("cpu")) == "no"


def test_bf16_trains_too(config, tmp_path):
    """Through autocast on the CPU, whatever its speed: two steps."""
    recipe = VAERecipe(config, batch_size=1)
    assert steps(recipe, tmp_path, 2, precision="bf16", compiled=False).loss > 0


def test_crops_show_something(config):
    recipe = VAERecipe(config)
    generator = torch.Generator().manual_seed(0)
    shapes, busy = set(), 0
    for _ in range(30):
        (pixels,) = recipe.batch(generator)
        shapes.add(tuple(pixels.shape))
        busy += int((pixels.flatten(1).std(dim=1) > 0.05).float().mean() > 0.8)
    assert {shape[-1] for shape in shapes} == {32, 64, 128} and busy >= 25
    assert {shape[0] * shape[2] ** 2 for shape in shapes} <= {8 * 32**2, 128**2}


def test_decoder_only_training_leaves_latents_alone(config, tmp_path):
    recipe = VAERecipe(config, decoder_only=True)
    before = {name: value.clone() for name, value in recipe.model.state_dict().items()}
    steps(recipe, tmp_path, 3)
    for name, value in recipe.model.state_dict().items():
        frozen = name.startswith(("encoder", "quant_conv"))
        assert torch.equal(value, before[name]) == frozen, name


def test_a_fresh_autoencoder_keeps_its_posterior_narrow(config):
    pixels = to_tensor([image_of(0), image_of(1)])
    posterior = init_vae(config).encode(pixels)
    assert posterior.std.max() < 0.5 < posterior.mean.std()


def image_of(seed):
    from sdlearn.data import draw_scene
    return draw_scene(seed).image


def test_scaling_brings_latents_to_unit_deviation(config):
    vae = VAE(config.vae)
    factor = measure_scaling_factor(vae, count=32)
    scaled = VAE(replace(config.vae, scaling_factor=factor))
    scaled.load_state_dict(vae.state_dict())
    latents = torch.cat([scaled.to_latent(to_tensor([image_of(seed)])) for seed in range(32)])
    assert float(latents.std().detach()) == pytest.approx(1, rel=1e-4)


def test_images_survive_the_way_to_tensors_and_back():
    image = image_of(3)
    assert (to_images(to_tensor([image]))[0] == image).all()
    a = torch.zeros(1, 3, 8, 8)
    assert psnr(a, a + 0.2) == pytest.approx(20, abs=1e-4)              # 10 log10(4 / 0.04)
    assert gradient_loss(a, a + 0.5) == 0


def test_shortening_changes_no_embedding(config, run):
    tokenizer = stages.train_tokenizer(config, run)
    encoders = CLIP(config.text, config.vision).eval()
    ids = tokenizer(["a cat", "a red apple to the left of a cat on a yellow background"])
    short = trim_padding(ids, tokenizer.end)
    assert short.shape[1] < 40 and (short[:, -1] == tokenizer.end).all()
    torch.testing.assert_close(encoders.encode_text(short), encoders.encode_text(ids))


def test_retrieval_of_random_and_of_perfect_encoders(config, run):
    tokenizer = stages.train_tokenizer(config, run)
    encoders = CLIP(config.text, config.vision).eval()
    assert retrieval_accuracy(encoders, tokenizer, count=40) < 0.3
    count = iter(range(10**6))

    def own(things):                                # the i-th image and the i-th caption meet
        return torch.stack([torch.nn.functional.one_hot(torch.tensor(next(count) % 20), 20).float() for _ in things])

    encoders.encode_image = encoders.encode_text = own
    assert retrieval_accuracy(encoders, tokenizer, count=20) == 1


def test_the_cache_holds_what_the_models_say_and_is_taken_up_again(config, run, tmp_path):
    encoders = stages.load_averaged(CLIP(config.text, config.vision), run, "clip")
    vae, tokenizer = stages.load_trained_vae(config, run), stages.train_tokenizer(config, run)
    make = {"world": CORE, "image_size": 128, "capacity": 60, "first": 50}
    cache = LatentCache(tmp_path, vae, encoders.text_model, tokenizer, **make)
    assert len(cache) == 50
    latents, contexts = cache.batch(7, torch.Generator().manual_seed(0))
    assert latents.shape == (7, 4, 16, 16) and contexts.shape == (7, 77, config.text.dim)
    from sdlearn.data import draw_scene
    first = vae.to_latent(to_tensor([draw_scene(0, world=CORE).image]))[0]
    assert (torch.from_numpy(cache.arrays["latents"][0]).float() - first).abs().max() < 0.01
    cache.refresh(50)                               # goes round: the oldest rows are overwritten
    assert len(cache) == 60 and cache.meta["made"] == 100
    for array in cache.arrays.values():
        array.flush()
    again = LatentCache(tmp_path, vae, encoders.text_model, tokenizer, **make)
    assert again.meta["made"] == 100
    for name in again.arrays:                       # pages that were never written out read as zeros
        again.arrays[name][7] = 0
        again.arrays[name].flush()
        again = LatentCache(tmp_path, vae, encoders.text_model, tokenizer, **make)
        assert again.meta["made"] == 50 and all(array[7].any() for array in again.arrays.values())
    other = LatentCache(tmp_path, vae, encoders.text_model, tokenizer, **{**make, "world": replace(CORE, pair=0.0)})
    assert other.meta["made"] == 50, "scenes of another world are made anew"


def test_timesteps_come_at_the_stated_rate():
    generator = torch.Generator().manual_seed(0)
    for shift in (1.0, 3.0):
        t = torch.cat([draw_shifted_timesteps(32, 1000, shift, generator) for _ in range(400)]).float() / 1000
        assert t.min() < 0.01 and 0.98 < t.max() < 1
        for share in (0.2, 0.5, 0.9):                   # of the timesteps come before shift u / (1 + (shift - 1) u)
            place = shift * share / (1 + (shift - 1) * share)
            assert abs((t < place).float().mean() - share) < 0.01
    one = draw_shifted_timesteps(8, 1000, 1.0, generator)
    assert (one // 125 == torch.arange(8)).all(), "one in each part"


def test_captions_are_dropped_at_the_stated_rate(config, run, tmp_path):
    recipe = stages.make_unet(config, run, batch_size=64, dropout=0.25, shift=1.0)
    generator = torch.Generator().manual_seed(0)
    batches = [recipe.batch(generator) for _ in range(20)]
    dropped = torch.stack([(contexts == recipe.empty).all(dim=(1, 2)).float() for _, contexts, _, _ in batches])
    assert 0.2 < dropped.mean() < 0.3
    t = torch.stack([t for _, _, t, _ in batches]).flatten()
    assert t.min() < 10 and t.max() > 989 and abs(t.float().mean() - 499.5) < 5
    noise = torch.stack([noise for *_, noise in batches])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_a_stage_says_what_must_come_first(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="the stage 'clip' has not been trained in .*: run `train clip` first"):
        stages.make_unet(config, tmp_path)


def test_fixed_prompts_never_change():
    assert validation_prompts(4) == validation_prompts(30)[:4]
    assert validation_prompts(1) == ["a red apple to the left of a cat on a yellow background"]


def test_shipping_writes_a_folder_that_loads_and_a_card_that_was_measured(config, run, tmp_path, monkeypatch):
    from sdlearn.training import card
    monkeypatch.setattr(card, "autoencoder_psnr", lambda vae: 12.345)
    monkeypatch.setattr(card, "retrieval_accuracy", lambda clip, tokenizer: 0.678)
    monkeypatch.setattr(card, "autoencoder_by_size", lambda vae: {"tiny": {"objects": 7, "pixels": 9, "PSNR": 23.4,
                                                                           "SSIM": 0.5678}})
    folder = package_weights(config, run, tmp_path / "model", count=3)
    parts = load_folder(folder)
    assert parts.config.vae.scaling_factor != 1 and len(parts.world["objects"]) == len(CORE.objects)
    stored = load_state(run / "unet-state.pt")["average"]
    for name, value in parts.unet.state_dict().items():
        assert torch.equal(value, stored[name].half().float())
    assert (folder / "samples.png").stat().st_size > 1000
    text = (folder / "MODEL_CARD.md").read_text()
    assert "12.345" in text and "0.678" in text and "| tiny | 7 | 9 | 23.4 | 0.568 |" in text
    for one in json.loads(card.EXPERIMENTS.read_text(encoding="utf-8")):
        assert one["question"] in text and all(len(row) == len(one["columns"]) for row in one["rows"])
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["training"]["unet"]["step"] == load_state(run / "unet-state.pt")["progress"]["step"]


def test_the_autoencoders_errors_are_told_by_size():
    """Of one that makes every pixel paler."""
    from sdlearn.training.card import autoencoder_by_size

    class Paler:
        def encode(self, pixels):
            return DiagonalGaussian(0.8 * pixels, torch.zeros_like(pixels))

        def decode(self, latent):
            return latent + 0.2

    found = autoencoder_by_size(Paler(), count=3)
    assert list(found) == ["small", "medium", "large"]
    assert found["small"]["pixels"] < found["medium"]["pixels"] < found["large"]["pixels"]
    for told in found.values():
        assert 3 <= told["objects"] <= 5 and told["PSNR"] > 10 and 0.5 < told["SSIM"] < 1


def test_a_run_starts_from_shipped_weights(config, run, tmp_path, monkeypatch):
    from sdlearn.training import card
    monkeypatch.setattr(card, "autoencoder_psnr", lambda vae: 1.0)
    monkeypatch.setattr(card, "retrieval_accuracy", lambda clip, tokenizer: 1.0)
    monkeypatch.setattr(card, "autoencoder_by_size", lambda vae: {})
    folder = package_weights(config, run, tmp_path / "model", count=2)
    assert stages.start_from(folder, tmp_path / "new") == ["vae", "clip", "unet"]
    assert stages.start_from(folder, tmp_path / "new") == [], "what a run has already stays"
    old = load_state(run / "unet-state.pt")
    recipe = stages.make_unet(config, tmp_path / "new", batch_size=4, first=8, capacity=8)
    recipe.learning_rate = 0.0
    recipe.report = lambda *_: {}
    progress, _ = next(fit(recipe, tmp_path / "new", minutes=1))
    assert progress.step == old["progress"]["step"] + 1
    for name, value in recipe.model.state_dict().items():
        torch.testing.assert_close(value, old["average"][name].half().float())


def test_the_command_trains_and_goes_on(tmp_path):
    """The real command line, at `tiny` size, twice: the second call goes on."""
    for _ in range(2):
        done = subprocess.run([sys.executable, "-m", "sdlearn", "train", "vae", "--preset", "tiny", "--minutes", "0.02",
                               "--run", str(tmp_path)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["psnr"] > 0
    history = load_state(tmp_path / "vae-state.pt")["progress"]["history"]
    assert len(history) == 2 and history[1]["step"] > history[0]["step"]


def test_the_command_shifts_the_unets_timesteps_alone(monkeypatch, tmp_path):
    made = {}
    stand_ins = {name: stages.Stage(lambda config, run, name=name, **options: made.setdefault(name, options), 1)
                 for name in ("unet", "edges")}
    monkeypatch.setattr(stages, "STAGES", stand_ins)
    monkeypatch.setattr(command, "fit", lambda *args, **options: [(Progress(history=[{"loss": 1.0}]), None)])
    for stage in ("unet", "edges"):
        main(["train", stage, "--preset", "tiny", "--run", str(tmp_path), "--shift", "2.5"])
    assert made == {"unet": {"shift": 2.5}, "edges": {}}


@pytest.fixture
def steps_of_a_tenth(monkeypatch):
    """A clock by which every step of `fit` takes a tenth of a second, whatever else the machine does."""
    ticks = count()
    monkeypatch.setattr("sdlearn.training.loop.time", SimpleNamespace(perf_counter=lambda: next(ticks) / 10))


def quick(stage, name):
    """A stage on few scenes, without figures and sheets."""
    few = {"vae": {"batch_size": 1}, "clip": {"batch_size": 4}, "word": {"batch_size": 2}, "lora": {"batch_size": 2}}

    def make(config, run, **options):
        recipe = stage.make(config, run, **few.get(name, {"batch_size": 2, "first": 20, "capacity": 20}), **options)
        recipe.warmup, recipe.report = 1, lambda *_: {}
        return recipe

    return replace(stage, make=make)


def test_all_is_cut_and_goes_on(tmp_path, monkeypatch, capsys, steps_of_a_tenth):
    """In the U-Net's hard scenes: what is finished stays as it is, the U-Net goes on, what is missing gets made."""
    monkeypatch.setitem(PRESETS, "tiny", scene_config())
    monkeypatch.setattr(stages, "STAGES", {name: quick(stage, name) for name, stage in stages.STAGES.items()})
    stages.train_tokenizer(PRESETS["tiny"], tmp_path, captions=500)
    whole, trained, cuts = 0.1, [], [2]                         # minutes; calls of `fit`; steps on hard scenes

    def cut(recipe, folder, **options):
        hard = 0
        trained.append((recipe.name, world_name(recipe.world) if hasattr(recipe, "world") else None, options["anneal"]))
        for progress, parts in fit(recipe, folder, save_seconds=0.0 if cuts else 45.0, **options):
            yield progress, parts
            hard += recipe.name == "unet" and recipe.world == WORLDS["hard"]
            if cuts and hard == cuts[0]:
                raise KeyboardInterrupt

    def call(status=0):
        trained.clear()
        assert main(["train", "all", "--preset", "tiny", "--run", str(tmp_path), "--minutes", str(whole),
                     "--no-compile", "--precision", "no"]) == status
        return capsys.readouterr().out.splitlines()

    def done():
        states = {name: load_state(tmp_path / f"{name}-state.pt") for name in stages.STAGES}
        return {name: state["progress"] for name, state in states.items() if state}

    monkeypatch.setattr(command, "fit", cut)
    call(status=130)
    first = done()
    assert trained == [("vae", None, False), ("clip", "full", False), ("unet", "core", False),
                       ("unet", "hard", False)]
    assert list(first) == ["vae", "clip", "unet"] and first["unet"]["worlds"] == ["core", "hard"]
    assert first["vae"]["worlds"] == ["core", "full"]           # of two worlds at once
    factor = (tmp_path / "scaling_factor.txt").read_text()
    cuts.clear()
    told = call()
    second = done()
    on_top = [(name, "hard", False) for name in ("edges", "depth", "inpaint")]
    assert trained == [("unet", "hard", False), ("unet", "hard", True), *on_top, ("word", None, False),
                       ("lora", None, False)]
    assert [line.split(":")[0] for line in told if ": stays as it is" in line] == ["vae", "clip"]
    assert second["vae"] == first["vae"] and second["clip"] == first["clip"] and list(second) == list(stages.STAGES)
    assert second["unet"]["step"] > first["unet"]["step"] and second["unet"]["worlds"] == ["core", "hard"]
    for name, stage in stages.STAGES.items():
        budget = 60 * whole * stage.usual_minutes / sum(each.usual_minutes for each in stages.STAGES.values())
        assert second[name]["seconds"] >= 0.99 * budget or name in ("vae", "clip")
        assert second[name]["step"] > 0 and (name in ("word", "lora") or second[name]["worlds"])
    told = call()
    assert trained == [] and done() == second and (tmp_path / "scaling_factor.txt").read_text() == factor
    assert sum(": skipped, has been trained for" in line for line in told) == 6


def test_a_phase_that_was_cut_is_gone_on_with(tmp_path, steps_of_a_tenth):
    """The rate falls from where it was, and the phase ends where it would have ended."""
    moves = []
    for stop in (1.45, 9.0):
        recipe = Uphill()
        loop = fit(recipe, tmp_path, span=(0.0, 3.0), anneal=True, precision="no", compiled=False, save_seconds=0.0)
        for progress, _ in loop:
            if progress.seconds > stop:
                break
        loop.close()
        moves.append(torch.tensor(recipe.moves).diff())
    assert moves[0][0] > 0.09 and 0.4 * moves[0][0] < moves[1][0] < 0.6 * moves[0][0] and moves[1][-1] < 0.02
    assert load_state(tmp_path / "uphill-state.pt")["progress"]["seconds"] == pytest.approx(3.0)
    for wrong in ({}, {"minutes": 1, "span": (0, 1)}):
        with pytest.raises(TypeError, match="either minutes or a span"):
            next(fit(Uphill(), tmp_path, **wrong))


def test_phases_are_the_whole_of_a_stage():
    for stage in stages.STAGES.values():
        assert sum(phase.share for phase in stage.phases) == pytest.approx(1)
        assert {phase.world for phase in stage.phases} <= {None, *WORLDS}
    core, hard, last = stages.STAGES["unet"].spans(100.0)
    assert core[1:] == (0, 50) and hard[1:] == (50, 94) and last[1:] == (94, 100) and last[0].anneal


ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}     # each process with a core of its own
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_the_command_trains_in_two_processes(tmp_path):
    """From an empty run on: what both need is made once, and both end."""
    done = subprocess.run([*TWO, "-m", "--", "sdlearn", "train", "vae", "--preset", "tiny", "--minutes", "0.05",
                           "--run", str(tmp_path)], capture_output=True, text=True, timeout=300, env=os.environ | ALONE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"psnr":') == 1, "one of the two reports"
    assert json.loads(done.stdout.splitlines()[-1])["samples"] > 0


def test_two_processes_stay_one_model(tmp_path):
    """Different batches, and clocks that go apart: the weights of both stay the same, bit for bit."""
    code = """
import sys, time
from pathlib import Path
import torch
from accelerate import PartialState
from torch import nn
from sdlearn.commands.train import leave_processes
from sdlearn.training.loop import fit
from sdlearn.training.stages import read_trained_seconds

state = PartialState(cpu=True)

class Toy:
    name, batch_size, learning_rate, warmup, decay_share = "toy", 4, 1e-2, 5, 0.9
    model = nn.Linear(3, 2)
    drawn = []
    def batch(self, generator):
        self.drawn.append(torch.randn(4, 3, generator=generator))
        return self.drawn[-1],
    def loss(self, model, x):
        time.sleep(0.02 * (1 + state.process_index))
        return model(x).square().mean(), {}
    def report(self, averaged, folder, step):
        return {}

torch.manual_seed(state.process_index)
toy = Toy()
steps = sum(1 for _ in fit(toy, Path(sys.argv[1]), minutes=0.03, precision="no"))
def of_both(x):
    both = [torch.empty_like(x) for _ in range(2)]
    torch.distributed.all_gather(both, x.contiguous())
    return both
assert len(toy.drawn) == steps > 10
assert not torch.equal(*of_both(toy.drawn[0])), "both saw the same batch"
done = read_trained_seconds(Path(sys.argv[1]), "toy")            # as long as one of them has trained, in both
assert done >= 1 and torch.equal(*of_both(torch.tensor(done)))
more = sum(1 for _ in fit(toy, Path(sys.argv[1]), span=(0, done + 0.5), precision="no"))
assert more > 3 and torch.equal(*of_both(torch.tensor(more))), "one of them stopped earlier"
for parameter in toy.model.parameters():
    assert torch.equal(*of_both(parameter.data)), "the weights have gone apart"
leave_processes()
"""
    done = subprocess.run([*TWO, "--no-python", "--", sys.executable, "-c", code, str(tmp_path)], capture_output=True,
                          text=True, timeout=300, env=os.environ | ALONE)
    assert done.returncode == 0, done.stderr


def test_a_wrong_caption_of_its_own_is_one_more_wrong_answer():
    torch.manual_seed(0)
    images, texts, wrong = (torch.nn.functional.normalize(torch.rand(5, 8), dim=-1) for _ in range(3))
    scale = torch.tensor(2.0)
    plain = contrastive_loss(images, texts, scale)
    assert hard_negative_loss(images, torch.cat([texts, -100 * wrong]), scale) == pytest.approx(float(plain), rel=1e-5)
    assert hard_negative_loss(images, torch.cat([texts, wrong]), scale) > plain
    # the same texts again: of each image's answers two are right, so half of the probability is gone
    twice = hard_negative_loss(images, texts.repeat(2, 1), scale)
    assert float(twice - plain) == pytest.approx(math.log(2) / 2, rel=1e-4)


def test_encoders_that_know_and_that_guess_are_told_apart(config, run):
    class Knows:                                                # the truth of a scene as its vector
        logit_scale = torch.zeros(1)

        def encode_image(self, pixels):
            return torch.ones(len(pixels), 1)

        def encode_text(self, ids):
            return torch.cat([torch.ones(len(ids) // 2, 1), torch.zeros(len(ids) // 2, 1)])

    tokenizer = stages.train_tokenizer(config, run)
    assert hard_negative_accuracy(Knows(), tokenizer, count=20) == 1.0
    assert 0.2 < hard_negative_accuracy(CLIP(config.text, config.vision), tokenizer, count=60) < 0.8


def test_a_pooled_vector_is_asked_what_its_caption_says(config, run):
    tokenizer = stages.train_tokenizer(config, run)
    world = World(single=0.0, count=0.0, pair=1.0, triple=0.0)
    recipe = CLIPRecipe(config, tokenizer, batch_size=8, world=world)
    batch = recipe.batch(torch.Generator().manual_seed(0))
    assert batch[2].shape == (8, len(CAPTION_LABELS))
    _, parts = recipe.loss(recipe.model, *batch)
    guess = sum(math.log(len(labels)) for labels in CAPTION_LABELS)            # an untrained layer: uniform
    assert float(parts["reading"]) == pytest.approx(guess, rel=1e-4)
    untaught = relation_accuracy(recipe.model, tokenizer, count=60, world=world)
    optimiser = torch.optim.Adam(recipe.model.parameters(), lr=3e-3)
    for step in range(60):
        loss, parts = recipe.loss(recipe.model, *recipe.batch(torch.Generator().manual_seed(step)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(parts["reading"]) < 0.8 * guess
    assert untaught == 0.0 and relation_accuracy(recipe.model, tokenizer, count=60, world=world) > 0.1


def test_what_training_alone_needs_is_not_shipped_and_not_asked_for(config):
    encoders, plain = CLIPWithClassifier(config), CLIP(config.text, config.vision)
    torch.nn.init.normal_(encoders.auxiliary_head.answer.weight)
    before = encoders.auxiliary_head.answer.weight.clone()
    load_weights(encoders, plain.state_dict())                    # a run that starts from shipped weights
    assert torch.equal(encoders.auxiliary_head.answer.weight, before)
    assert torch.equal(encoders.text_projection.weight, plain.text_projection.weight)
    fresh = CLIP(config.text, config.vision)
    load_weights(fresh, encoders.state_dict())                    # shipping
    assert torch.equal(fresh.text_projection.weight, plain.text_projection.weight)
    weights = {name: value for name, value in encoders.state_dict().items() if name != "logit_scale"}
    with pytest.raises(RuntimeError, match="logit_scale"):
        load_weights(fresh, weights)
    with pytest.raises(RuntimeError, match="another"):
        load_weights(fresh, encoders.state_dict() | {"another": torch.zeros(1)})


def test_clip_learns_pairs(config, run, tmp_path):
    recipe = CLIPRecipe(config, stages.train_tokenizer(config, run), batch_size=8)
    batch = recipe.batch(torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(recipe.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss, _ = recipe.loss(recipe.model, *batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_unet_is_asked_what_the_schedule_says(config, run):
    """A network that knows the answer has no loss; so noise, target and timestep belong together."""
    recipe: UNetRecipe = stages.make_unet(config, run, batch_size=16)
    latents, contexts, t, noise = recipe.batch(torch.Generator().manual_seed(0))

    def knows(x, t, context):
        assert torch.equal(x, recipe.schedule.add_noise(latents, noise, t)) and torch.equal(context, contexts)
        return recipe.schedule.target(latents, noise, t)

    loss, _ = recipe.loss(knows, latents, contexts, t, noise)
    assert loss == 0


@pytest.mark.parametrize("together, alone, wanted", [(0.3, 0.5, 2), (5.0, 0.5, 1)], ids=["free", "busy"])
def test_the_number_of_threads_follows_what_is_faster(together, alone, wanted):
    """Steps of two threads take `together` seconds, those of one `alone`; then the machine changes its mind."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threads, clock, used = Threads(seconds=60.0), 0.0, []
        for seconds in ({2: together, 1: alone}, {2: alone, 1: together}):
            used.clear()
            end = clock + 3600
            while clock < end:
                taken = seconds[threads.now]
                used.append(threads.now)
                clock += taken
                threads.record(clock, taken)
            assert torch.get_num_threads() == threads.now
            assert used.count(wanted) > 0.85 * len(used)
            wanted = 3 - wanted
    finally:
        torch.set_num_threads(before)
