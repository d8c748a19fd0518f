"""Ablations at small size: variants differ in one thing, are kept one by one, and their results are data."""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import ZERO_SNR, one_thread, tiny_parts  # noqa: F401
from PIL import Image

from sdlearn import ablations
from sdlearn.__main__ import main
from sdlearn.ablations import (
    ABLATIONS,
    RESULTS,
    Measurement,
    Plan,
    Variant,
    buckets,
    check_model,
    concept,
    default_minutes,
    drawing,
    dropout,
    factor,
    load_ablation,
    load_or_fit_plan,
    measuring,
    pixels,
    run_ablation,
    sizes,
    steps,
    write_results,
    zero_conv,
)
from sdlearn.ablations.ablation import early_evaluation_steps, encode_lesson_scenes, evaluation_steps
from sdlearn.ablations.drawing import draw, lesson, scaled
from sdlearn.ablations.measuring import judge_shares as real_shares
from sdlearn.ablations.measuring import make_prompts as real_prompts
from sdlearn.ablations.running import RECORD, SHEET_BYTES, encode_png, fit_plan, scale_plan
from sdlearn.checkpoint import CheckpointError, save_folder
from sdlearn.commands import ablate
from sdlearn.config import PRESETS, VAEConfig
from sdlearn.data import CORE, FULL, compose_scene, draw_scene
from sdlearn.data.world import CLASSROOM
from sdlearn.finetune.loop import Diverged
from sdlearn.images import to_tensor
from sdlearn.pipeline import StableDiffusion
from sdlearn.training.unet import make_training_batch
from sdlearn.vae import VAE

SMALL = {
    "dropout": Plan(steps=2, batch=4, scenes=12, unseen=4, prompts=4, sampling_steps=1),
    "factor": Plan(steps=2, batch=1, unseen=2, prompts=1),
    "pixels": Plan(steps=4, batch=1, scenes=6, unseen=2, prompts=1, guidance=3.0, sampling_steps=1),
    "zero-conv": Plan(steps=3, batch=4, scenes=6, unseen=4, prompts=2, guidance=3.0, sampling_steps=2),
    "steps": Plan(steps=5, prompts=3, guidance=2.0),
    "sizes": Plan(steps=2, batch=2, scenes=6, unseen=2, prompts=1, guidance=3.0, sampling_steps=1),
    "buckets": Plan(steps=3, batch=4, scenes=12, unseen=2, prompts=1, guidance=3.0, sampling_steps=1),
    "concept": Plan(steps=3, batch=2, unseen=2, prompts=1, guidance=3.0, sampling_steps=1),
}


class Prompt:
    def __init__(self, text):
        self.text = text


def make_prompts(world, count):
    return [Prompt(f"a {name} on a red background") for name in (world.objects * count)[:count]]


def judge_shares(images, asked, device):
    assert len(images) == len(asked) and all(one.dtype == np.uint8 and one.shape[2] == 3 for one in images)
    assert all(side % 4 == 0 and 96 <= side <= 256 for one in images for side in one.shape[:2])
    return {"right": float(np.mean([one.mean() for one in images])) / 255}


@pytest.fixture(scope="module")
def config():
    """`tiny`, at the size of a scene and with factor 8."""
    tiny = replace(PRESETS["tiny"], noise=ZERO_SNR, image_size=128)
    return replace(tiny, vae=VAEConfig(channels=(4, 4, 8, 8), layers_per_block=1, groups=2, scaling_factor=1.0),
                   vision=replace(tiny.vision, image_size=128, patch_size=32))


@pytest.fixture(autouse=True)
def fast_judge(monkeypatch):
    """Brightness in place of the judge, and few prompts."""
    monkeypatch.setattr(measuring, "judge_shares", judge_shares)
    monkeypatch.setattr(measuring, "make_prompts", make_prompts)
    monkeypatch.setattr(drawing, "compose_prompt_scene", lambda prompt: compose_scene(["apple"]))


@pytest.fixture(scope="module")
def base(config):
    return StableDiffusion(tiny_parts(config=config))


def played(variants):
    """Figures of every variant, by its name and the step, without what the clock says."""
    return {one.name: {r.step: {k: v for k, v in r.figures.items() if k != "seconds"} for r in one.run()}
            for one in variants}


# --- what all have in common ------------------------------------------------------------------------

