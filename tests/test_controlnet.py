"""ControlNet: diffusers' numbers on the same weights, in single calls and in whole runs; how a fresh one learns."""

import json
import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from models import one_thread, randomise  # noqa: F401

from sdlearn.checkpoint import CheckpointError, TensorMismatch, configs, load_controlnet, source
from sdlearn.checkpoint.control import load_controlnet_folder, save_controlnet
from sdlearn.config import PRESETS, ControlNetConfig, NoiseConfig, UNetConfig
from sdlearn.controlnet import Control, ControlNet, add_control, check_version, guess_scales, zero_conv_gradients
from sdlearn.guidance import predict_x0
from sdlearn.inpaint import nine_channels
from sdlearn.samplers import SAMPLERS, ddim
from sdlearn.schedule import NoiseSchedule, make_timesteps
from sdlearn.unet import UNet

KEYS = json.loads((Path(__file__).parent / "data" / "keys_unet.json").read_text())
FILE, HALF = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"

SD1 = UNetConfig(channels=(32, 64, 96, 96), context_dim=24)
SD2 = UNetConfig(channels=(32, 64, 96, 96), context_dim=40, heads=None, head_dim=16, linear_projection=True)
CONFIGS = {
    "tiny": ControlNetConfig(PRESETS["tiny"].unet, hint_widths=(4, 8)),
    "mini": ControlNetConfig(PRESETS["mini"].unet),
    "sd1_small": ControlNetConfig(SD1, hint_widths=(4, 8, 12, 16)),
    "sd2_small": ControlNetConfig(SD2, hint_channels=1, hint_widths=(4, 8)),
}
SCHEDULE = NoiseSchedule(NoiseConfig())


def through_json(values):
    return json.loads(json.dumps(values))


@cache
def pair(name, seed=0):
    """Our ControlNet and diffusers', built from the config.json that is written of ours, on the same weights."""
    config = CONFIGS[name]
    ours = ControlNet(config)
    randomise(ours, torch.Generator().manual_seed(seed))
    theirs = ControlNetModel.from_config(through_json(configs.controlnet_to_dict(config)))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False)


@cache
def bases(name):
    """The U-Net that a ControlNet of this name serves, ours and diffusers'."""
    config = CONFIGS[name].unet
    ours = UNet(config)
    randomise(ours, torch.Generator().manual_seed(9))
    theirs = UNet2DConditionModel.from_config(through_json(configs.unet_to_dict(config, 16)))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.eval().requires_grad_(False), theirs.eval().requires_grad_(False)


def inputs(name="tiny", h=8, w=6, batch=2, hints=None, tokens=7):
    config = CONFIGS[name]
    return (torch.randn(batch, config.unet.in_channels, h, w), torch.randn(batch, tokens, config.unet.context_dim),
            torch.rand(hints or batch, config.hint_channels, h * config.factor, w * config.factor))


def difference(ours, theirs):
    assert ours.shape == theirs.shape and theirs.abs().max() > 0
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def same(ours, theirs, tolerance=1e-5):
    """Whether all residuals, each by its own scale, are theirs; diffusers returns (skips, middle)."""
    skips, middle = theirs
    for mine, wanted in zip(ours, [*skips, middle], strict=True):
        assert difference(mine, wanted) <= tolerance


# --- parity -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("h, w", [(8, 8), (7, 5), (3, 16)])
@pytest.mark.parametrize("name", CONFIGS)
def test_residuals_are_those_of_diffusers(name, h, w):
    ours, theirs = pair(name)
    x, context, hint = inputs(name, h, w)
    t = torch.tensor([731.0, 12.0])
    same(ours(x, t, context, hint), theirs(x, t, context, hint, return_dict=False))


