"""Sizes: levels as the U-Net makes them, buckets, attention and noise that fit a size, two passes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import one_thread, tiny_config, tiny_parts  # noqa: F401

from sdlearn.attention import CrossAttention, attention_map
from sdlearn.config import PRESETS, NoiseConfig
from sdlearn.diagnostics.attention import attention_scale, record_attention, scaled_attention
from sdlearn.diagnostics.costs import empty_unet
from sdlearn.pipeline import SettingsError, StableDiffusion, two_pass
from sdlearn.schedule import NoiseSchedule
from sdlearn.sizes import (
    fit_size,
    level_sizes,
    make_buckets,
    measure_spacing,
    nearest_bucket,
    shift_timestep,
    size_multiple,
)

SD, V = NoiseSchedule(NoiseConfig()), NoiseSchedule(NoiseConfig(prediction_type="v_prediction", zero_terminal_snr=True))


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(tiny_parts(config=tiny_config()))


# --- levels ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset, size", [("mini", (128, 128)), ("mini", (72, 200)), ("tiny", (18, 6)),
                                          ("sd15", (512, 768)), ("sd15", (520, 712))])
def test_levels_are_those_of_the_unet(preset, size):
    config = PRESETS[preset]
    found = level_sizes(size, config)
    unet, seen = empty_unet(config.unet), []
    for block in unet.down_blocks:
        block.resnets[0].register_forward_hook(lambda block, given, out: seen.append(tuple(out.shape[2:])))
    rows, columns = found[0]
    with torch.device("meta"), torch.no_grad():
        out = unet(torch.empty(1, 4, rows, columns), torch.empty(1), torch.empty(1, 77, config.unet.context_dim))
    assert found == seen and out.shape == (1, 4, size[1] // config.vae.factor, size[0] // config.vae.factor)


@pytest.mark.parametrize("size", [(100, 128), (128, 100), (0, 128), (128, -8), (4, 8)])
def test_a_size_without_a_latent_is_told(size):
    with pytest.raises(ValueError, match="multiples of 8"):
        level_sizes(size, PRESETS["mini"])


@pytest.mark.parametrize("preset", ["tiny", "mini", "sd15"])
def test_multiples_of_the_even_step_halve_without_a_rest(preset):
    config = PRESETS[preset]
    step = size_multiple(config)
    assert level_sizes((step, 3 * step), config)[-1] == (3, 1)
    assert level_sizes((step, step), config)[0][0] == 2 ** (len(config.unet.channels) - 1)
    assert size_multiple(PRESETS["sd15"]) == 64 and size_multiple(PRESETS["mini"]) == 32


# --- buckets --------------------------------------------------------------------------------------------

def test_a_size_is_fitted():
    assert fit_size((256, 128), 128, 32) == (192, 96) and fit_size((256, 256), 128, 32) == (128, 128)
    assert fit_size((128, 256), 128, 8) == (88, 184) and fit_size((2000, 10), 128, 32)[1] == 32
    assert fit_size((10, 2000), 128, 32)[0] == 32


def test_buckets_are_those_of_sdxl():
    """A few of the sizes in the paper's list, and no size that is not there."""
    found = make_buckets(1024, 64)
    assert {(512, 2048), (576, 1792), (704, 1472), (832, 1216), (1024, 1024), (1216, 832), (2048, 512)} <= set(found)
    assert len(found) == len({width for width, _ in found}) == 25


@given(st.sampled_from([64, 128, 512]), st.sampled_from([16, 32]), st.sampled_from([1.0, 1.5, 2.0]))
def test_buckets_have_nearly_the_area(side, step, stretch):
    found = make_buckets(side, step, stretch)
    assert (side, side) in found
    for width, height in found:
        assert width % step == height % step == 0
        assert side * side - width * step < width * height <= side * side
        assert side / stretch <= min(width, height) <= max(width, height) <= side * stretch


def test_the_nearest_bucket_is_so_by_ratio():
    sizes = [(128, 128), (256, 64), (64, 256)]
    assert nearest_bucket((300, 290), sizes) == (128, 128)
    assert nearest_bucket((1000, 499), sizes) == (256, 64)          # 2.004: just nearer to 4 than to 1
    assert nearest_bucket((499, 1000), sizes) == (64, 256)          # by difference it would be the square
    assert nearest_bucket((4, 2), sizes[1:] + sizes[:1]) == (256, 64)       # equally near: the first
    with pytest.raises(ValueError, match="no bucket"):
        nearest_bucket((1, 1), [])


