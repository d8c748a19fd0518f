"""ControlNets and inpainting at small size: hints and masks are the scenes' own, the loss falls, runs go on, and
what is shipped as a difference to the base comes back."""

import argparse
import json
import random
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from models import one_thread  # noqa: F401
from recipes import scene_config, untrained_base
from safetensors.torch import load_file, save_file

from sdlearn.checkpoint import CheckpointError, Parts, TensorMismatch, load_folder, save_folder
from sdlearn.checkpoint import shipped as shipped_room
from sdlearn.checkpoint.difference import compute_difference, fingerprint_file, relative_error
from sdlearn.checkpoint.shipped import (
    DIFFERENCE_FILE,
    find_base_file,
    list_shipped_controlnets,
    list_shipped_models,
    load_shipped,
    load_shipped_controlnet,
    load_shipped_inpaint,
    read_base_tensors,
    remove_incompatible,
    save_shipped_controlnet,
    save_shipped_inpaint,
)
from sdlearn.clip import CLIP
from sdlearn.commands import train as command
from sdlearn.config import PRESETS
from sdlearn.controlnet import ControlNet
from sdlearn.data import CORE, draw_scene
from sdlearn.images import to_images, to_tensor
from sdlearn.inpaint import latent_mask, masked_pixels
from sdlearn.pipeline import StableDiffusion
from sdlearn.training import adapters, card, control, from_scratch, inpaint, stages
from sdlearn.training.control import HINTS, ControlRecipe, edge_f1, foreground_iou, hint_tensor, hint_widths
from sdlearn.training.inpaint import MASKS, MaskCache, first_object_mask, random_mask, widen_unet
from sdlearn.training.loop import fit, load_state, save_state
from sdlearn.training.unet import LatentCache
from sdlearn.unet import UNet

SMALL = {"edges": {}, "depth": {}, "inpaint": {"first_masks": 20}}      # options of the stages, beside the common ones

NO_NEW = {"edges": {}, "depth": {}, "inpaint": {"masks": 0}}           # nothing that changes from batch to batch


@pytest.fixture(scope="module")
def config():
    return scene_config()


@pytest.fixture(scope="module")
def base(config, tmp_path_factory):
    folder = untrained_base(config, tmp_path_factory.mktemp("base"))
    stages.make_unet(config, folder, first=50, capacity=50)
    return folder


@pytest.fixture
def run(base, tmp_path):
    return shutil.copytree(base, tmp_path / "run")


def make(stage, config, run, **options):
    return stages.STAGES[stage].make(config, run, **{"batch_size": 8, "first": 50, "capacity": 50, **SMALL[stage],
                                                     **options})


def quiet(recipe):
    recipe.report = lambda *_: {}
    return recipe


def steps(recipe, folder, count):
    """`count` more steps of training, then a clean end."""
    loop = fit(quiet(recipe), folder, minutes=10, precision="no", compiled=False)
    for _ in range(count):
        progress, _ = next(loop)
    save_state(folder / f"{recipe.name}-state.pt",
               {"model": recipe.model.state_dict(), "average": recipe.model.state_dict(), "progress": vars(progress)})
    return progress


def trained(stage, config, run, count=3, **options):
    recipe = make(stage, config, run, learning_rate=3e-3, **options)
    recipe.warmup = 1
    steps(recipe, run, count)
    return recipe