@pytest.mark.parametrize("scale", [1.0, 0.35, 0.0, -2.0])
@pytest.mark.parametrize("guess", [False, True])
def test_conditioning_scale_and_guess_mode_equal_diffusers(scale, guess):
    ours, theirs = pair("sd1_small")
    x, context, hint = inputs("sd1_small")
    mine = ours(x, 400, context, hint, conditioning_scale=scale, guess_mode=guess)
    wanted = theirs(x, 400, context, hint, scale, guess_mode=guess, return_dict=False)
    if scale:
        same(mine, wanted)
    else:
        assert all(not residual.any() for residual in mine)


def test_guess_scales_rise_from_a_tenth_to_one_and_are_nearly_those_of_the_paper():
    scales = guess_scales(13)
    torch.testing.assert_close(torch.tensor(scales), torch.logspace(-1, 0, 13))
    assert max(abs(0.825 ** (12 - i) / scale - 1) for i, scale in enumerate(scales)) < 0.006
    assert guess_scales(2) == [0.1, 1]


@pytest.mark.parametrize("name", ["tiny", "sd2_small"])
def test_a_controlled_unet_is_that_of_diffusers(name):
    (ours, theirs), (unet, reference) = pair(name), bases(name)
    x, context, hint = inputs(name, 5, 7)
    skips, middle = theirs(x, 300, context, hint, return_dict=False)
    wanted = reference(x, 300, context, down_block_additional_residuals=skips, mid_block_additional_residual=middle)
    made = add_control(unet, [Control(ours, hint)])(x, 300, context)
    assert difference(made, wanted.sample) <= 1e-5
    assert difference(unet(x, 300, context), wanted.sample) > 1e-2          # the control has an effect
    assert torch.equal(made, unet(x, 300, context, ours(x, 300, context, hint)))


def test_two_controls_add_up_as_in_diffusers():
    nets = [pair("tiny"), pair("tiny", seed=1)]
    unet, reference = bases("tiny")
    x, context, hint = inputs()
    hints, scales = [hint, torch.rand_like(hint)], [0.7, 1.3]
    skips, middle = MultiControlNetModel([theirs for _, theirs in nets])(
        x, torch.tensor(200), context, hints, scales, return_dict=False)
    wanted = reference(x, 200, context, down_block_additional_residuals=skips, mid_block_additional_residual=middle)
    controls = [Control(ours, one, scale) for (ours, _), one, scale in zip(nets, hints, scales, strict=True)]
    assert difference(add_control(unet, controls)(x, 200, context), wanted.sample) <= 1e-5
    assert difference(add_control(unet, controls[::-1])(x, 200, context), wanted.sample) <= 1e-5
    assert difference(add_control(unet, controls[:1])(x, 200, context), wanted.sample) > 1e-3


def run_of_diffusers(controls, guidance, x, context, uncond, steps=5):
    """The latent after a run of their pipeline; controls are pairs of (their net, our Control)."""
    vae = AutoencoderKL.from_config(through_json(configs.vae_to_dict(PRESETS["tiny"].vae, 16)))
    scheduler = diffusers.DDIMScheduler.from_config(configs.noise_to_dict(NoiseConfig()) | {
        "_class_name": "DDIMScheduler"})
    nets = [net for net, _ in controls]
    pipeline = StableDiffusionControlNetPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=bases("tiny")[1], scheduler=scheduler, safety_checker=None,
        controlnet=nets if len(nets) > 1 else nets[0], feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)

    def each(what):
        values = [getattr(control, what) for _, control in controls]
        return values if len(nets) > 1 else values[0]
    return pipeline(
        image=each("hint"), latents=x, prompt_embeds=context, negative_prompt_embeds=uncond, guidance_scale=guidance,
        num_inference_steps=steps, controlnet_conditioning_scale=each("conditioning_scale"), output_type="latent",
        control_guidance_start=each("start"), control_guidance_end=each("end"),
        guess_mode=controls[0][1].guess_mode, height=2 * x.shape[2], width=2 * x.shape[3]).images