# --- noise that fits ------------------------------------------------------------------------------------

@given(st.floats(0, 998), st.floats(0.3, 6))
def test_a_shifted_time_has_the_ratio_that_it_should(t, times):
    alpha, sigma = SD.at(t)
    other, noise = SD.at(shift_timestep(SD, t, times))
    wanted = min(max(times * sigma / alpha, SD.ve_sigmas[0].item()), SD.ve_sigmas[-1].item())
    assert noise / other == pytest.approx(wanted, rel=1e-6)


def test_shifts_undo_each_other_and_keep_the_ends():
    assert shift_timestep(SD, 500, 1) == pytest.approx(500) and shift_timestep(SD, 999, 2) == pytest.approx(999)
    assert shift_timestep(SD, shift_timestep(SD, 300, 2), 0.5) == pytest.approx(300)
    assert shift_timestep(V, 999, 0.5) == pytest.approx(999) and shift_timestep(SD, 0, 0.5) == 0
    with pytest.raises(ValueError, match="above 0"):
        shift_timestep(SD, 500, 0)


def test_means_of_cells_are_as_noisy_as_told():
    draw = torch.Generator().manual_seed(0)
    small, noise = torch.randn(64, 64, generator=draw), torch.randn(2, 256, 256, generator=draw, dtype=torch.float64)
    large = small.repeat_interleave(4, 0).repeat_interleave(4, 1)
    alpha, sigma = SD.at(shift_timestep(SD, 400, 4))
    pooled = torch.nn.functional.avg_pool2d((alpha * large + sigma * noise[0])[None, None], 4)[0, 0]
    rest = pooled / alpha - small
    alpha, sigma = SD.at(400)
    assert rest.std().item() == pytest.approx(sigma / alpha, rel=0.03)


# --- attention that fits --------------------------------------------------------------------------------

def test_the_scale_keeps_the_share_of_the_largest_entropy():
    """Exact for scores that are normally distributed, as their number grows."""
    draw, shares = torch.Generator().manual_seed(0), {}
    for n in (256, 65536):
        scores = 1.5 * torch.randn(200, n, generator=draw, dtype=torch.float64)
        for name, scale in (("plain", 1.0), ("scaled", attention_scale(n, 256))):
            weights = (scale * scores).softmax(dim=1)
            shares[name, n] = (-(weights * weights.log()).sum(1).mean() / math.log(n)).item()
    assert shares["scaled", 65536] == pytest.approx(shares["scaled", 256], abs=0.01)
    assert shares["plain", 65536] > shares["plain", 256] + 0.08


def test_scaled_attention_scales_self_attention_and_leaves_nothing_behind(model):
    unet, x = model.unet, torch.randn(1, 4, 16, 16)
    context = model.encode(["a red apple"])
    with torch.no_grad():
        before = unet(x, 500.0, context)
        with record_attention(unet) as plain:
            unet(x, 500.0, context)
        with scaled_attention(unet, area=4), record_attention(unet) as scaled:
            unet(x, 500.0, context)
        assert torch.equal(unet(x, 500.0, context), before)
        first = next(name for name in plain.maps if name.endswith("attn1"))
        layer = dict(unet.named_modules())[first]
        given = []
        hook = layer.register_forward_hook(lambda layer, inputs, out: given.append(inputs[0]))
        unet(x, 500.0, context)
        hook.remove()
        q, k = layer.to_q(given[0]), layer.to_k(given[0])
    tokens = q.shape[1]
    expected = attention_map(q * math.sqrt(math.log(tokens) / math.log(tokens / 4)), k, layer.heads)
    assert torch.allclose(scaled.maps[first], expected, atol=1e-6)
    assert not torch.allclose(plain.maps[first], expected, atol=1e-6)
    with scaled_attention(unet, area=4):
        hooked = {name for name, module in unet.named_modules() if module._forward_hooks}
    assert hooked == {f"{name}.to_q" for name in plain.maps if name.endswith("attn1")}


