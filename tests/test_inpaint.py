"""Inpainting: masks, and runs equal to diffusers' pipeline with nine channels and with four."""

import json
import math
from dataclasses import replace
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from models import EPSILON, ZERO_SNR, one_thread, randomise  # noqa: F401
from PIL import Image

from sdlearn.checkpoint import configs
from sdlearn.config import PRESETS, NoiseConfig
from sdlearn.guidance import predict_x0
from sdlearn.inpaint import (
    binary_mask,
    blended_denoise,
    latent_mask,
    masked_pixels,
    nine_channels,
    paste,
    repaint,
    soft_mask,
)
from sdlearn.samplers import SAMPLERS, ddim, ddpm, make_timesteps_for
from sdlearn.schedule import NoiseSchedule, make_timesteps
from sdlearn.unet import UNet
from sdlearn.vae import VAE

SCHEDULE = NoiseSchedule(NoiseConfig())
TINY = PRESETS["tiny"]
THEIRS = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler,
          "dpmpp_2m": diffusers.DPMSolverMultistepScheduler}
LATENT, CONTEXT, NOISE = (2, 4, 6, 8), (2, 7, 16), 11                   # shapes, and the seed of the noise
# From inside diffusers, whose pipelines and schedulers are older than this Python and NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def difference(ours, theirs):
    assert ours.shape == theirs.shape and theirs.abs().max() > 0
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def box(height=12, width=16):
    """A mask of pixels with a box to repaint whose edges are not those of the latent's cells."""
    mask = torch.zeros(1, 1, height, width)
    mask[:, :, 3:9, 5:13] = 1
    return mask


@cache
def unets(channels):
    config = replace(TINY.unet, in_channels=channels)
    ours = UNet(config).eval().requires_grad_(False)
    randomise(ours, torch.Generator().manual_seed(channels))
    theirs = UNet2DConditionModel.from_config(json.loads(json.dumps(configs.unet_to_dict(config, 16))))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs.eval().requires_grad_(False)


def noise():
    return torch.randn(LATENT, generator=torch.Generator().manual_seed(NOISE))


# --- masks ------------------------------------------------------------------------------------------

PIXELS = np.array([[0, 1, 0], [1, 1, 0]])


@pytest.mark.parametrize("mask", [
    PIXELS.astype(bool), PIXELS.astype(np.uint8), (255 * PIXELS).astype(np.uint8), 255 * PIXELS,
    PIXELS.astype(np.float64), torch.tensor(PIXELS), torch.tensor(PIXELS).half(), torch.tensor(PIXELS)[None, None],
    Image.fromarray((255 * PIXELS).astype(np.uint8)), Image.fromarray(PIXELS.astype(bool)),
    Image.fromarray((255 * PIXELS).astype(np.uint8)).convert("RGB"),
    Image.fromarray((255 * PIXELS).astype(np.uint8)).convert("P"),
], ids=lambda mask: f"{type(mask).__name__} {getattr(mask, 'dtype', getattr(mask, 'mode', ''))}")
def test_masks_of_every_kind(mask):
    made = binary_mask(mask, (2, 3))
    assert made.dtype == torch.float32
    assert torch.equal(made, torch.tensor(PIXELS, dtype=torch.float32)[None, None])
    assert torch.equal(binary_mask(made), made)


def test_a_mask_between_is_thresholded_at_a_half_only_when_asked():
    grey = torch.tensor([[0.0, 0.499, 0.5, 0.7, 1.0]])
    with pytest.raises(ValueError, match="not binary.*threshold=True") as told:
        binary_mask(grey)
    assert "\n" not in str(told.value)
    assert binary_mask(grey, threshold=True).tolist() == [[[[0, 0, 1, 1, 1]]]]
    in_bytes = np.array([[0, 127, 128, 255]], dtype=np.uint8)
    with pytest.raises(ValueError, match="not binary"):
        binary_mask(in_bytes)
    assert binary_mask(in_bytes, threshold=True).tolist() == [[[[0, 0, 1, 1]]]]