def our_run(controls, guidance, x, context, uncond, steps=5):
    grid = make_timesteps(SCHEDULE, steps)
    unet = add_control(bases("tiny")[0], [control for _, control in controls], grid=grid, batch=len(x))
    denoise = predict_x0(unet, SCHEDULE, context, uncond, guidance_scale=guidance)
    *_, last = ddim(denoise, x, grid, SCHEDULE)
    return last.x


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("guidance, spans", [
    (7.5, [(0.0, 1.0)]), (1.0, [(0.0, 1.0)]), (4.0, [(0.2, 0.61)]), (4.0, [(0.0, 0.4)]), (3.0, [(0.5, 1.0)]),
    (4.0, [(0.45, 0.55)]), (4.0, [(0.0, 0.6), (0.4, 1.0)]),
])
def test_a_guided_run_is_that_of_the_pipeline_of_diffusers(guidance, spans, guess):
    x, context, hint = inputs(h=6, w=8)
    uncond, hints = torch.randn_like(context), [hint, hint.flip(3)]
    controls = [(pair("tiny", seed)[1], Control(pair("tiny", seed)[0], hints[seed], 0.8, *span, guess))
                for seed, span in enumerate(spans)]
    wanted = run_of_diffusers(controls, guidance, x, context, uncond)
    assert difference(our_run(controls, guidance, x, context, uncond), wanted) <= 1e-5
    if spans != [(0.45, 0.55)]:         # no step of five lies within it
        assert difference(our_run([], guidance, x, context, uncond), wanted) > 1e-3


# --- the shape --------------------------------------------------------------------------------------

def test_every_key_and_shape_of_the_full_size_controlnet():
    with torch.device("meta"):
        net = ControlNet(ControlNetConfig())
    assert {key: list(tensor.shape) for key, tensor in net.state_dict().items()} == dict(KEYS["controlnet"])
    assert len(net.state_dict()) == 340
    assert sum(p.numel() for p in net.parameters()) == 361_279_120


def test_the_hint_encoder_reduces_pixels_to_the_latents_cells():
    assert [CONFIGS[name].factor for name in CONFIGS] == [2, 8, 8, 2]
    net, _ = pair("sd1_small")
    assert net.encode_hint(torch.rand(1, 3, 24, 40)).shape == (1, 32, 3, 5)
    with pytest.raises(ValueError, match="hint_widths is empty"):
        ControlNetConfig(hint_widths=())


# --- a fresh one ------------------------------------------------------------------------------------

@pytest.mark.parametrize("guess", [False, True])
@pytest.mark.parametrize("name", ["tiny", "sd2_small"])
def test_an_untrained_controlnet_changes_no_bit(name, guess):
    unet, _ = bases(name)
    config = CONFIGS[name]
    net = ControlNet.from_unet(unet, hint_channels=config.hint_channels, hint_widths=config.hint_widths)
    x, context, hint = inputs(name)
    assert torch.equal(unet(x, 300, context, net(x, 300, context, hint, guess_mode=guess)), unet(x, 300, context))
    run = add_control(unet, [Control(net, hint, 2.0, guess_mode=guess)], batch=2)
    assert torch.equal(run(x, 300, context), unet(x, 300, context))
    # Nor does its hint change what its own encoder sees.
    assert not net.encode_hint(hint).any()


def test_from_unet_copies_the_encoder_and_shares_nothing():
    unet, _ = bases("tiny")
    net = ControlNet.from_unet(unet, hint_widths=(4, 8))
    theirs, mine = unet.state_dict(), net.state_dict()
    copied = [key for key in mine if not key.startswith("controlnet_")]
    assert len(copied) > 30 and all(torch.equal(mine[key], theirs[key]) for key in copied)
    assert all(mine[key].data_ptr() != theirs[key].data_ptr() for key in copied)
    assert {key.split(".")[0] for key in copied} == {"conv_in", "time_embedding", "down_blocks", "mid_block"}