def losses(recipe, count, rate=3e-3):
    """The loss of one batch while it is learned by heart."""
    batch = recipe.batch(torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(recipe.model.parameters(), lr=rate)
    found = []
    for _ in range(count):
        loss, _ = recipe.loss(recipe.model, *batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(float(loss.detach()))
    return found


# --- the recipes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", SMALL)
def test_the_loss_falls_and_starts_at_the_bases(config, run, stage):
    recipe = make(stage, config, run, batch_size=4, fresh=0, **NO_NEW[stage])
    latents, contexts, t, noise, *_ = recipe.batch(torch.Generator().manual_seed(0))
    unet = stages.load_trained_unet(config, run)
    with torch.no_grad():
        noisy = recipe.schedule.add_noise(latents, noise, t)
        alone = (unet(noisy, t, contexts) - recipe.schedule.target(latents, noise, t)).square().mean()
    found = losses(recipe, 12)
    assert found[0] == pytest.approx(float(alone), rel=1e-4), "what is fresh changes nothing"
    assert found[-1] < 0.95 * found[0]


@pytest.mark.parametrize("stage", ["edges", "depth"])
def test_the_base_stays_as_it_is_and_the_whole_control_learns(config, run, stage):
    recipe = make(stage, config, run)
    before = {name: value.clone() for name, value in recipe.unet.state_dict().items()}
    start = {name: value.clone() for name, value in recipe.model.state_dict().items()}
    losses(recipe, 3)
    assert all(torch.equal(value, before[name]) for name, value in recipe.unet.state_dict().items())
    assert all(parameter.requires_grad for parameter in recipe.model.parameters())
    assert [name for name, value in recipe.model.state_dict().items() if torch.equal(value, start[name])] == []


@pytest.mark.parametrize("stage", ["edges", "depth"])
def test_every_row_gets_the_hint_of_its_own_scene(config, run, stage):
    recipe = make(stage, config, run)
    recipe.cache.refresh(25)                            # rows 0 to 24 now hold scenes 50 to 74
    rows = np.array([0, 24, 25, 49])
    wanted = [draw_scene(seed, world=CORE) for seed in (50, 74, 25, 49)]
    hints, = recipe.extra_inputs(rows)
    assert hints.shape == (4, 3, 128, 128) and hints.min() == 0 and hints.max() == 1
    for hint, one in zip(hints, wanted, strict=True):
        torch.testing.assert_close(hint, torch.from_numpy(HINTS[stage](one) / 255).float().expand(3, -1, -1))
    latents = torch.cat([recipe.vae.to_latent(to_tensor([one.image])) for one in wanted])
    assert (recipe.cache.take(rows)[0] - latents).abs().max() < 0.01


def test_rows_and_seeds_survive_a_kill_between_writing_and_counting(config, run):
    cache = make("edges", config, run).cache
    cache.refresh(7)
    told = dict(cache.meta)
    cache.refresh(2)                                    # written
    cache.meta_file.write_text(json.dumps(told))        # but not counted
    again = make("edges", config, run).cache
    again.refresh(2)
    rows = np.arange(50)
    drawn = [draw_scene(seed, world=CORE) for seed in again.seeds(rows).tolist()]
    latents = again.vae.to_latent(to_tensor([one.image for one in drawn]))
    assert (again.take(rows)[0] - latents).abs().max() < 0.01


@pytest.mark.parametrize("capacity", [7, 10, 100])
def test_seeds_of_rows_follow_the_order_of_writing(capacity):
    cache = LatentCache.__new__(LatentCache)
    cache.offset, held = 1000, {}
    for made in range(1, 35):
        held[(made - 1) % capacity] = 1000 + made - 1
        cache.meta = {"made": made, "capacity": capacity}
        rows = np.array(sorted(held))
        assert cache.seeds(rows).tolist() == [held[row] for row in rows.tolist()]


def test_half_of_the_captions_are_dropped_for_control_alone(config, run):
    for stage, low, high in (("edges", 0.4, 0.6), ("inpaint", 0.05, 0.17)):
        recipe = make(stage, config, run, batch_size=64)
        generator = torch.Generator().manual_seed(0)
        dropped = [(recipe.batch(generator)[1] == recipe.empty).all(dim=(1, 2)).float().mean() for _ in range(6)]
        assert low < torch.stack(dropped).mean() < high


def test_the_hints_network_is_as_deep_as_the_autoencoder():
    for factor in (2, 4, 8, 16):
        assert 2 ** (len(hint_widths(factor)) - 1) == factor
    assert hint_widths(8) == (16, 32, 64, 64)


@pytest.mark.parametrize("stage", SMALL)
def test_a_stage_stops_goes_on_and_reports(config, run, stage, monkeypatch):
    for room in (control, inpaint):
        monkeypatch.setattr(room, "SHOWN", 2)
    first = steps(make(stage, config, run), run, 2)
    again = make(stage, config, run)
    progress, _ = next(fit(quiet(again), run, minutes=10, precision="no", compiled=False))
    assert progress.step == first.step + 1 and progress.samples == first.samples + 8
    figures = make(stage, config, run).report(again.model.eval(), run, progress.step)
    assert all(np.isfinite(value) for value in figures.values()) and list(run.glob(f"{stage}-*.png"))
    wanted = {"edges": "edge_f1_with_hint", "depth": "foreground_iou_without", "inpaint": "known_psnr"}[stage]
    assert wanted in figures


def test_a_stage_says_what_must_come_first(config, tmp_path):
    for stage in SMALL:
        with pytest.raises(FileNotFoundError, match="'unet' has not been trained in .*: run `train unet` first"):
            stages.STAGES[stage].make(config, tmp_path)


# --- agreement --------------------------------------------------------------------------------------

def test_a_scene_agrees_with_its_own_hints():
    covered = []
    for seed in range(20):
        one, other = draw_scene(seed, world=CORE), draw_scene(seed + 100, world=CORE)
        assert edge_f1(one.image, one.edge_map) > 0.95 > 0.6 > edge_f1(other.image, one.edge_map)
        assert edge_f1(np.full_like(one.image, 200), one.edge_map) == 0
        assert foreground_iou(np.full_like(one.image, 200), one.depth_map) == 0
        covered.append((foreground_iou(one.image, one.depth_map), foreground_iou(other.image, one.depth_map)))
    own, others = np.mean(covered, axis=0)
    assert own > 0.8 > 0.4 > others, "a blue thing on a blue ground hardly stands out"


def test_edges_may_be_one_pixel_off_and_no_more():
    image = np.zeros((32, 32, 3), np.uint8)
    image[8:24, 8:24] = 255
    edges = np.zeros((32, 32), np.uint8)
    edges[8, 8:24] = edges[24, 8:24] = edges[8:24, 8] = edges[8:24, 24] = 255
    assert edge_f1(image, edges) == 1
    assert edge_f1(np.roll(image, (1, 1), (0, 1)), edges) == 1
    assert edge_f1(np.roll(image, (3, 3), (0, 1)), edges) < 0.2
    assert 0.6 < edge_f1(image, edges * (np.arange(32) < 16)) < 0.8, "half of them: precision 1/2, recall 1"


def test_shuffled_hint_losses_are_of_other_scenes_hints_alone(config, run):
    """Networks that know the answer, and miss it by 1 where the hint is another scene's, by 2 without any."""
    recipe = make("edges", config, run, first=0, capacity=4)
    drawn = [draw_scene(1000 + seed, "test", CORE) for seed in range(4)]
    noisy, t, contexts, target = recipe.probe(drawn, 700)
    hints, = recipe.given(drawn)

    def unet(x, t, context, residuals=None):
        assert torch.equal(x, noisy) and torch.equal(context, contexts) and (t == 700).all()
        if residuals is None:
            return target + 2
        return target + (residuals != hints).any(dim=(1, 2, 3)).float()[:, None, None, None]

    recipe.unet = unet
    found = recipe.shuffled_hint_losses(lambda x, t, context, hints: hints, count=4)
    assert found == pytest.approx({"right@700": 0, "wrong@700": 1, "without@700": 4}, abs=1e-5)


def test_inpainting_losses_are_of_the_hole_with_one_input_exchanged_at_a_time(config, run):
    """A network that misses the answer by 1 for another scene's caption, by 2 for another's surroundings, and by 100
    outside of the hole."""
    recipe = make("inpaint", config, run, first=0, capacity=4, first_masks=0)
    drawn = [draw_scene(1000 + seed, "test", CORE) for seed in range(4)]
    noisy, _, contexts, target = recipe.probe(drawn, 700)
    masks, masked = recipe.given(drawn)

    def unet(x, t, context, *rest):
        assert torch.equal(x[:, :4], noisy) and torch.equal(x[:, 4:5], masks) and (t == 700).all()
        caption, around = ((a != b).flatten(1).any(dim=1).float()[:, None, None, None]
                           for a, b in ((context, contexts), (x[:, 5:], masked)))
        return target + caption + 2 * around + 100 * (1 - masks)

    found = recipe.shuffled_conditioning_losses(unet, count=4)
    assert found == pytest.approx({"right@700": 0, "wrong@700": 1, "unseen@700": 4}, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("stage", ["edges", "depth"])
def test_agreement_compares_each_kind_of_image_with_its_own_scenes_hint(config, run, stage):
    recipe = make(stage, config, run, first=0, capacity=4)
    agree = {"edges": edge_f1, "depth": foreground_iou}[stage]
    drawn = [draw_scene(seed, "test", CORE) for seed in range(4)]
    others = [draw_scene(100 + seed, "test", CORE).image for seed in range(4)]
    through = to_images(recipe.vae.to_pixels(recipe.vae.to_latent(to_tensor([one.image for one in drawn]))))
    wanted = {name: np.mean([agree(image, recipe.hint_of(one)) for image, one in zip(images, drawn, strict=True)])
              for name, images in (("with_hint", [one.image for one in drawn]), ("without", others),
                                   ("ceiling", through))}
    found = recipe.agreement(drawn, np.stack([one.image for one in drawn]), np.stack(others))
    assert found == pytest.approx({f"{agree.__name__}_{name}": value for name, value in wanted.items()})
    assert wanted["with_hint"] > 0.7 > wanted["without"] + 0.1


def test_a_report_tells_images_with_the_hint_from_those_without(config, run, monkeypatch):
    """A ControlNet that gives the scenes themselves, on a U-Net that gives flat grey."""
    monkeypatch.setattr(control, "SHOWN", 3)
    recipe = make("edges", config, run, first=0, capacity=4)
    drawn = [draw_scene(seed, "test", CORE) for seed in range(3)]

    def sample(network, prompts, steps=20):
        assert prompts == [one.caption for one in drawn]
        return np.stack([np.full_like(one.image, 200) if network is recipe.unet else one.image for one in drawn])

    recipe.sample, recipe.shuffled_hint_losses = sample, partial(recipe.shuffled_hint_losses, count=2)
    found = recipe.report(recipe.model, run, 7)
    assert found["edge_f1_with_hint"] > 0.95 and found["edge_f1_without"] == 0
    losses = recipe.shuffled_hint_losses(recipe.model)
    assert {name: found[name] for name in losses} == pytest.approx(losses)


# --- masks ------------------------------------------------------------------------------------------

def test_masks_are_never_empty_and_of_every_kind():
    rng, shares = random.Random(0), []
    for seed in range(300):
        mask = random_mask(draw_scene(seed, world=CORE), rng)
        assert mask.shape == (128, 128) and mask.dtype == bool
        assert latent_mask(torch.from_numpy(mask).float()[None, None], 8).any()
        shares.append(mask.mean())
    assert 0.15 < np.mean(np.array(shares) == 1) < 0.35 and np.min(shares) < 0.1 and sum(MASKS.values()) == 1
    middle = [share for share in shares if share < 1]
    assert np.std(middle) > 0.05 and 0.1 < np.mean(middle) < 0.4


def test_the_hole_is_the_first_objects_box():
    one = draw_scene(3, "test", CORE)
    left, top, right, bottom = one.objects[0].box
    mask = first_object_mask(one)
    assert mask[top:bottom, left:right].all() and mask.mean() < 1 and (mask == first_object_mask(one)).all()


def test_masked_latents_belong_to_their_rows(config, run):
    recipe = make("inpaint", config, run, first_masks=50)
    rows = recipe.masked.rows()
    assert len(rows) >= 20
    masks, masked = recipe.masked.take(rows)
    assert masks.shape == (len(rows), 1, 16, 16) and set(masks.unique().tolist()) <= {0.0, 1.0}
    whole = masks.mean(dim=(1, 2, 3)) == 1
    grey = recipe.vae.to_latent(torch.zeros(1, 3, 128, 128))
    assert whole.any() and (masked[whole] - grey).abs().max() < 0.01
    recipe.cache.refresh(30)                            # rows 0 to 29 hold other scenes now
    left = recipe.masked.rows()
    assert set(left) == {row for row in rows if row >= 30}
    recipe.masked.refresh(30, torch.Generator().manual_seed(1))
    assert len(recipe.masked.rows()) > len(left)
    for _ in range(5):
        drawn = recipe.draw(torch.Generator().manual_seed(2))
        assert (recipe.masked.seeds[drawn] == recipe.cache.seeds(drawn) + 1).all() and len(drawn) == 8


def test_masks_are_kept_for_the_next_call_and_thrown_away_with_their_autoencoder(config, run):
    before = make("inpaint", config, run)
    kept = before.masked.rows()
    assert (make("inpaint", config, run, first_masks=1).masked.rows() == kept).all()
    before.masked.masked[kept[0]] = 0                   # a page that was never written out
    before.masked.masked.flush()
    assert (make("inpaint", config, run, first_masks=1).masked.rows() == kept[1:]).all()
    cache = before.cache
    cache.meta["made_by"] = "another"
    other = MaskCache(cache.meta_file.parent, cache, first=0)
    assert len(other.rows()) == 0 and [file.name for file in cache.meta_file.parent.glob("masked-*")] \
        == ["masked-another"]


def test_what_the_inpainting_unet_reads_is_what_the_pipeline_gives_it(config, run):
    """Mask and masked latent of the recipe against those of `inpaint`, for one scene."""
    recipe = make("inpaint", config, run)
    one = draw_scene(5, "test", CORE)
    masks, masked = recipe.given([one])
    mask = torch.from_numpy(first_object_mask(one)).float()[None, None]
    assert torch.equal(masks, latent_mask(mask, 8))
    torch.testing.assert_close(masked, recipe.vae.to_latent(masked_pixels(to_tensor([one.image]), mask)))


def test_what_is_kept_is_measured_outside_of_the_hole_alone(config, run):
    recipe = make("inpaint", config, run)
    drawn = [draw_scene(seed, "test", CORE) for seed in range(3)]
    images = np.stack([one.image for one in drawn])
    inside = np.stack([np.where(first_object_mask(one)[..., None], 255 - one.image, one.image) for one in drawn])
    assert recipe.known_psnr(drawn, inside)["known_psnr"] > 100            # inf where nothing differs
    off = to_images(to_tensor(images) * 0 + 0.2)
    known = np.concatenate([(to_tensor([one.image]) - to_tensor([made])).square().mean(dim=1)[0].numpy()
                            [~first_object_mask(one)] for one, made in zip(drawn[:1], off[:1], strict=True)])
    wanted = pytest.approx(10 * np.log10(4 / known.mean()), rel=1e-3)
    assert recipe.known_psnr(drawn[:1], off[:1])["known_psnr"] == wanted


# --- differences ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def model(config, base, tmp_path_factory):
    """The base as a model folder, in half precision."""
    folder = tmp_path_factory.mktemp("models") / "small"
    vae, text, tokenizer, _ = stages.load_frozen_parts(config, base)
    clip = stages.load_averaged(CLIP(config.text, config.vision), base, "clip")
    parts = Parts(replace(config, vae=vae.config), tokenizer, clip.text_model, vae,
                  stages.load_trained_unet(config, base), clip, {"objects": ["apple"], "words": ["apple"]})
    return save_folder(folder, parts, dtype=torch.float16)


@pytest.fixture
def folder(model, tmp_path):
    return shutil.copytree(model, tmp_path / "small")


def moved(module, seed=0, far=0.01):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += far * torch.randn(parameter.shape, generator=generator)
    return module


def a_control(folder, config):
    return moved(ControlNet.from_unet(load_folder(folder).unet, hint_widths=hint_widths(8)))


def test_low_rank_is_the_best_for_its_bytes_and_keeps_the_budget():
    generator = torch.Generator().manual_seed(0)
    base = {"big": torch.randn(96, 64, 3, 3, generator=generator), "flat": torch.randn(128, 80, generator=generator),
            "bias": torch.randn(96, generator=generator), "same": torch.randn(96, 96, generator=generator)}
    left, right = torch.randn(96, 4, generator=generator), torch.randn(4, 576, generator=generator)
    net = {"big": base["big"] + 0.01 * (left @ right).reshape(96, 64, 3, 3),
           "flat": base["flat"] + 0.001 * torch.randn(128, 80, generator=generator), "bias": base["bias"] + 1,
           "same": base["same"], "new": torch.randn(3, 3, generator=generator)}
    for budget in (8_000, 20_000, 60_000):
        kept = compute_difference(net, base, budget)
        assert sum(2 * tensor.numel() for tensor in kept.values()) <= budget
        assert torch.equal(kept["new"], net["new"]) and torch.allclose(kept["bias.difference"], torch.ones(96))
        assert kept["same.up"].shape == (96, 0) and kept["same.down"].shape == (0, 96)
        assert min(4, kept["big.up"].shape[1]) == min(4, (budget - 210) // (2 * 672)), "the large values come first"
        near = {"big": base["big"] + (kept["big.up"] @ kept["big.down"]).reshape(96, 64, 3, 3)}
        if budget > 8_000:
            torch.testing.assert_close(near["big"], net["big"], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="a budget of 100 bytes is too small by 110"):
        compute_difference(net, base, 100)


def test_what_inputs_never_contain_costs_nothing():
    """A layer whose inputs fill 8 of 64 dimensions: of a difference that is large elsewhere, what they feel is kept."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    base = {"w": torch.randn(48, 64, generator=generator)}
    net = {"w": base["w"] + 0.1 * torch.randn(48, 64, generator=generator)}
    budget = 8 * 2 * (48 + 64)                          # rank 8
    wanted = inputs @ (net["w"] - base["w"]).T
    errors = []
    for moments in (None, {"w": inputs.T @ inputs / 500}):
        kept = compute_difference(net, base, budget, moments)
        assert kept["w.up"].shape == (48, 8)
        errors.append(float((inputs @ (kept["w.up"] @ kept["w.down"]).T - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.02 < 0.3 < errors[0]


@pytest.mark.parametrize("stage", ["edges", "inpaint"])
def test_moments_are_those_of_every_layers_inputs(config, run, stage):
    recipe = make(stage, config, run)
    base = stages.load_trained_unet(config, run)
    network = moved(recipe.model)
    found = adapters.input_moments(recipe, network, base, count=4)
    weights = {name: value for name, value in network.state_dict().items() if value.ndim > 1}
    assert found.keys() == weights.keys() & base.state_dict().keys()
    for name, moment in found.items():
        inputs = weights[name][0].numel()
        assert moment.shape == (inputs, inputs) and torch.equal(moment, moment.T), name
        assert moment.diagonal().min() >= 0 and torch.linalg.eigvalsh(moment).min() > -1e-3 * moment.trace()
    # conv_in's inputs are patches of the noisy latents; the middle pixel of each channel has their mean square.
    noisy = torch.cat([recipe.probe([draw_scene(10**6 + 4 * i + j, world=CORE) for j in range(4)], step)[0]
                       for i, step in enumerate((50, 250, 450, 650, 850, 999))])
    middle = found["conv_in.weight"].diagonal().reshape(-1, 3, 3)[:4, 1, 1]
    torch.testing.assert_close(middle, noisy.square().mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in network.modules())
    # Layers that read the text get one in four without a caption, at every timestep.
    texts = []
    for i in range(6):
        drawn = [draw_scene(10**6 + 4 * i + j, world=CORE) for j in range(4)]
        texts += [recipe.empty, recipe.text_encoder(recipe.tokenizer([one.caption for one in drawn[1:]])).hidden]
    tokens = torch.cat(texts).flatten(0, 1)
    readers = [name for name in found if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    assert readers
    for name in readers:
        torch.testing.assert_close(found[name], tokens.T @ tokens / len(tokens), rtol=1e-3, atol=1e-4)


def test_a_control_comes_back_whole_with_room_and_nearly_without(folder, config):
    net, base = a_control(folder, config), read_base_tensors(folder)
    errors = {}
    for budget in (10**7, 280_000):
        save_shipped_controlnet(folder, "edges", net, budget=budget)
        again = load_shipped_controlnet(folder, "edges")
        assert type(again) is ControlNet and again.control_config == net.control_config and not again.training
        errors[budget] = relative_error(net.state_dict(), again.state_dict(), base)
        for name, value in again.state_dict().items():
            if name not in base:
                assert torch.equal(value, net.state_dict()[name].half().float()), name
    assert errors[10**7] < 0.001 and 0.01 < errors[280_000] < 1
    assert (folder / "control-edges" / DIFFERENCE_FILE).stat().st_size < 280_000 + 20_000, "names take some, too"
    assert list_shipped_controlnets(folder) == ["edges"]
    assert load_shipped_controlnet(folder, "edges", dtype=torch.bfloat16).conv_in.weight.dtype == torch.bfloat16


def test_an_inpainting_unet_comes_back_and_the_pipeline_takes_it(folder, config):
    wide = moved(widen_unet(load_folder(folder).unet))
    save_shipped_inpaint(folder, wide, budget=10**7)
    parts = load_shipped_inpaint(folder)
    for name, value in parts.unet.state_dict().items():
        torch.testing.assert_close(value, wide.state_dict()[name], atol=2e-4, rtol=2e-3)
    assert parts.config.name == "small-inpaint" and parts.config.unet.in_channels == 9
    model = StableDiffusion(parts)
    assert model.inpaints
    one = draw_scene(0, "test", CORE)
    image, = model.inpaint(one.caption, one.image, first_object_mask(one), num_inference_steps=2, seed=0)
    assert image.size == (128, 128)
    assert not StableDiffusion(load_folder(folder)).inpaints, "the base is still the base"


def test_widening_changes_no_output(model):
    unet = moved(load_folder(model).unet)
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, unet.config.context_dim)
    beside = torch.randn(2, 5, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(widen_unet(unet)(torch.cat([x, beside], 1), 500, context), unet(x, 500, context),
                                   atol=1e-5, rtol=1e-5)


def test_another_base_is_told_and_its_adapters_go(folder, config, capsys):
    save_shipped_controlnet(folder, "edges", a_control(folder, config), budget=10**7)
    save_shipped_inpaint(folder, widen_unet(load_folder(folder).unet), budget=10**7)
    assert remove_incompatible(folder) == []
    parts = load_folder(folder)
    moved(parts.unet, far=1e-3)
    save_folder(folder, parts, dtype=torch.float16)
    for load in (lambda: load_shipped_controlnet(folder, "edges"), lambda: load_shipped_inpaint(folder)):
        with pytest.raises(CheckpointError, match="difference.safetensors belongs to another base than .*unet.*, whose "
                                                  "weights have changed"):
            load()
    save_shipped_controlnet(folder, "depth", a_control(folder, config), budget=10**7)
    assert remove_incompatible(folder) == ["control-edges", "inpaint"] and list_shipped_controlnets(folder) == ["depth"]
    assert load_folder(folder).unet.config.in_channels == 4


def test_the_fingerprint_is_of_values_alone(folder, tmp_path):
    file = find_base_file(folder)
    tensors = load_file(file)
    other = tmp_path / "other.safetensors"
    save_file(dict(reversed(tensors.items())), other, metadata={"format": "pt", "more": "words"})
    assert fingerprint_file(other) == fingerprint_file(file)
    name = next(iter(tensors))
    for change in (tensors[name] + 0.01, tensors[name].float()):
        save_file({**tensors, name: change}, other)
        assert fingerprint_file(other) != fingerprint_file(file)


def damage(file, change, **metadata):
    with_base = {"base": fingerprint_file(find_base_file(file.parent.parent)), **metadata}
    save_file(change(load_file(file)), file, metadata=with_base)


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def test_damage_is_told_in_a_sentence(folder, config):
    save_shipped_controlnet(folder, "edges", a_control(folder, config), budget=10**7)
    file = folder / "control-edges" / DIFFERENCE_FILE
    whole = file.read_bytes()
    up = next(name for name in load_file(file) if name.endswith(".up"))
    layer = up.removesuffix(".up")
    for change, error, words in (
        (without("controlnet_mid_block.weight"), TensorMismatch, "1 missing, the first being 'controlnet_mid_block"),
        (without(up, f"{layer}.down"), TensorMismatch, f"1 missing, the first being '{layer}'"),
        (without(up), TensorMismatch, f"1 missing, 1 unexpected, the first being '{layer}'"),
        (without(f"{layer}.down"), TensorMismatch, f"1 of another shape, the first being '{layer}'"),
        (lambda tensors: {**tensors, up: tensors[up][:-1].clone()}, TensorMismatch, "1 of another shape"),
        (lambda tensors: {**tensors, "strange": torch.zeros(2)}, TensorMismatch, "1 unexpected, .* 'strange'"),
        (lambda tensors: {**tensors, up: tensors[up] * float("nan")}, CheckpointError, "holds NaN or infinity"),
    ):
        file.write_bytes(whole)
        damage(file, change)
        with pytest.raises(error, match=words):
            load_shipped_controlnet(folder, "edges")
    for broken, words in ((whole[:len(whole) // 2], "truncated or not a safetensors file"), (b"", "truncated")):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=words):
            load_shipped_controlnet(folder, "edges")
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="does not say which base it belongs to"):
        load_shipped_controlnet(folder, "edges")


def test_what_is_not_there_is_told(folder):
    with pytest.raises(CheckpointError, match="has no ControlNet 'edges'; it has none"):
        load_shipped_controlnet(folder, "edges")
    with pytest.raises(CheckpointError, match="has no U-Net for inpainting; ask for the model itself"):
        load_shipped_inpaint(folder)
    with pytest.raises(CheckpointError, match="there is no model 'nothing'; give a shipped one"):
        load_shipped_controlnet("nothing", "edges")
    with pytest.raises(CheckpointError, match="there is no shipped model 'nothing'; there are"):
        load_shipped("nothing")


def test_shipped_models_are_found_by_name(folder, monkeypatch):
    monkeypatch.setattr(shipped_room, "SHIPPED", folder.parent)
    assert list_shipped_models() == ["small"]
    save_shipped_inpaint(folder, widen_unet(load_folder(folder).unet), budget=10**7)
    assert list_shipped_models() == ["small", "small-inpaint"]
    assert load_shipped("small-inpaint").config.unet.in_channels == 9
    assert load_shipped("small").config.unet.in_channels == 4


# --- shipping ---------------------------------------------------------------------------------------

def test_a_run_ships_what_it_has_and_starts_from_it_again(config, run, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "autoencoder_psnr", lambda vae: 1.0)
    monkeypatch.setattr(card, "retrieval_accuracy", lambda clip, tokenizer: 1.0)
    monkeypatch.setattr(card, "autoencoder_by_size", lambda vae: {})
    monkeypatch.setattr(card, "package_adapters", lambda *args: adapters.package_adapters(*args, count=2))
    monkeypatch.setattr(adapters, "input_moments", partial(adapters.input_moments, count=4))
    recipes = {stage: trained(stage, config, run) for stage in SMALL}
    out = card.package_weights(config, run, tmp_path / "model", count=2)
    assert list_shipped_controlnets(out) == ["depth", "edges"]
    figures, text = json.loads((out / "figures.json").read_text()), (out / "MODEL_CARD.md").read_text()
    for stage in SMALL:
        told = figures["on top"][stage]
        assert told["error of the stored difference"] < 0.02 and told["error of its effect on the output"] < 0.05
        assert told["training"]["step"] == 3 == figures["training"][stage]["step"]
        assert told["training"]["precisions"] == ["fp32"]
        place = out / ("inpaint" if stage == "inpaint" else f"control-{stage}")
        assert told["bytes"] == (place / DIFFERENCE_FILE).stat().st_size and (place / "samples.png").exists()
        assert f"({place.name}/samples.png)" in text

    sampled = StableDiffusion(load_folder(out))
    one = draw_scene(0, "test", CORE)
    free, = sampled.text2img(one.caption, num_inference_steps=3)
    led, = sampled.control(one.caption, load_shipped_controlnet(out, "edges"), np.stack([one.edge_map] * 3, 2),
                           num_inference_steps=3)
    assert free.size == led.size == (128, 128) and np.asarray(free).tobytes() != np.asarray(led).tobytes()

    assert stages.start_from(out, tmp_path / "new") == ["vae", "clip", "unet", "depth", "edges", "inpaint"]
    again = load_state(tmp_path / "new" / "edges-state.pt")
    assert again["progress"]["step"] == 3
    for name, value in recipes["edges"].model.state_dict().items():
        torch.testing.assert_close(again["average"][name], value, atol=1e-3, rtol=1e-2)
    other = replace(config, unet=replace(config.unet, channels=(4, 8)))
    assert stages.start_from(out, tmp_path / "other", other) == ["vae", "clip"], "another U-Net starts from nothing"


@pytest.mark.parametrize("stage", ["edges", "inpaint"])
def test_figures_of_an_adapter_are_measured_on_what_is_stored(config, run, folder, stage, monkeypatch):
    """Stored with too few bytes: the figures are those of the weights that anybody can load, and what they were before
    storing is said apart."""
    monkeypatch.setitem(adapters.BUDGETS, stage, {"edges": 280_000, "inpaint": 40_000}[stage])
    monkeypatch.setattr(adapters, "input_moments", partial(adapters.input_moments, count=2))
    recipe = make(stage, config, run, first=0, capacity=4, **({"first_masks": 0} if stage == "inpaint" else {}))
    # What is drawn shows which network drew it, and depends on all of its weights.
    recipe.sample = lambda network, prompts, steps=20: drawn_by(recipe, network, prompts)
    base = load_folder(folder).unet
    fresh = ControlNet.from_unet(base, hint_widths=hint_widths(8)) if stage == "edges" else widen_unet(base)
    whole = moved(fresh, far=0.05)
    figures = adapters.package_adapter(recipe, whole.state_dict(), folder, 2)

    drawn = [draw_scene(seed, "test", CORE) for seed in range(2)]
    stored = load_shipped_controlnet(folder, "edges") if stage == "edges" else load_shipped_inpaint(folder).unet
    recipe.unet = base

    def measured(network):
        if stage == "edges":
            baseline = recipe.sample(base, [one.caption for one in drawn])
            controlled = recipe.sample_with_control(network, drawn)
            return recipe.agreement(drawn, controlled, baseline) | recipe.shuffled_hint_losses(network, 2)
        preserved = recipe.known_psnr(drawn, recipe.inpaint(network, drawn))
        return preserved | recipe.shuffled_conditioning_losses(network, 2)

    wanted, before = measured(stored), measured(whole)
    different = {name for name in wanted if wanted[name] != before[name]}
    assert different >= ({"edge_f1_with_hint", "right@700", "wrong@700"} if stage == "edges" else
                         {"known_psnr", "right@700", "wrong@700", "unseen@700"})
    assert {name: figures[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    found = {name: value for name, value in figures.items() if name.endswith(" before storing")}
    assert found == pytest.approx({f"{name} before storing": before[name] for name in different}, rel=1e-5)


def drawn_by(recipe, network, prompts):
    """An image for each prompt of one pass of a network over noise, uint8 (B, 128, 128, 3)."""
    context = recipe.text_encoder(recipe.tokenizer(prompts)).hidden
    noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return to_images(network(noise, 500, context)[:, :3].repeat_interleave(
            8, dim=2).repeat_interleave(8, dim=3).clamp(-1, 1))


def test_reshipping_a_base_removes_what_belonged_to_another(config, run, tmp_path, capsys):
    parts_folder = tmp_path / "model"
    vae, text, tokenizer, _ = stages.load_frozen_parts(config, run)
    parts = Parts(replace(config, vision=None), tokenizer, text, vae,
                  stages.load_trained_unet(config, run))
    save_folder(parts_folder, parts, dtype=torch.float16)
    assert adapters.package_adapters(config, run, parts_folder, count=1) == {} and adapters.card_section({}) == []
    assert list_shipped_controlnets(parts_folder) == [] and not (parts_folder / "inpaint").exists()
    save_shipped_controlnet(parts_folder, "edges", a_control(parts_folder, config), budget=10**7)
    assert adapters.package_adapters(config, run, parts_folder, count=1) == {}
    assert list_shipped_controlnets(parts_folder) == ["edges"], "of the same base: nothing changes"
    moved(parts.unet)
    save_folder(parts_folder, parts, dtype=torch.float16)
    assert adapters.package_adapters(config, run, parts_folder, count=1) == {}
    assert list_shipped_controlnets(parts_folder) == []
    assert "control-edges, which belongs to another base than the one that is shipped now" in capsys.readouterr().out


def test_recipes_are_what_the_stages_make(config, run):
    assert isinstance(make("depth", config, run), ControlRecipe) and make("depth", config, run).name == "depth"
    assert list(stages.STAGES)[:6] == ["vae", "clip", "unet", "edges", "depth", "inpaint"] or \
        [name for name in stages.STAGES if name in SMALL] == list(SMALL)
    assert hint_tensor([np.full((4, 4), 255, np.uint8)]).shape == (1, 3, 4, 4)


def test_minutes_for_all_stages_are_shared_out(monkeypatch):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    for gpu in (False, True):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda gpu=gpu: gpu)
        usual = {name: stage.gpu_minutes if gpu else stage.minutes for name, stage in stages.STAGES.items()}
        for words, wanted in (("all", usual["edges"]), ("all --minutes 93", 93 * usual["edges"] / sum(usual.values())),
                              ("edges", 60.0), ("edges --minutes 93", 93.0)):
            args = parser.parse_args(words.split())
            assert command.budget(stages.STAGES["edges"], args) == pytest.approx(wanted)
        args = parser.parse_args(["all", "--minutes", "10"])
        assert sum(command.budget(stage, args) for stage in stages.STAGES.values()) == pytest.approx(10)
    assert sum(usual.values()) < 23, "on a GPU all fit into 25 minutes, with room for what is not training"


# --- a lesson ---------------------------------------------------------------------------------------

def test_a_lesson_learns_from_nothing_and_can_be_sampled(config, base):
    vae, text, tokenizer, _ = stages.load_frozen_parts(config, base)
    parts = Parts(replace(config, vision=None, vae=vae.config), tokenizer, text, vae,
                  stages.load_trained_unet(config, base))
    material = from_scratch.prepare_latents(parts, 40)
    unseen = from_scratch.prepare_latents(parts, 8, split="test")
    assert material.latents.shape == (40, 4, 16, 16) and material.contexts.shape == (40, 77, config.text.dim)
    assert not torch.equal(material.latents[:8], unseen.latents)
    before, told = parts.unet.state_dict(), []
    for lesson in from_scratch.train_small_unet(parts, material, steps=12, batch_size=8):
        told.append(lesson.loss)
    assert lesson.step == 12 and lesson.samples == 96 and told[-1] < told[0]
    assert set(from_scratch.shuffled_losses_of(lesson, unseen)) == {"right@999", "wrong@999", "right@700", "wrong@700"}
    assert lesson.parts.config.name == "classroom" and parts.unet.state_dict().keys() == before.keys()
    image, = StableDiffusion(lesson.parts).text2img("a star", num_inference_steps=2)
    assert image.size == (128, 128)
    again = [one.loss for one in from_scratch.train_small_unet(parts, material, steps=3, batch_size=8)]
    third = from_scratch.train_small_unet(parts, material, steps=3, batch_size=8)
    assert again == pytest.approx([one.loss for one in third])
    assert sum(1 for _ in from_scratch.train_small_unet(parts, material, minutes=1e-9)) == 1
    for wrong in ({"minutes": 0}, {"steps": 0}, {"batch_size": 0}, {"learning_rate": float("inf")}):
        with pytest.raises(ValueError, match="give a number above 0"):
            from_scratch.train_small_unet(parts, material, **wrong)


def test_the_lessons_world_is_plain():
    drawn = [draw_scene(seed, world=from_scratch.WORLD) for seed in range(60)]
    assert {one.objects[0].name for one in drawn} == set(from_scratch.WORLD.objects)
    assert all(len(one.objects) == 1 for one in drawn)
    assert sum(p.numel() for p in UNet(from_scratch.CONFIG.unet).parameters()) < 3e6
    assert replace(from_scratch.CONFIG, name="mini", unet=PRESETS["mini"].unet) == PRESETS["mini"]