def test_native_size_changes_nothing_and_single_tokens_are_left_alone():
    layer = torch.nn.ModuleDict({"attn1": CrossAttention(8, heads=2)})
    x, one = torch.randn(1, 9, 8), torch.randn(1, 1, 8)
    with torch.no_grad(), scaled_attention(layer, area=1):
        assert torch.equal(layer["attn1"](x), layer["attn1"].forward(x))
    before = layer["attn1"](one)
    with scaled_attention(layer, area=4):
        assert torch.equal(layer["attn1"](one), before)
    for area, only in ((0, "attn1"), (4, "attn7")):
        with pytest.raises(ValueError, match="nothing to scale"), scaled_attention(layer, area, only):
            pass
    for tokens in ((1, 64), (64, 1)):
        with pytest.raises(ValueError, match="at least two"):
            attention_scale(*tokens)


def test_few_keys_per_training_key_leave_attention_unscaled():
    """Where training had fewer than two keys there is no entropy to preserve; from two on the scale applies."""
    layer = torch.nn.ModuleDict({"attn1": CrossAttention(8, heads=2)})
    for tokens, area, scaled in ((2, 4, False), (7, 4, False), (8, 4, True), (2, 0.5, True), (1, 0.25, False)):
        x = torch.randn(1, tokens, 8)
        with torch.no_grad():
            before = layer["attn1"](x)
            with scaled_attention(layer, area):
                after = layer["attn1"](x)
        assert torch.equal(after, before) is not scaled


# --- distances of objects -------------------------------------------------------------------------------

def test_the_distance_to_the_border_takes_width_for_columns_and_height_for_rows():
    """The nearest border of the one middle is, in turn, the left, right, upper and lower one."""
    size, own = (300, 100), 100
    for middle, distance in (((10, 50), 10), ((280, 50), 20), ((150, 30), 30), ((200, 95), 5)):
        x, y = middle
        assert measure_spacing([[(x - 4, y - 2, x + 4, y + 2)]], size, own)[0] == pytest.approx(distance / own)


# --- two passes -----------------------------------------------------------------------------------------

def test_two_passes_are_text2img_and_img2img(model):
    step, own = size_multiple(model.config), model.config.image_size
    settings = {"num_inference_steps": 4, "guidance_scale": 2.0, "seed": 3, "batch": 2}
    found = two_pass(model, "a red apple", (2 * own, own), "a cat", strength=0.5, **settings)
    first = model.text2img("a red apple", "a cat", size=fit_size((2 * own, own), own, step), **settings)
    large = [image.resize((2 * own, own), 3) for image in first]            # 3 is bicubic
    second = model.img2img("a red apple", large, "a cat", strength=0.5, **settings)
    assert [one.tobytes() for one in found] == [one.tobytes() for one in second]
    assert found[0].size == (2 * own, own)


def test_a_small_image_is_one_pass(model):
    found = two_pass(model, "a cat", 16, num_inference_steps=2)
    assert found[0].tobytes() == model.text2img("a cat", size=16, num_inference_steps=2)[0].tobytes()


@pytest.mark.parametrize("wide, high, passes", [(1, 1, 1), (2, 0.5, 1), (0.25, 4, 1), (1.25, 1, 2), (4, 0.5, 2)])
def test_the_area_decides_between_one_pass_and_two(model, monkeypatch, wide, high, passes):
    """That of the model's own images still takes one, in any shape."""
    own, called = model.config.image_size, []
    size = int(wide * own), int(high * own)
    one = model.text2img("a cat", size=size, num_inference_steps=2)
    img2img = model.img2img
    monkeypatch.setattr(model, "img2img", lambda *args, **given: called.append(args) or img2img(*args, **given))
    found = two_pass(model, "a cat", size, num_inference_steps=2)
    assert len(called) == passes - 1 and found[0].size == size
    assert (found[0].tobytes() == one[0].tobytes()) == (passes == 1)


def test_the_second_pass_runs_half_of_the_steps_by_default(model):
    size = 2 * model.config.image_size
    found, half, more = (two_pass(model, "a cat", size, num_inference_steps=4, **given)[0].tobytes()
                         for given in ({}, {"strength": 0.5}, {"strength": 0.75}))
    assert found == half != more


@pytest.mark.parametrize("size, settings, words", [(63, {}, "not a multiple"), (64, {"strength": 0}, "strength")])
def test_what_cannot_be_is_told(model, size, settings, words):
    with pytest.raises(SettingsError, match=words):
        two_pass(model, "a cat", size, **{"num_inference_steps": 2, **settings})