def test_from_unet_is_that_of_diffusers():
    unet, reference = bases("sd1_small")
    ours = ControlNet.from_unet(unet, hint_widths=(4, 8, 12, 16))
    theirs = ControlNetModel.from_unet(reference, conditioning_embedding_out_channels=(4, 8, 12, 16)).state_dict()
    mine = ours.state_dict()
    assert {key: tensor.shape for key, tensor in mine.items()} == {key: t.shape for key, t in theirs.items()}
    assert all(torch.equal(mine[key], theirs[key]) for key in mine if "cond_embedding" not in key)


def test_from_an_inpainting_unet_the_latents_four_channels_are_copied():
    unet = UNet(replace(PRESETS["tiny"].unet, in_channels=9))
    randomise(unet, torch.Generator().manual_seed(3))
    net = ControlNet.from_unet(unet, hint_widths=(4, 8))
    assert net.config.in_channels == 4
    assert torch.equal(net.conv_in.weight, unet.conv_in.weight[:, :4])
    x, context, hint = inputs()
    assert len(net(x, 300, context, hint)) == len(unet.feature_channels)


def test_from_unet_preserves_the_dtype():
    unet, _ = bases("tiny")
    half = UNet(unet.config).to(torch.bfloat16)
    net = ControlNet.from_unet(half, hint_widths=(4, 8))
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    x, context, hint = (each.bfloat16() for each in inputs())
    assert {residual.dtype for residual in net(x, 300, context, hint)} == {torch.bfloat16}


def gradients(net, unet, x, context, hint):
    """The gradient's largest size for each tensor of the ControlNet, with the U-Net frozen."""
    net.zero_grad()
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    (unet(x, 300, context, net(x, 300, context, hint)) - target).square().mean().backward()
    return {name: p.grad.abs().max().item() for name, p in net.named_parameters()}