def test_the_table_has_what_was_promised():
    assert list(ABLATIONS) == ["dropout", "factor", "pixels", "zero-conv", "steps", "sizes", "buckets", "concept"]
    assert 50 <= sum(default_minutes(one, torch.device("cpu")) for one in ABLATIONS.values()) <= 81
    assert sum(default_minutes(one, torch.device("cuda")) for one in ABLATIONS.values()) <= 13.5
    assert {name: one.network for name, one in ABLATIONS.items()} == {
        "dropout": "small", "factor": "small", "pixels": "small", "zero-conv": "full", "steps": "full",
        "sizes": "small", "buckets": "full", "concept": "full"}


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_every_ablation_runs_and_its_result_is_data(base, tmp_path, name):
    """From readings to files: every variant takes its steps, ends with figures and images, and a second call
    of `readings` gives the same figures."""
    ablation, plan = ABLATIONS[name], SMALL[name]
    state = torch.get_rng_state()
    seen = {}
    for variant, reading in run_ablation(ablation, base, plan, tmp_path):
        seen.setdefault(variant.name, []).append(reading)
    assert torch.equal(torch.get_rng_state(), state), "the global random numbers are left alone"
    variants = ablation.variants(base, plan)
    assert list(seen) == [one.name for one in variants] and len(variants) >= 2
    for variant in variants:
        readings = seen[variant.name]
        at = [one.step for one in readings]
        assert at == sorted(set(at)) and len([step for step in at if step]) == variant.steps
        assert readings[-1].figures and len(readings[-1].images) == len(readings[-1].captions) > 0
        assert all(math.isfinite(value) for one in readings for value in one.figures.values())
    first = variants[-1]
    kept = {r.step: {k: v for k, v in r.figures.items() if k != "seconds"} for r in seen[first.name]}
    assert played([first])[first.name] == kept

    file = write_results(ablation, base, plan, tmp_path, tmp_path / "out")
    told = load_ablation(name, tmp_path / "out")
    assert told["status"] == "small" and told["scale"] and told["date"] and told["machine"] and told["versions"]
    assert told["budget"] == {k: v for k, v in asdict(plan).items() if v is not None}
    assert {key: value["ended"] for key, value in told["variants"].items()} == dict.fromkeys(seen)
    for variant in variants:
        stored = told["variants"][variant.name]
        assert stored["changed"] == json.loads(json.dumps(dict(variant.changed)))
        want = {r.step: r.figures for r in seen[variant.name] if r.figures}
        assert [r["step"] for r in stored["measurements"]] == list(want)
        for reading in stored["measurements"]:
            assert {k: v for k, v in reading.items() if k != "step"} == pytest.approx(dict(want[reading["step"]]),
                                                                                      rel=1e-4)
    with Image.open(file.with_suffix(".png")) as sheet:
        assert sheet.width > 300
    assert file.with_suffix(".png").stat().st_size <= SHEET_BYTES


def test_marks():
    assert evaluation_steps(800) == {100, 200, 300, 400, 500, 600, 700, 800}
    assert evaluation_steps(3) == {1, 2, 3} and evaluation_steps(1) == {1}
    assert early_evaluation_steps(250) == {0, 1, 2, 5, 10, 20, 50, 100, 200, 250}
    assert early_evaluation_steps(1) == {0, 1}


def test_a_base_must_be_able_to_answer(base):
    with pytest.raises(ValueError, match="which objects it was taught"):
        check_model(StableDiffusion(replace(base.parts, world=None)))
    wide = replace(base.parts.config, unet=replace(base.parts.config.unet, in_channels=9))
    with pytest.raises(ValueError, match="inpainting model"):
        check_model(StableDiffusion(replace(base.parts, config=wide)))


def test_drawing_is_the_same_in_batches_and_tells_what_is_not_finite(base, monkeypatch):
    texts = [one.text for one in make_prompts(CORE, 3)]
    whole = draw(base, base.unet, texts, guidance=2.0, steps=2)
    monkeypatch.setattr(drawing, "AT_ONCE", 2)
    parts = draw(base, base.unet, texts, guidance=2.0, steps=2)
    assert whole.shape == (3, 128, 128, 3) and np.abs(whole.astype(int) - parts).max() <= 1
    with pytest.raises(Diverged, match="NaN or infinite in 2 steps of ddim"):
        draw(base, lambda x, t, c: x * math.nan, texts, guidance=2.0, steps=2, sampler="ddim")


# --- each of them -----------------------------------------------------------------------------------