def test_thresholded_masks_are_those_of_diffusers():
    grey = torch.rand(1, 1, 16, 24)
    theirs = diffusers.image_processor.VaeImageProcessor(
        vae_scale_factor=2, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    assert torch.equal(binary_mask(grey, threshold=True), theirs.preprocess(grey.clone(), 16, 24))
    image = Image.fromarray((255 * grey[0, 0]).byte().numpy())
    assert torch.equal(binary_mask(image, threshold=True), theirs.preprocess(image, 16, 24))


@pytest.mark.parametrize("mask, options, words", [
    (torch.ones(5, 4), {"size": (4, 5)}, "the mask is 5 x 4 pixels .* but the image is 4 x 5: resize the mask"),
    (Image.new("L", (3, 2), 255), {"size": (3, 2)}, "the mask is 2 x 3 pixels .* image is 3 x 2"),
    (torch.zeros(4, 4), {}, "0 everywhere, so nothing would be repainted"),
    (torch.stack([torch.ones(1, 4, 4), torch.zeros(1, 4, 4)]), {}, "0 everywhere"),
    (torch.full((4, 4), 0.2), {"threshold": True}, "0 everywhere"),
    (torch.ones(2, 4, 4), {}, r"the mask is \(2, 4, 4\): give \(rows, columns\) or \(batch, 1, rows, columns\)"),
    (np.ones((4, 4, 3)), {}, r"the mask is \(4, 4, 3\)"),
    (torch.full((4, 4), 255.0), {}, r"outside of 0\.\.\.1"),
    (torch.full((4, 4), 1000), {}, r"outside of 0\.\.\.1"),
    (torch.full((4, 4), -1.0), {"threshold": True}, r"outside of 0\.\.\.1"),
    (torch.full((4, 4), math.nan), {"threshold": True}, r"outside of 0\.\.\.1"),
])
def test_masks_that_cannot_be_are_told_in_a_sentence(mask, options, words):
    with pytest.raises(ValueError, match=words) as told:
        binary_mask(mask, **options)
    assert "\n" not in str(told.value)


def test_a_cell_is_repainted_if_its_upper_left_pixel_is():
    mask = torch.zeros(1, 1, 4, 6)
    mask[:, :, 1:4, 1:4] = 1
    assert latent_mask(mask, 2).tolist() == [[[[0, 0, 0], [0, 1, 0]]]]
    assert torch.equal(latent_mask(mask, 1), mask)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 2, 4, 8]), st.integers(0, 99))
def test_latent_masks_are_those_of_diffusers(h, w, factor, seed):
    mask = (torch.rand(2, 1, h * factor, w * factor, generator=torch.Generator().manual_seed(seed)) > 0.3).float()
    mask[:, :, 0, 0] = 1
    cells = latent_mask(mask, factor)
    assert torch.equal(cells, F.interpolate(mask, size=(h, w)))             # as prepare_mask_latents has it
    assert torch.equal(cells, mask[:, :, ::factor, ::factor])


def test_a_mask_that_the_latent_cannot_show_is_told():
    mask = torch.zeros(1, 1, 16, 16)
    mask[:, :, 3, 3] = 1
    with pytest.raises(ValueError, match="too thin for the latent, whose cells are 8 x 8 pixels"):
        latent_mask(mask, 8)
    with pytest.raises(ValueError, match="too thin"):                       # also if only one of a batch is
        latent_mask(torch.cat([torch.ones_like(mask), mask]), 8)
    with pytest.raises(ValueError, match="the mask is 15 x 16 pixels .* multiples of 8"):
        latent_mask(mask[:, :, 1:], 8)


def test_masked_pixels_are_grey_inside():
    pixels, mask = torch.rand(2, 3, 12, 16) * 2 - 1, box()
    masked = masked_pixels(pixels, mask)
    assert torch.equal(masked, torch.where(mask.bool(), torch.zeros(()), pixels))
    with pytest.raises(ValueError, match="the mask is 12 x 16, but the image 8 x 16"):
        masked_pixels(pixels[:, :, 4:], mask)


# --- pasting ----------------------------------------------------------------------------------------

def test_paste_without_a_seam_is_either_image_bit_for_bit():
    original, generated, mask = torch.randn(2, 3, 12, 16), torch.randn(2, 3, 12, 16), box()
    assert torch.equal(paste(original, generated, mask), torch.where(mask.bool(), generated, original))


def test_a_seam_falls_in_equal_steps_outside_of_the_mask():
    mask = torch.zeros(1, 1, 1, 9)
    mask[..., 4] = 1
    torch.testing.assert_close(soft_mask(mask, 3), torch.tensor([0, 1, 2, 3, 4, 3, 2, 1, 0])[None, None, None] / 4)
    assert torch.equal(soft_mask(mask, 0), mask)