@pytest.mark.parametrize("size", [0.0, 1.0])
def test_gradients_of_a_1x1_convolution_are_autograds(size):
    generator = torch.Generator().manual_seed(0)
    x, grad_output = (torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    conv = torch.nn.Conv2d(5, 5, 1, dtype=torch.float64)
    with torch.no_grad():
        conv.weight *= size
    y = conv(x.requires_grad_())
    expected = torch.autograd.grad(y, (conv.weight, conv.bias, x), grad_output)
    found = zero_conv_gradients(conv.weight.detach()[:, :, 0, 0], x.detach(), grad_output)
    for ours, theirs in zip(found, (expected[0][:, :, 0, 0], *expected[1:]), strict=True):
        assert torch.allclose(ours, theirs)
    assert (found[2].abs().max() == 0) == (size == 0)


def test_zero_convolutions_learn_at_the_first_step_and_the_copy_at_the_second():
    unet, _ = bases("tiny")
    net = ControlNet.from_unet(unet, hint_widths=(4, 8))
    data = inputs()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def split(sizes):
        zero = {name: size for name, size in sizes.items() if name.startswith(("controlnet_down", "controlnet_mid"))}
        hint = {name: size for name, size in sizes.items() if "cond_embedding" in name}
        return zero, hint, {name: size for name, size in sizes.items() if name not in zero | hint}

    zero, hint, copy = split(gradients(net, unet, *data))
    assert len(zero) == 2 * 5 and min(zero.values()) > 0
    assert set(copy.values()) == set(hint.values()) == {0.0}            # exactly
    optimizer.step()
    zero, hint, copy = split(gradients(net, unet, *data))
    assert min(zero.values()) > 0 and min(copy.values()) > 0
    # The hint's network ends in a zero convolution of its own: it comes alive from the end, one step at a time.
    assert {name for name, size in hint.items() if size > 0} == {
        "controlnet_cond_embedding.conv_out.weight", "controlnet_cond_embedding.conv_out.bias"}
    optimizer.step()
    _, hint, _ = split(gradients(net, unet, *data))
    assert min(hint.values()) > 0


def test_an_untrained_controlnet_learns_to_follow_its_hint():
    """The output is to follow the hint: after some steps it does, and with the hint inverted it does not."""
    unet, _ = bases("tiny")
    net = ControlNet.from_unet(unet, hint_widths=(4, 8))
    x, context, _ = inputs(batch=8)
    cells = (torch.rand(8, 1, 8, 6) > 0.5).float()
    hint = cells.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat(1, 3, 1, 1)
    plain = unet(x, 300, context)
    wanted = plain + cells
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(120):
        loss = (unet(x, 300, context, net(x, 300, context, hint)) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        inverted = (unet(x, 300, context, net(x, 300, context, 1 - hint)) - wanted).square().mean().item()
    assert losses[-1] < 0.3 * losses[0]
    assert inverted > 3 * losses[-1]


# --- in a run ---------------------------------------------------------------------------------------

class Counted(ControlNet):
    """A ControlNet that counts its calls."""

    def __init__(self, config):
        super().__init__(config)
        self.hints, self.batches = 0, []

    def encode_hint(self, hint):
        self.hints += 1
        return super().encode_hint(hint)

    def residuals(self, x, t, context, encoded, **options):
        self.batches.append((t, len(x)))
        return super().residuals(x, t, context, encoded, **options)


def counted():
    net = Counted(CONFIGS["tiny"])
    randomise(net, torch.Generator().manual_seed(2))
    return net.requires_grad_(False)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_hint_is_encoded_once_for_a_run(sampler):
    net = counted()
    x, context, hint = inputs(hints=1)
    grid = make_timesteps(SCHEDULE, 3)
    unet = add_control(bases("tiny")[0], [Control(net, hint)], grid=grid)
    denoise = predict_x0(unet, SCHEDULE, context, context * 0, guidance_scale=3.0)
    *_, last = SAMPLERS[sampler](denoise, x, grid, SCHEDULE)
    assert net.hints == 1 and len(net.batches) >= 3 and last.x.isfinite().all()
    assert {size for _, size in net.batches} == {4}                             # [u; c] of two images


def test_outside_of_its_interval_a_control_is_not_run_and_changes_no_bit():
    net, unet = counted(), bases("tiny")[0]
    x, context, hint = inputs()
    grid = make_timesteps(SCHEDULE, 10)
    run = add_control(unet, [Control(net, hint, start=0.3, end=0.7)], grid=grid)
    for t, _ in grid:
        assert torch.equal(run(x, t, context), unet(x, t, context)) == (not 300 < t < 700)
    assert [t for t, _ in net.batches] == [t for t, _ in grid[3:7]]


def test_in_guess_mode_only_the_half_with_the_prompt_is_controlled():
    net, unet = counted(), bases("tiny")[0]
    x, context, hint = inputs()
    run = add_control(unet, [Control(net, hint, guess_mode=True)], batch=2)
    both = run(torch.cat([x, x]), 300, torch.cat([0 * context, context]))
    assert net.batches == [(300, 2)]
    assert difference(both[:2], unet(x, 300, 0 * context)) < 1e-5
    residuals = net(x, 300, context, hint, guess_mode=True)
    assert difference(both[2:], unet(x, 300, context, residuals)) < 1e-5
    # Where guidance runs the conditional half alone, it is controlled.
    assert difference(run(x, 300, context), unet(x, 300, context, residuals)) < 1e-5


def test_one_hint_applies_to_all_images_and_several_to_one_each():
    net, unet = pair("tiny")[0], bases("tiny")[0]
    x, context, hint = inputs(batch=3)
    one = add_control(unet, [Control(net, hint[:1])])
    each = add_control(unet, [Control(net, hint[:1].repeat(3, 1, 1, 1))])
    assert difference(one(x, 300, context), each(x, 300, context)) < 1e-5
    # In [u; c] hint i belongs to images i and 3 + i.
    twice = add_control(unet, [Control(net, hint)])(torch.cat([x, x]), 300, torch.cat([context, context]))
    for i in range(3):
        alone = add_control(unet, [Control(net, hint[i:i + 1])])(x[i:i + 1], 300, context[i:i + 1])
        assert difference(twice[i:i + 1], alone) < 1e-5 and difference(twice[3 + i:4 + i], alone) < 1e-5


def test_an_inpainting_unet_can_be_controlled():
    unet = UNet(replace(PRESETS["tiny"].unet, in_channels=9)).requires_grad_(False)
    randomise(unet, torch.Generator().manual_seed(3))
    net, _ = pair("tiny")
    x, context, hint = inputs()
    mask, masked = (torch.rand(2, 1, 8, 6) > 0.5).float(), torch.randn(2, 4, 8, 6)
    run = add_control(nine_channels(unet, mask, masked), [Control(net, hint)])
    wanted = unet(torch.cat([x, mask, masked], 1), 300, context, net(x, 300, context, hint))
    assert torch.equal(run(x, 300, context), wanted)
    guided = predict_x0(run, SCHEDULE, context, 0 * context, guidance_scale=3.0)(x, 300)
    assert guided.shape == x.shape and guided.isfinite().all()


def test_arguments_are_not_modified():
    x, context, hint = inputs()
    copies = [each.clone() for each in (x, context, hint)]
    add_control(bases("tiny")[0], [Control(pair("tiny")[0], hint, 0.5)])(x, 300, context)
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, context, hint), strict=True))