def test_dropout_measures_the_empty_prompt(base):
    unseen = encode_lesson_scenes(base, 4, "test")
    empty = base.text_encoder(base.tokenizer("")).hidden.detach()

    def only_empty(x, t, context):
        """Knows the answer where the caption is the empty one, and says zero elsewhere."""
        if torch.equal(context, empty.expand_as(context)):
            return make_training_batch(unseen.latents, 700, base.schedule)[2]
        return torch.zeros_like(x)

    heard = dropout.heard(base, unseen, only_empty)
    assert heard["empty@700"] == 0 and heard["right@700"] == heard["wrong@700"] > 0.1


def test_dropout_alone_differs(base):
    """One step at a share of nearly 1 and at 0: other weights; two runs of one share: the same."""
    def weights(share):
        plan = replace(SMALL["dropout"], steps=2)
        found = []
        for _ in lesson(base.parts, encode_lesson_scenes(base, 12), plan, dropout=share, measure=lambda unet: {},
                        finish=lambda unet: found.append([p.clone() for p in unet.parameters()]) or Measurement(2)):
            pass
        return found[0]
    a, b, c = weights(0.0), weights(0.0), weights(0.99)
    assert all(map(torch.equal, a, b)) and not all(map(torch.equal, a, c))


def test_dropout_images_without_guidance_do_not_use_the_empty_prompt(base):
    reading = dropout.guided_images(base, SMALL["dropout"], 0.1, base.unet)
    assert list(reading.figures) == ["right, w = 1", "right, w = 3", "right, w = 7"]
    assert len(reading.images) == 3 * dropout.SHOWN and reading.captions[-1].startswith("dropout 0.1, w = 7: a ")


def test_factors_are_of_equal_parameters():
    mini = PRESETS["mini"]
    counts, told = {}, {}
    for number, channels in factor.CHANNELS.items():
        shape = replace(mini.vae, channels=channels)
        assert shape.factor == number
        with torch.device("meta"):
            counts[number] = sum(p.numel() for p in VAE(shape).parameters())
        told[number] = factor.facts(StableDiffusion(tiny_parts()), number)
    assert max(counts.values()) < 1.03 * min(counts.values())
    assert factor.CHANNELS[8] == mini.vae.channels, "f = 8 is the shipped autoencoder's shape"
    assert all(told[number]["parameters"] == counts[number] for number in counts)


def test_factors_keep_numbers_and_cost_what_follows(base):
    told = [factor.facts(base, number) for number in (4, 8, 16)]
    assert [one["numbers kept"] for one in told] == [4 * 32**2, 4 * 16**2, 4 * 8**2]
    flops = [one["GFLOPs of a U-Net step"] for one in told]
    assert flops[0] > 3 * flops[1] > 6 * flops[2] and told[0]["numbers in an image"] == 3 * 128**2


def test_a_round_trip_is_measured_as_it_is(base):
    class Darker:
        encode = staticmethod(lambda x: Darker(x))

        def __init__(self, x):
            self.x = x

        mode = property(lambda self: lambda: self.x)
        decode = staticmethod(lambda x: x - 0.02)

    unseen = to_tensor([np.full((128, 128, 3), 128, np.uint8)] * 2)
    figures, pairs = factor.round_trip(base, Darker, unseen)
    assert figures["psnr"] == pytest.approx(40, abs=1e-3) and 0.9 < figures["ssim"] < 1 and len(pairs) == 2


def test_pixels_get_the_arithmetic_of_latents(base):
    plan = replace(SMALL["pixels"], steps=1000)
    variants = {one.name: one for one in pixels.variants(base, plan)}
    total = {name: one.steps * one.changed["GFLOPs of a U-Net step"] for name, one in variants.items()}
    assert list(variants) == ["latents", "pixels 64x64", "pixels 32x32"] and variants["latents"].steps == 1000
    for name, one in variants.items():
        assert one.changed["steps"] == one.steps
        assert 0 <= total["latents"] - total[name] < one.changed["GFLOPs of a U-Net step"]
    assert variants["pixels 64x64"].steps < variants["pixels 32x32"].steps / 3


def test_pixels_are_shrunk_scenes_with_their_captions(base):
    material = pixels.scenes_at(base, 3, "train", 32)
    real = to_tensor([draw_scene(2, "train", CLASSROOM).image])
    assert material.latents.shape == (3, 3, 32, 32) and material.latents.abs().max() <= 1
    torch.testing.assert_close(material.latents[2:].mean(), real.mean(), atol=0.01, rtol=0)
    assert torch.equal(material.contexts, encode_lesson_scenes(base, 3).contexts)
    torch.testing.assert_close(scaled(scaled(torch.full((1, 3, 128, 128), 0.3), 64), 128).mean(), torch.tensor(0.3))