@given(st.integers(0, 12), st.integers(0, 999))
def test_a_seam_leaves_the_inside_generated_and_the_far_outside_original(seam, seed):
    generator = torch.Generator().manual_seed(seed)
    original, generated = torch.randn(2, 1, 3, 20, 24, generator=generator)
    mask = (torch.rand(1, 1, 20, 24, generator=generator) > 0.98).float()
    pasted = paste(original, generated, mask, seam=seam)
    near = F.max_pool2d(mask, 2 * seam + 1, stride=1, padding=seam)
    assert torch.equal(pasted * mask, generated * mask)
    assert torch.equal(pasted * (1 - near), original * (1 - near))
    between = (pasted >= torch.minimum(original, generated) - 1e-6) & (
        pasted <= torch.maximum(original, generated) + 1e-6)
    assert between.all()


def test_what_cannot_be_pasted_is_told():
    image, mask = torch.zeros(1, 3, 12, 16), box()
    with pytest.raises(ValueError, match="the generated image is 12 x 12, but the original 12 x 16"):
        paste(image, image[..., :12], mask)
    with pytest.raises(ValueError, match="the mask is 12 x 8, but the original 12 x 16"):
        paste(image, image, mask[..., :8])
    with pytest.raises(ValueError, match="the seam is -1 pixels wide"):
        paste(image, image, mask, seam=-1)


# --- nine channels ----------------------------------------------------------------------------------

def test_the_network_reads_latent_mask_and_masked_latent_in_this_order():
    seen = []

    def network(x, t, context, residuals):
        seen.append(x)
        return x[:, :4]
    x, mask, masked = torch.randn(LATENT), latent_mask(box(), 2), torch.randn(1, *LATENT[1:])
    nine_channels(network, mask, masked)(x, 300, None)
    assert torch.equal(seen[0], torch.cat([x, mask.expand(2, -1, -1, -1), masked.expand(2, -1, -1, -1)], 1))


def test_both_halves_of_a_guided_batch_read_the_same():
    unet, _ = unets(9)
    x, context = torch.randn(LATENT), torch.randn(CONTEXT)
    mask, masked = (torch.rand(2, 1, 6, 8) > 0.5).float(), torch.randn(LATENT)
    run = nine_channels(unet, mask, masked)
    both = run(torch.cat([x, x]), 300, torch.cat([0 * context, context]))
    for i in range(2):
        own = torch.cat([x, mask, masked], 1)[i:i + 1]
        assert difference(both[i:i + 1], unet(own, 300, 0 * context[:1])) < 1e-5
        assert difference(both[2 + i:3 + i], unet(own, 300, context[i:i + 1])) < 1e-5


@pytest.mark.parametrize("x, mask, masked, words", [
    ((2, 4, 6, 8), (1, 1, 6, 7), (1, 4, 6, 8), "the mask is 6 x 7, but the masked latent 6 x 8"),
    ((2, 4, 8, 6), (1, 1, 6, 8), (1, 4, 6, 8), "the mask is 6 x 8, but the latent 8 x 6"),
    ((2, 4, 6, 8), (3, 1, 6, 8), (1, 4, 6, 8), "3 masks do not go with 2 latents"),
    ((2, 4, 6, 8), (2, 1, 6, 8), (3, 4, 6, 8), "2 masks do not go with 3 masked latents"),
])
def test_what_does_not_go_together_is_told(x, mask, masked, words):
    with pytest.raises(ValueError, match=words):
        nine_channels(unets(9)[0], torch.ones(mask), torch.zeros(masked))(torch.zeros(x), 300, torch.zeros(CONTEXT))


def test_a_plain_unet_is_no_inpainting_model():
    with pytest.raises(ValueError, match="reads 4 channels .* which reads 9: use blended_denoise,"):
        nine_channels(unets(4)[0], torch.ones(1, 1, 6, 8), torch.zeros(1, 4, 6, 8))


# --- whole runs, against the pipeline of diffusers --------------------------------------------------

def scheduler_of(name, spacing, config=EPSILON):
    extra = {"rescale_betas_zero_snr": True} if config.zero_terminal_snr else {}
    if name == "ddim":
        extra |= {"clip_sample": False, "set_alpha_to_one": False}
    return THEIRS[name](beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                        timestep_spacing=spacing, prediction_type=config.prediction_type, **extra)


def run_of_diffusers(channels, scheduler, strength, known, masked, context, uncond, steps):
    """The latent after a run of their pipeline. It draws its noise from a generator seeded with NOISE."""
    vae = AutoencoderKL.from_config(json.loads(json.dumps(configs.vae_to_dict(TINY.vae, 16))))
    pipeline = StableDiffusionInpaintPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unets(channels)[1], scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        image=known, mask_image=box(), masked_image_latents=masked, prompt_embeds=context, strength=strength,
        negative_prompt_embeds=uncond, guidance_scale=4.0, num_inference_steps=steps, height=12, width=16,
        generator=torch.Generator().manual_seed(NOISE), output_type="latent").images