# --- what cannot be ---------------------------------------------------------------------------------

@pytest.mark.parametrize("options, words", [
    ({"conditioning_scale": math.nan}, "the conditioning scale is nan: give a finite number"),
    ({"conditioning_scale": math.inf}, "the conditioning scale is inf"),
    ({"start": 0.5, "end": 0.5}, "starts at 0.5 and ends at 0.5: give shares"),
    ({"start": 0.8, "end": 0.2}, "starts at 0.8 and ends at 0.2"),
    ({"start": -0.1}, "starts at -0.1"),
    ({"end": 1.1}, "ends at 1.1"),
    ({"start": math.nan}, "starts at nan"),
    ({"hint": torch.rand(1, 3, 16, 12) * 2 - 1}, r"values outside of \[0, 1\]: bring pixels in \[-1, 1\] there"),
    ({"hint": torch.full((1, 3, 16, 12), math.nan)}, r"values outside of \[0, 1\]"),
    ({"hint": torch.zeros(1, 3, 16, 12, dtype=torch.uint8)}, "the hint is torch.uint8"),
    ({"hint": torch.zeros(1, 4, 16, 12)}, r"\(1, 4, 16, 12\), but this ControlNet reads .* \(batch, 3, "),
    ({"hint": torch.zeros(3, 16, 12)}, r"\(3, 16, 12\), but this ControlNet reads"),
    ({"hint": torch.zeros(1, 3, 15, 12)}, "the hint is 15 x 12 pixels .* multiples of 2"),
])
def test_invalid_controls_raise_one_sentence(options, words):
    net, _ = pair("tiny")
    with pytest.raises(ValueError, match=words) as error:
        Control(**{"net": net, "hint": torch.zeros(1, 3, 16, 12), **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cells, words", [
    ((8, 8), "the hint is 16 x 12 pixels .* but a latent of 8 x 8 needs one of 16 x 16, .* resize the hint"),
    ((4, 3), "the hint is 16 x 12 pixels .* a latent of 4 x 3 needs one of 8 x 6"),
])
def test_a_hint_of_another_size_raises_with_both_sizes(cells, words):
    net, _ = pair("tiny")
    x, context, _ = inputs(h=cells[0], w=cells[1])
    hint = torch.rand(2, 3, 16, 12)
    with pytest.raises(ValueError, match=words):
        net(x, 300, context, hint)
    with pytest.raises(ValueError, match=words):
        add_control(bases("tiny")[0], [Control(net, hint)])(x, 300, context)