def test_zero_convolutions_start_on_the_line_of_the_base(base):
    zero, random = (zero_conv.fresh(base, zero=one) for one in (True, False))
    joints = ("controlnet_cond_embedding.conv_out", "controlnet_down_blocks", "controlnet_mid_block")
    for name, value in zero.state_dict().items():
        assert torch.equal(value, random.state_dict()[name]) != name.startswith(joints), name
    on, above = (zero_conv.losses(base, SMALL["zero-conv"], net) for net in (zero, random))
    assert on["with ControlNet"] == on["base"] == above["base"] and on["change of the output"] == 0
    assert above["change of the output"] > 0.1 and above["with ControlNet"] != above["base"]
    figures, images = zero_conv.images_of(base, SMALL["zero-conv"], zero)
    captions = [draw_scene(seed, "test", measuring.get_world(base)).caption for seed in range(2)]
    wanted = draw(base, base.unet, captions, guidance=3.0, steps=2)
    assert np.array_equal(np.stack(images), wanted) and set(figures) == {"edges F1"}


def test_both_kinds_of_convolutions_learn_from_the_same_batches(base, monkeypatch):
    seen = []
    from sdlearn.finetune import controlnet
    real = controlnet.draw_indices
    monkeypatch.setattr(controlnet, "draw_indices", lambda *given: seen.append(real(*given)) or seen[-1])
    played(zero_conv.variants(base, replace(SMALL["zero-conv"], steps=2)))
    assert torch.equal(torch.stack(seen[:2]), torch.stack(seen[2:]))


def test_the_base_is_left_as_it_was(base):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    flags = [p.requires_grad for p in base.unet.parameters()]
    for variant in zero_conv.variants(base, SMALL["zero-conv"]):
        next(iter(variant.run()))
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())
    assert [p.requires_grad for p in base.unet.parameters()] == flags


def test_more_steps_come_closer_to_the_converged_image(base):
    plan = replace(SMALL["steps"], steps=30, prompts=2)
    asked, wanted = steps.converged(base, plan)
    assert steps.distance(wanted, wanted) == 0
    assert steps.distance(np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)) == 2
    for sampler in ("ddim", "dpmpp_2m"):
        apart = {reading.step: reading.figures["distance"] for reading in steps.run_variant(base, plan, sampler)}
        assert list(apart) == [1, 2, 3, 5, 8, 12, 20, 30] and apart[30] < 0.5 * apart[3], sampler
    assert {one.name: one.changed["calls of the U-Net a step"] for one in steps.variants(base, plan)}["heun"] == 2


@pytest.mark.parametrize("seconds, most, prompts", [(1e-3, 50, 6), (0.01, 50, 5), (0.06, 30, 1), (1e3, 5, 1)])
def test_steps_fit_into_the_minutes(base, monkeypatch, seconds, most, prompts):
    """A clock of so many seconds for each pass: fewer prompts first, then fewer counts."""
    clock = iter(seconds * i for tick in range(10**4) for i in (tick, tick + 1))
    monkeypatch.setattr(steps.time, "perf_counter", lambda: next(clock))
    plan = steps.afford(base, ABLATIONS["steps"].plan, 1.5)
    assert plan.steps == most and abs(plan.prompts - prompts) <= 1
    calls = steps.CONVERGED[1] + sum(n * (2 if name == "heun" else 1) for n in steps.counts(plan)
                                     for name in steps.SAMPLERS)
    assert calls * seconds * plan.prompts <= 90 or plan == replace(plan, steps=5, prompts=1)


def test_buckets_are_batches_of_one_size():
    latents = [torch.arange(6.0)[:, None, None, None] * torch.ones(6, 4, side, side) for side in (4, 3, 2)]
    mixed = sizes.Buckets(latents)
    assert len(mixed) == 6 and mixed.device.type == "cpu"
    for first in range(6):
        rows = torch.tensor([first, 5, 0])
        batch = mixed[rows]
        assert batch.shape == (3, 4, (4, 3, 2)[first % 3], (4, 3, 2)[first % 3])
        assert batch[:, 0, 0, 0].tolist() == rows.tolist(), "the scenes are those that were asked for"