def grid_of(scheduler, steps, strength):
    """Their timesteps as pairs, from the place at which a run of this strength starts."""
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    grid = list(zip(times, [*times[1:], None], strict=True))
    return grid[steps - min(int(steps * strength), steps):]


def start(grid, strength, known):
    return noise() if strength == 1 else SCHEDULE.add_noise(known, noise(), grid[0][0])


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", THEIRS)
def test_nine_channels_give_the_latent_of_diffusers(name, strength):
    vae = VAE(TINY.vae).requires_grad_(False)
    randomise(vae, torch.Generator().manual_seed(1))
    known, context, uncond = torch.randn(LATENT), torch.randn(CONTEXT), torch.randn(CONTEXT)
    mask = binary_mask(box(), (12, 16))
    masked = vae.to_latent(masked_pixels(torch.rand(2, 3, 12, 16) * 2 - 1, mask))
    wanted = run_of_diffusers(9, scheduler_of(name, "leading"), strength, known, masked, context, uncond, 5)

    unet = nine_channels(unets(9)[0], latent_mask(mask, 2), masked)
    denoise = predict_x0(unet, SCHEDULE, context, uncond, guidance_scale=4.0)
    grid = grid_of(scheduler_of(name, "leading"), 5, strength)
    *_, last = SAMPLERS[name](denoise, start(grid, strength, known), grid, SCHEDULE)
    assert difference(last.x, wanted) <= 1e-5


@pytest.mark.parametrize("strength", [1.0, 0.7, 0.3])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name", THEIRS)
def test_blending_gives_the_latent_of_diffusers(name, spacing, strength):
    """They blend after each step, we before each call: equal, but for their first call from noise alone."""
    known, context, uncond = torch.randn(LATENT), torch.randn(CONTEXT), torch.randn(CONTEXT)
    grid = grid_of(scheduler_of(name, spacing), 10, strength)
    wanted = run_of_diffusers(4, scheduler_of(name, spacing), strength, known, torch.zeros(LATENT), context, uncond, 10)

    plain = predict_x0(unets(4)[0], SCHEDULE, context, uncond, guidance_scale=4.0)
    mask, x = latent_mask(box(), 2), start(grid, strength, known)
    if name == "euler" and spacing == "trailing" and strength == 1:
        x = x * SCHEDULE.at(grid[0][0])[1]                  # where theirs begins at sigma_max noise: see samplers
    told = blended_denoise(plain, known, mask, noise(), SCHEDULE)

    def denoise(x, t):
        return plain(x, t) if strength == 1 and t == grid[0][0] else told(x, t)
    *_, last = SAMPLERS[name](denoise, x, grid, SCHEDULE)
    assert difference(paste(known, last.x, mask) if name == "ddim" else last.x, wanted) <= 1e-5
    keep = (mask == 0).expand(LATENT)
    assert torch.equal(wanted[keep], known[keep])


def test_with_zero_terminal_snr_blending_gives_the_latent_of_diffusers_from_noise_alone_as_well():
    """There the known cells hold no signal at the first timestep, so both see the same from the first call on."""
    schedule = NoiseSchedule(ZERO_SNR)
    known, context, uncond = torch.randn(LATENT), torch.randn(CONTEXT), torch.randn(CONTEXT)
    wanted = run_of_diffusers(4, scheduler_of("ddim", "trailing", ZERO_SNR), 1.0, known, torch.zeros(LATENT), context,
                              uncond, 10)
    grid = make_timesteps(schedule, 10)
    mask = latent_mask(box(), 2)
    guided = predict_x0(unets(4)[0], schedule, context, uncond, guidance_scale=4.0)
    denoise = blended_denoise(guided, known, mask, noise(), schedule)
    *_, last = ddim(denoise, noise(), grid, schedule)
    assert difference(paste(known, last.x, mask), wanted) <= 1e-5


# --- blending by itself -----------------------------------------------------------------------------

def network(x, t):
    """A `denoise` whose every cell hears of its neighbours."""
    return torch.tanh(F.avg_pool2d(x, 3, stride=1, padding=1) + math.sin(t / 150)) + 0.2 * x