def test_hints_for_another_number_of_latents_raise():
    net, _ = pair("tiny")
    x, context, hint = inputs(batch=3, hints=2)
    with pytest.raises(ValueError, match="2 hints do not go with 3 latents"):
        net(x, 300, context, hint)


@pytest.mark.parametrize("change, words", [
    ({"context_dim": 24}, "reads text 24 wide, but the U-Net reads text 16 wide"),
    ({"in_channels": 9}, "reads latents of 9 channels, but the U-Net reads latents of 4 channels"),
    ({"channels": (8, 24)}, r"has feature maps of \(8, 24\) channels, but the U-Net has .*\(8, 16\)"),
    ({"layers_per_block": 2}, "has 2 ResBlocks in a level, but the U-Net has 1"),
])
def test_a_controlnet_of_another_version_raises(change, words):
    config = replace(CONFIGS["tiny"], unet=replace(CONFIGS["tiny"].unet, **change))
    net = ControlNet(config)
    with pytest.raises(ValueError, match=f"the ControlNet {words}") as error:
        add_control(bases("tiny")[0], [Control(net, torch.zeros(1, 3, 16, 12))])
    assert "\n" not in str(error.value)
    check_version(CONFIGS["tiny"].unet, replace(CONFIGS["tiny"].unet, in_channels=9))   # serves an inpainting U-Net


def test_a_missing_grid_or_batch_raises():
    net, unet, hint = pair("tiny")[0], bases("tiny")[0], torch.zeros(1, 3, 16, 12)
    with pytest.raises(ValueError, match="needs the grid"):
        add_control(unet, [Control(net, hint, end=0.5)])
    with pytest.raises(ValueError, match="how many images"):
        add_control(unet, [Control(net, hint, guess_mode=True)])
    with pytest.raises(ValueError, match="one text for each latent"):
        add_control(unet, [Control(net, hint)])(torch.randn(2, 4, 8, 6), 300, torch.randn(1, 7, 16))


# --- folders ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*CONFIGS, *PRESETS])
def test_configs_survive_the_way_to_json_and_back(name):
    config = CONFIGS.get(name) or ControlNetConfig(replace(PRESETS[name].unet, in_channels=4))
    assert configs.controlnet_from_dict(through_json(configs.controlnet_to_dict(config))) == config


def test_published_configs_of_controlnets_are_read():
    """The values published with the ControlNets of SD 1.5 and SD 2.1; keys they left out take defaults."""
    values = {"_class_name": "ControlNetModel", "act_fn": "silu", "attention_head_dim": 8,
              "block_out_channels": [320, 640, 1280, 1280], "class_embed_type": None,
              "conditioning_embedding_out_channels": [16, 32, 96, 256],
              "controlnet_conditioning_channel_order": "rgb", "cross_attention_dim": 768,
              "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
              "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
              "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "num_class_embeds": None,
              "only_cross_attention": False, "resnet_time_scale_shift": "default",
              "upcast_attention": False, "use_linear_projection": False}
    assert configs.controlnet_from_dict(values) == ControlNetConfig(PRESETS["sd15"].unet)
    newer = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
    assert configs.controlnet_from_dict(values | newer) == ControlNetConfig(PRESETS["sd21"].unet)


@pytest.mark.parametrize("key, value", [
    ("_class_name", "UNet2DConditionModel"), ("controlnet_conditioning_channel_order", "bgr"),
    ("global_pool_conditions", True), ("act_fn", "gelu"), ("addition_embed_type", "text_time"),
    ("transformer_layers_per_block", [1, 2]), ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"]),
])
def test_unsupported_options_of_a_config_raise_by_name(key, value):
    values = configs.controlnet_to_dict(CONFIGS["tiny"])
    with pytest.raises(CheckpointError, match=key):
        configs.controlnet_from_dict(values | {key: value})