def test_sizes_are_whole_cells_and_two_are_new_to_all(base):
    told = {one.name: one.changed for one in sizes.variants(base, SMALL["sizes"])}
    assert told["one size"]["training sizes"] == [128] and told["buckets"]["training sizes"] == [128, 96, 64]
    key = "mean GFLOPs of a U-Net step"
    assert told["buckets"][key] < told["one size"][key]
    asked = [sizes.side_of(base, part) for part in sizes.ASKED]
    assert asked == [64, 96, 128, 160, 192]
    reading = sizes.drawn_at(base, SMALL["sizes"], base.unet)
    assert list(reading.figures) == [f"right, {side}" for side in asked]
    assert {one.shape for one in reading.images} == {(128, 128, 3)}, "brought to one size for judge and sheet"
    assert sizes.latents_at(base, 2, "train", 96).shape == (2, 4, 12, 12)


def test_a_scene_of_another_shape_is_whole_and_on_one_ground():
    one = draw_scene(3, "train", CORE)
    for size in ((256, 128), (128, 256)):
        image = buckets.laid_out(one, size)
        assert image.shape == (size[1], size[0], 3)
        long = image if size[0] > size[1] else image.transpose(1, 0, 2)
        square = one.image if size[0] > size[1] else one.image.transpose(1, 0, 2)
        [left] = [x for x in range(129) if np.array_equal(long[:, x:x + 128], square)][:1]
        rest = np.concatenate([long[:, :left], long[:, left + 128:]], axis=1)
        assert (rest == one.background_rgb).all(), "the ground goes on, and nothing else is there"
        assert np.array_equal(image, buckets.laid_out(one, size)), "a scene has its place"
    assert np.array_equal(buckets.laid_out(one, (128, 128)), one.image)
    small = buckets.laid_out(one, (192, 96))
    assert small.shape == (96, 192, 3) and abs(small.mean() - one.image.mean()) < 40
    spots = {buckets.laid_out(draw_scene(seed, "train", CORE), (256, 128)).argmin() for seed in range(6)}
    assert len(spots) > 3, "not all in one place"


def test_a_bucket_holds_as_many_images_as_cost_the_same(base):
    told = {one.name: one.changed for one in buckets.variants(base, replace(SMALL["buckets"], batch=16))}
    assert told["native size only"] == {"training shapes": ["128x128"], "images in a batch": [16]}
    shapes = ["128x128", "192x96", "96x192", "256x128", "128x256", "192x192"]
    assert told["buckets"] == {"training shapes": shapes, "images in a batch": [16, 14, 14, 8, 8, 7]}
    assert buckets.size_of(base, buckets.NEW) == (256, 256) and "256x256" not in shapes