@pytest.mark.parametrize("config", [NoiseConfig(), ZERO_SNR], ids=["SD", "zero SNR"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_keeps_what_is_known(name, config):
    schedule = NoiseSchedule(config)
    known, mask = torch.randn(LATENT), latent_mask(box(), 2)
    keep = (mask == 0).expand(LATENT)
    seen = []

    def watched(x, t):
        seen.append((x, t))
        return network(x, t)
    steps = list(SAMPLERS[name](blended_denoise(watched, known, mask, noise(), schedule), noise(),
                                make_timesteps_for(name, schedule, 6), schedule, generator=torch.Generator()))
    for x, t in seen:
        assert torch.equal(x[keep], schedule.add_noise(known, noise(), t)[keep])
    assert all(torch.equal(step.x0[keep], known[keep]) for step in steps)
    at_the_end = paste(known, steps[-1].x, mask)
    assert torch.equal(at_the_end[keep], known[keep])
    if name not in ("ddim", "pndm"):                # these end at the noise of timestep 0
        assert difference(steps[-1].x[keep], known[keep]) < 1e-6
    plain = list(SAMPLERS[name](network, noise(), make_timesteps_for(name, schedule, 6), schedule,
                                generator=torch.Generator()))
    assert difference(steps[-1].x[~keep], plain[-1].x[~keep]) > 1e-2    # the repainted cells heard of the known


def test_a_batch_of_one_serves_all():
    known, mask = torch.randn(1, *LATENT[1:]), latent_mask(box(), 2)
    one = blended_denoise(network, known, mask, noise()[:1], SCHEDULE)
    each = blended_denoise(network, known.expand(LATENT), mask.expand(2, -1, -1, -1), noise()[:1].expand(LATENT),
                           SCHEDULE)
    x = torch.randn(LATENT)
    assert torch.equal(one(x, 400), each(x, 400))


def test_nothing_given_is_changed():
    x, known, mask = torch.randn(LATENT), torch.randn(LATENT), latent_mask(box(), 2)
    kept = [each.clone() for each in (x, known, mask)]
    blended_denoise(network, known, mask, noise(), SCHEDULE)(x, 400)
    list(repaint(ddpm, known, mask, times=2)(network, x, make_timesteps(SCHEDULE, 3), SCHEDULE))
    paste(known, x, mask, seam=2)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, known, mask), strict=True))


@pytest.mark.parametrize("known, mask, noise_shape, x, words", [
    (LATENT, (1, 1, 6, 7), LATENT, LATENT, "the mask is 6 x 7, but the known latent 6 x 8"),
    (LATENT, (1, 1, 6, 8), (2, 4, 8, 6), LATENT, "the noise is 8 x 6, but the known latent 6 x 8"),
    (LATENT, (1, 1, 6, 8), LATENT, (2, 4, 6, 9), "the mask is 6 x 8, but the latent 6 x 9"),
])
def test_sizes_that_differ_are_told(known, mask, noise_shape, x, words):
    with pytest.raises(ValueError, match=words):
        denoise = blended_denoise(network, torch.zeros(known), torch.ones(mask), torch.zeros(noise_shape), SCHEDULE)
        denoise(torch.zeros(x), 300)


# --- RePaint ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_repaint_is_a_sampler_that_calls_each_step_again(name, times):
    known, mask = torch.randn(LATENT), latent_mask(box(), 2)
    grid, seen = make_timesteps(SCHEDULE, 5), []

    def watched(x, t):
        seen.append(t)
        return network(x, t)
    steps = list(repaint(SAMPLERS[name], known, mask, times=times)(
        watched, torch.randn(LATENT), grid, SCHEDULE, generator=torch.Generator()))
    assert [(step.index, step.t) for step in steps] == [(i, t) for i, (t, _) in enumerate(grid)]
    if name not in ("heun", "pndm"):                # which call twice where they begin
        assert seen == [t for t, _ in grid[:-1] for _ in range(times)] + [grid[-1][0]]
    keep = (mask == 0).expand(LATENT)
    assert all(torch.equal(step.x0[keep], known[keep]) for step in steps)
    assert steps[-1].x.isfinite().all()


def test_once_is_blending_with_new_noise_at_each_step():
    known, mask, x = torch.randn(LATENT), latent_mask(box(), 2), torch.randn(LATENT)
    grid, drawn = make_timesteps(SCHEDULE, 5), torch.Generator().manual_seed(4)
    steps = list(repaint(ddim, known, mask, times=1)(network, x, grid, SCHEDULE,
                                                     generator=torch.Generator().manual_seed(4)))
    for step, pair in zip(steps, grid, strict=True):
        new = torch.randn(LATENT, generator=drawn)
        wanted, = ddim(blended_denoise(network, known, mask, new, SCHEDULE), x, [pair], SCHEDULE)
        assert torch.equal(step.x, wanted.x)
        x = wanted.x