@pytest.fixture
def folder(tmp_path):
    return save_controlnet(tmp_path / "control", pair("tiny")[0])


@pytest.mark.parametrize("name", ["tiny", "sd1_small", "sd2_small"])
def test_diffusers_opens_saved_controlnets(name, tmp_path):
    ours, _ = pair(name)
    theirs, info = ControlNetModel.from_pretrained(save_controlnet(tmp_path / name, ours), output_loading_info=True)
    assert not any(info.values()), info
    x, context, hint = inputs(name)
    same(ours(x, 300, context, hint), theirs(x, 300, context, hint, return_dict=False))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("name", ["tiny", "sd1_small", "sd2_small"])
def test_controlnets_saved_by_diffusers_are_opened(name, variant, tmp_path):
    ours, theirs = pair(name)
    saved = ControlNetModel.from_config(theirs.config)
    saved.load_state_dict(theirs.state_dict())
    saved.to(torch.float16 if variant else torch.float32).save_pretrained(tmp_path, variant=variant)
    assert (tmp_path / (HALF if variant else FILE)).is_file()
    again = load_controlnet_folder(tmp_path)
    assert again.control_config == CONFIGS[name] and not again.training
    for key, tensor in again.state_dict().items():
        wanted = ours.state_dict()[key]
        assert torch.equal(tensor, wanted.half().float() if variant else wanted), key


def test_saving_and_loading_preserves_every_bit(folder):
    ours, again = pair("tiny")[0].state_dict(), load_controlnet_folder(folder).state_dict()
    assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)
    half = load_controlnet_folder(save_controlnet(folder, pair("tiny")[0], dtype=torch.float16), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}


def test_saving_removes_an_earlier_half_precision_file(folder):
    shutil.copy(folder / FILE, folder / HALF)
    (folder / "README.md").write_text("card")
    save_controlnet(folder, pair("tiny", 1)[0])
    assert not (folder / HALF).exists() and (folder / "README.md").exists()


@pytest.mark.parametrize("damage, words", [
    (lambda folder: (folder / "config.json").unlink(), "is not the folder of a ControlNet: it has no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json is not a JSON file"),
    (lambda folder: (folder / "config.json").write_text("{}"), "config.json has no 'down_block_types'"),
    (lambda folder: (folder / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}'),
     "config.json cannot be read: _class_name is 'UNet2DConditionModel', but only 'ControlNetModel'"),
    (lambda folder: (folder / FILE).unlink(), f"{FILE} is missing"),
    (lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-9]), f"{FILE} is truncated"),
])
def test_a_damaged_folder_raises_one_sentence(folder, damage, words):
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as error:
        load_controlnet_folder(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_tensors_of_another_controlnet_raise(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"cross_attention_dim": 24}))
    with pytest.raises(TensorMismatch, match="of another shape"):
        load_controlnet_folder(folder)


def test_a_control_is_loaded_from_a_folder_a_file_or_the_hub(folder, tmp_path, monkeypatch):
    wanted = pair("sd1_small")[0].state_dict()
    save_controlnet(folder, pair("sd1_small")[0])
    asked = []

    def download(repo, *, revision, file):
        asked.append((repo, revision, file))
        return folder / file

    monkeypatch.setattr(source, "download", download)
    for net in (load_controlnet(folder), load_controlnet("someone/control", revision="v2")):
        assert all(torch.equal(net.state_dict()[name], wanted[name]) for name in wanted)
    assert asked == [("someone/control", "v2", "config.json"), ("someone/control", "v2", FILE)]
    with pytest.raises(CheckpointError, match="there is no file or folder none"):
        load_controlnet("none")
    (tmp_path / "net.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="net.safetensors"):       # read as a single file
        load_controlnet(tmp_path / "net.safetensors")