def test_a_batch_of_the_fine_tune_has_one_shape(base):
    plan, seen = SMALL["buckets"], []

    def unet(x, t, context):
        seen.append(tuple(x.shape))
        assert len(t) == len(context) == len(x)
        return x
    sizes_ = [buckets.size_of(base, shape) for shape in buckets.BUCKETS]
    loss, generator = buckets.loss_of(base, plan, unet, sizes_), torch.Generator().manual_seed(0)
    assert all(loss(generator) > 0 for _ in range(40))
    assert {one[2:] for one in seen} == {(height // 8, width // 8) for width, height in sizes_}
    assert all(one[0] * one[2] * one[3] <= 1.5 * 4 * 256 for one in seen)


def test_an_image_is_right_at_either_of_two_sizes(base, monkeypatch):
    """A judge that knows only what has the native area, or only what is larger."""
    def half(images, asked, device):
        [one] = images
        native = one.shape[0] * one.shape[1] < 1.3 * 128**2
        return {"right": float(native), "more than asked": float(not native)}
    monkeypatch.setattr(measuring, "judge_shares", half)
    asked = make_prompts(CORE, 2)
    for height, width, expected in ((256, 128, 1.0), (256, 256, 1.0), (128, 128, 0.0)):
        found = buckets.judged(base, np.zeros((2, height, width, 3), np.uint8), asked)
        assert found == {"right": 1.0, "more than asked": expected}


def test_the_bucket_fine_tunes_start_alike_and_leave_the_base(base):
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    told = played(buckets.variants(base, SMALL["buckets"]))
    alone, mixed = told["native size only"], told["buckets"]
    assert alone[0] == mixed[0] and alone[3] != mixed[3]
    assert {"loss, 256x256", "right, 128x256", "right, 256x256"} <= set(alone[3]) & set(alone[0])
    assert all(torch.equal(value, before[name]) for name, value in base.unet.state_dict().items())


def test_each_way_learns_what_it_says_and_the_base_keeps_its_bits(base):
    plan = SMALL["concept"]
    before = [{name: value.clone() for name, value in part.state_dict().items()}
              for part in (base.unet, base.text_encoder)]
    pixels = to_tensor([one.image for one in concept.make_scenes("alien", 2, 0)])
    known = concept.loss_scenes(base, plan.unseen)
    assert [len(drawn) for drawn, _ in known.values()] == [6, 2, 2, 4]
    learns = {}
    for name, way in concept.WAYS.items():
        made = way(base, plan, pixels)
        first = concept.losses(base, made, plan)
        list(made.run)
        with made.beside(made.model.unet):
            last = concept.losses(base, made, plan)
        moved = {what for what in first if last[what] != first[what]}
        assert moved >= {"images that taught", "unseen images"}, name
        assert ("other scenes" in moved) == (name != "textual inversion")       # a word changes nothing without it
        learns[name] = made.learns
    assert learns["textual inversion"] < learns["LoRA"] < learns["DreamBooth"] == learns["DreamBooth, prior kept"]
    for part, had in zip((base.unet, base.text_encoder), before, strict=True):
        assert all(torch.equal(value, had[name]) for name, value in part.state_dict().items())
    assert "<alien>" not in base.tokenizer.added


# --- running ----------------------------------------------------------------------------------------

def made_up(names=("one", "two"), steps=3, broken=(), log=None):
    """An ablation that takes no time, with variants that break at their second step."""
    def readings(name, plan):
        if log is not None:
            log.append(name)
        for step in range(1, plan.steps + 1):
            if step == 2 and name in broken:
                raise Diverged("the loss became nan at step 2: train with a lower learning rate")
            figures = {"loss": 1 / step, "odd": math.nan if step == 1 else 1.0}
            yield Measurement(step, figures, [np.zeros((16, 16, 3), np.uint8)], [name])

    def variants(base, plan):
        return [Variant(name, {"name": name}, plan.steps, lambda name=name: readings(name, plan)) for name in names]
    return ablations.Ablation("made-up", "nothing", "the name", Plan(steps=steps), 1.0, variants, "full")


def test_a_variant_that_is_done_is_not_run_again(base, tmp_path):
    log = []
    ablation = made_up(log=log)
    for variant, reading in run_ablation(ablation, base, ablation.plan, tmp_path):
        if variant.name == "two" and reading.step == 2:
            break                               # stopped in the middle of the second
    assert log == ["one", "two"] and not (tmp_path / "made-up" / "two").exists()
    with pytest.raises(CheckpointError, match="'two' of the ablation 'made-up' has not been run"):
        write_results(ablation, base, ablation.plan, tmp_path, tmp_path / "out")
    again = [(variant.name, reading.step) for variant, reading in run_ablation(ablation, base, ablation.plan, tmp_path)]
    assert again == [("two", 1), ("two", 2), ("two", 3)] and log == ["one", "two", "two"]
    assert list(run_ablation(ablation, base, ablation.plan, tmp_path)) == []
    file = write_results(ablation, base, ablation.plan, tmp_path, tmp_path / "out")
    assert json.loads(file.read_text())["status"] == "full"
    list(run_ablation(ablation, base, replace(ablation.plan, steps=2), tmp_path))
    assert log[3:] == ["one", "two"], "another plan is another run"


def test_another_model_is_another_run(base, tmp_path):
    ablation = made_up()
    list(run_ablation(ablation, base, ablation.plan, tmp_path))
    other = tiny_parts(config=base.parts.config)
    with torch.no_grad():
        other.unet.conv_in.bias[0] += 1
    assert len(list(run_ablation(ablation, StableDiffusion(other), ablation.plan, tmp_path))) == 6


def test_a_variant_that_diverges_is_told_and_the_others_go_on(base, tmp_path):
    ablation = made_up(broken=("one",))
    seen = [(variant.name, reading.step) for variant, reading in run_ablation(ablation, base, ablation.plan, tmp_path)]
    assert seen == [("one", 1), ("two", 1), ("two", 2), ("two", 3)]
    file = write_results(ablation, base, ablation.plan, tmp_path, tmp_path / "out")

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")
    told = json.loads(file.read_text(), parse_constant=no_constant)["variants"]
    assert "became nan at step 2" in told["one"]["ended"] and told["two"]["ended"] is None
    assert told["one"]["measurements"] == [{"step": 1, "loss": 1.0, "odd": None}]
    assert list(run_ablation(ablation, base, ablation.plan, tmp_path)) == [], "it ended, and is not tried for ever"


def test_a_real_divergence_is_caught(base, tmp_path, monkeypatch):
    """A weight of the base that is infinite: losses on it are not numbers."""
    monkeypatch.setattr(zero_conv, "LEARNING_RATE", 1e30)
    list(run_ablation(ABLATIONS["zero-conv"], base, replace(SMALL["zero-conv"], steps=4), tmp_path))
    records = [json.loads((folder / RECORD).read_text()) for folder in (tmp_path / "zero-conv").iterdir()]
    assert len(records) == 2 and all(one["ended"] for one in records)
    assert all(one["measurements"][0]["step"] == 0 for one in records)


def test_the_plan_is_settled_once(base, tmp_path, monkeypatch):
    ablation = made_up(steps=100)
    ends = iter([40, 7, 9, 5])
    from sdlearn.ablations import running
    monkeypatch.setattr(running, "fit_plan", lambda *_: Plan(steps=next(ends)))
    assert [load_or_fit_plan(ablation, base, tmp_path).steps for _ in range(2)] == [40, 40]
    assert [load_or_fit_plan(ablation, base, tmp_path, 3.0).steps for _ in range(2)] == [7, 7]


def test_a_plan_is_cut_to_the_minutes(base, monkeypatch):
    from sdlearn.ablations import running
    monkeypatch.setattr(running, "time_step", lambda variant: 0.1)
    ablation = replace(made_up(steps=1000), plan=Plan(steps=1000, scenes=1000, prompts=30), minutes=10)
    plan = fit_plan(ablation, base, 2.0)                  # two variants of 1000 steps would take 200 seconds
    assert plan == Plan(steps=420, scenes=200, prompts=6)
    assert fit_plan(ablation, base, 10.0) == ablation.plan, "never more than the plan"
    assert scale_plan(ablation.plan, 1e-6) == Plan(steps=1000, scenes=64, prompts=4)


def test_a_trial_times_real_steps(base):
    from sdlearn.ablations.running import time_step
    variant = dropout.variants(base, replace(SMALL["dropout"], steps=100))[0]
    assert 0 < time_step(variant) < 60
    assert time_step(made_up().variants(base, Plan(steps=2))[0]) == 0, "every step is measured there"


def test_a_sheet_keeps_its_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
    assert len(encode_png(Image.fromarray(noise))) <= SHEET_BYTES
    flat = encode_png(Image.fromarray(np.full((64, 64, 3), 7, np.uint8)))
    assert flat.startswith(b"\x89PNG") and len(flat) < 1000


def test_results_with_the_key_of_earlier_versions_are_read(tmp_path):
    result = load_ablation("steps")
    for variant in result["variants"].values():
        variant["readings"] = variant.pop("measurements")
    (tmp_path / "steps.json").write_text(json.dumps(result))
    assert load_ablation("steps", tmp_path) == load_ablation("steps")


def test_a_missing_result_raises(tmp_path):
    with pytest.raises(CheckpointError, match="no result of an ablation 'nothing'.*run `ablate nothing`"):
        load_ablation("nothing", tmp_path)


# --- the command ------------------------------------------------------------------------------------

def test_the_command_runs_resumes_and_writes(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "judge_shares", real_shares)
    monkeypatch.setattr(measuring, "make_prompts", real_prompts)
    folder = save_folder(tmp_path / "model", base.parts)
    zero = replace(ABLATIONS["zero-conv"], plan=SMALL["zero-conv"])
    teaching = replace(ABLATIONS["dropout"], plan=replace(SMALL["dropout"], steps=2, prompts=1))
    for name in list(ABLATIONS):
        monkeypatch.delitem(ABLATIONS, name)
    for one in (zero, teaching):
        monkeypatch.setitem(ABLATIONS, one.name, one)
    args = ["ablate", "all", "--model", str(folder), "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"),
            "--device", "cpu"]
    assert main(args) == 0
    out = capsys.readouterr().out
    told = load_ablation("dropout", tmp_path / "out")
    last = told["variants"]["dropout 0.1"]["measurements"][-1]
    assert {"right, w = 3", "background, w = 7", "more than asked, w = 1"} <= set(last), "of the real judge"
    assert str(tmp_path / "out" / "zero-conv.json") in out and told["model"]["name"] == "model", "a folder's name"
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob(RECORD)}
    assert main(args) == 0 and len(before) == 4
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob(RECORD)} == before