def test_a_seed_gives_the_same_and_an_image_of_a_batch_what_it_gives_alone():
    known, mask, x = torch.randn(LATENT), latent_mask(box(), 2), torch.randn(LATENT)
    grid = make_timesteps(SCHEDULE, 4)

    def run(known, x, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        *_, last = repaint(ddpm, known, mask, times=3)(network, x, grid, SCHEDULE, generator=generators)
        return last.x
    both = run(known, x, [5, 6])
    assert torch.equal(both, run(known, x, [5, 6]))
    assert not torch.equal(both, run(known, x, [5, 7]))
    for i in range(2):
        assert difference(run(known[i:i + 1], x[i:i + 1], [5 + i]), both[i:i + 1]) < 1e-5


def test_every_pass_draws_new_noise_for_the_known_cells():
    """At one timestep the network sees the known cells alpha known + sigma eps, with an eps of its own each time."""
    known, mask, seen = torch.randn(LATENT), latent_mask(box(), 2), {}
    keep = (mask == 0).expand(LATENT)

    def watched(x, t):
        alpha, sigma = SCHEDULE.at(t)
        seen.setdefault(t, []).append(((x - alpha * known) / sigma)[keep])
        return network(x, t)

    list(repaint(ddim, known, mask, times=3)(watched, torch.randn(LATENT), make_timesteps(SCHEDULE, 4), SCHEDULE,
                                             generator=torch.Generator().manual_seed(4)))
    drawn = [eps for passes in seen.values() for eps in passes]
    assert [len(passes) for passes in seen.values()] == [3, 3, 3, 1]
    for i, eps in enumerate(drawn):
        assert abs(eps.mean()) < 5 / len(eps)**0.5 and abs(eps.std() - 1) < 5 / (2 * len(eps))**0.5
        assert all((eps - other).std() > 1 for other in drawn[:i])          # independent: a deviation of 2 ** 0.5


def test_the_noise_between_passes_is_that_of_the_forward_process():
    """Where x0 is known the states are exactly normal: mean alpha x0, variance sigma^2, at every pass."""
    known = torch.full((1, 1, 100, 200), 0.7)
    states = []

    def watched(x, t):
        states.append((x, t))
        return known
    x = SCHEDULE.add_noise(known, torch.randn(known.shape), 901)
    mask = torch.ones(known.shape)
    list(repaint(ddpm, known, mask, times=4)(watched, x, make_timesteps(SCHEDULE, 10), SCHEDULE))
    assert len(states) == 9 * 4 + 1
    for x, t in states:
        alpha, sigma = SCHEDULE.at(t)
        assert abs(x.mean() - alpha * 0.7) < 5 * sigma / 20_000**0.5
        assert abs(x.std() / sigma - 1) < 5 / 40_000**0.5


def test_more_passes_bring_the_repainted_cells_nearer_to_what_the_known_ones_ask_for():
    """Two cells, normal with correlation 0.9, the exact denoiser, one cell known to be 1.5.

    The other's true distribution given that is normal of mean 0.9 * 1.5. Blending alone falls short of it.
    """
    covariance = torch.tensor([[1, 0.9], [0.9, 1]])
    known, mask = torch.full((20_000, 1, 1, 2), 1.5), torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)

    def denoise(x, t):
        alpha, sigma = SCHEDULE.at(t)
        return x @ (alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2)))

    off = {}
    for times in (1, 3, 10):
        generator = torch.Generator().manual_seed(times)
        x = torch.randn(known.shape, generator=generator)
        *_, last = repaint(ddpm, known, mask, times=times)(denoise, x, make_timesteps(SCHEDULE, 50), SCHEDULE,
                                                           generator=generator)
        off[times] = abs(last.x[..., 1].mean().item() - 0.9 * 1.5)
    assert off[1] > 2 * off[3] > 3 * off[10]


@pytest.mark.parametrize("times", [0, -1, 1.5, True])
def test_times_that_cannot_be_are_told(times):
    with pytest.raises(ValueError, match=f"times is {times}: give a whole number of at least 1"):
        repaint(ddpm, torch.zeros(LATENT), torch.ones(1, 1, 6, 8), times=times)