@pytest.mark.parametrize("device, scale", [("cpu", 1), ("cuda", 1 / 6)])
def test_minutes_are_shared_out_among_all_ablations(base, tmp_path, monkeypatch, device, scale):
    """In proportion to what each takes by itself; one alone has all of them, and without a number its own."""
    given = {}
    monkeypatch.setattr(ablate, "load_or_fit_plan",
                        lambda one, base, folder, minutes: given.update({one.name: minutes}))
    monkeypatch.setattr(ablate, "run_ablation", lambda *_: iter(()))
    monkeypatch.setattr(ablate, "write_results", lambda *_: "")
    monkeypatch.setattr(ablate, "check_model", lambda model: None)
    model = SimpleNamespace(parts=base.parts, device=torch.device(device))
    monkeypatch.setattr(ablate.StableDiffusion, "load", lambda *_, **__: model)
    args = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    assert main(["ablate", "all", "--minutes", "10", *args]) == 0
    assert set(given) == set(ABLATIONS) and sum(given.values()) == pytest.approx(10)
    own = sum(one.minutes for one in ABLATIONS.values())
    assert given == pytest.approx({name: 10 * one.minutes / own for name, one in ABLATIONS.items()})
    assert sum(default_minutes(one, model.device) for one in ABLATIONS.values()) == pytest.approx(scale * own)
    given.clear()
    assert main(["ablate", "steps", "--minutes", "10", *args]) == 0 and given == {"steps": pytest.approx(10)}
    assert main(["ablate", "all", *args]) == 0 and set(given.values()) == {None}


@pytest.mark.parametrize("args, told", [
    (["nothing"], "invalid choice: 'nothing'"), (["steps", "--minutes", "0"], "'0' is not a number above zero"),
    ([], "required: NAME"),
])
def test_what_cannot_be_run_is_told(args, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["ablate", *args])
    assert stopped.value.code == 2 and told in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main(["ablate", "steps", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "is no folder that may be written to" in capsys.readouterr().err


def test_prompts_are_those_that_a_world_answers():
    assert [one.task for one in real_prompts(CLASSROOM, 2)] == ["one object"] * 2 + ["colours"] * 2
    assert {one.task for one in real_prompts(FULL, 1)} == {"one object", "colours", "counting", "two objects",
                                                           "position", "colour binding"}


# --- what is shipped --------------------------------------------------------------------------------

@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_results_are_whole(file):
    told = load_ablation(file.stem)
    assert told["status"] in ("full", "small") and all(told[key] for key in ("scale", "question", "machine", "date"))
    ablation = ABLATIONS[file.stem]
    assert told["ablation"] == ablation.name and len(told["variants"]) >= 2
    for variant in told["variants"].values():
        assert variant["ended"] is not None or variant["measurements"][-1]["step"] > 0
        assert all(isinstance(value, (int, float)) or value is None
                   for reading in variant["measurements"] for value in reading.values())
    assert file.with_suffix(".png").stat().st_size <= SHEET_BYTES


def shipped(name):
    return pytest.mark.skipif(not (RESULTS / f"{name}.json").exists(), reason="this ablation has not been run")


@shipped("zero-conv")
def test_the_shipped_zero_convolutions_start_on_the_line_of_their_base():
    zero, random = load_ablation("zero-conv")["variants"].values()
    first, other = zero["measurements"][0], random["measurements"][0]
    assert first["with ControlNet"] == first["base"] and first["change of the output"] == 0
    assert other["with ControlNet"] > 1.02 * other["base"] and other["change of the output"] > 0.05


@shipped("steps")
def test_in_the_shipped_steps_more_of_them_come_closer():
    for name, variant in load_ablation("steps")["variants"].items():
        apart = [reading["distance"] for reading in variant["measurements"]]
        if name not in steps.FRESH_NOISE:
            assert apart[-1] < 0.5 * apart[1], name


@shipped("buckets")
def test_the_shipped_fine_tunes_start_alike_and_buckets_help_at_long_ones():
    told = load_ablation("buckets")["variants"]
    alone, mixed = (run["measurements"] for run in told.values())
    assert alone[0] == mixed[0] and alone[-1]["step"] == mixed[-1]["step"]
    long = [f"loss, {shape}" for shape in told["buckets"]["changed"]["training shapes"]
            if len({*shape.split("x")}) == 2]
    assert len(long) == 4 and sum(mixed[-1][name] for name in long) < sum(alone[-1][name] for name in long)
