"""Classifier-free guidance: the formula, one batch for both halves, rescale, interval, negative prompts."""

import math

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st

from sdlearn.config import PRESETS, NoiseConfig
from sdlearn.guidance import (
    check_guidance,
    classifier_free_guidance,
    composed_guidance,
    count_nfe,
    guidance_scale_at,
    predict_uncond_cond,
    predict_uncond_cond_shared,
    predict_x0,
    rescale_guidance,
)
from sdlearn.samplers import ddim
from sdlearn.schedule import NoiseSchedule, make_timesteps
from sdlearn.unet import UNet

SCHEDULE = NoiseSchedule(NoiseConfig())
X = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(1))
CONTEXT = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(2))
UNCOND = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(3))


class Network:
    """In the place of a U-Net: listens to x, t and the text, and keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, context):
        self.calls.append((x, t, context))
        heard = context.mean(dim=1)[:, :4, None, None]
        return torch.tanh(x * heard + math.sin(t / 100)) + heard


def x0_of(output, t=500):
    return SCHEDULE.to_x0(output, X, t)


def test_scale_1_is_the_conditional_network_alone():
    network = Network()
    made = predict_x0(network, SCHEDULE, CONTEXT, UNCOND, guidance_scale=1.0)(X, 500)
    assert torch.equal(made, x0_of(Network()(X, 500, CONTEXT)))
    (x, t, context), = network.calls
    assert torch.equal(x, X) and t == 500 and torch.equal(context, CONTEXT)
    assert torch.equal(made, predict_x0(Network(), SCHEDULE, CONTEXT)(X, 500))      # and needs no uncond


def test_scale_0_is_the_unconditional_network_alone():
    network = Network()
    made = predict_x0(network, SCHEDULE, CONTEXT, UNCOND, guidance_scale=0.0)(X, 500)
    assert torch.equal(made, x0_of(Network()(X, 500, UNCOND)))
    assert len(network.calls) == 1 and network.calls[0][0].shape == X.shape


@pytest.mark.parametrize("scale", [7.5, 0.5, -1.0, 1.0001])
def test_other_scales_run_both_halves_as_one_batch(scale):
    network = Network()
    made = predict_x0(network, SCHEDULE, CONTEXT, UNCOND, guidance_scale=scale)(X, 500)
    (x, t, context), = network.calls
    assert torch.equal(x, torch.cat([X, X])) and t == 500
    assert torch.equal(context, torch.cat([UNCOND, CONTEXT]))                       # [u; c]
    u, c = Network()(X, 500, UNCOND), Network()(X, 500, CONTEXT)
    torch.testing.assert_close(made, x0_of(u + scale * (c - u)), rtol=1e-5, atol=1e-5)


@given(st.floats(-20, 20))
def test_guidance_is_a_line_through_both(scale):
    u, c = X.double(), X.flip(0).double()
    assert torch.equal(classifier_free_guidance(u, c, 0.0), u)
    torch.testing.assert_close(classifier_free_guidance(u, c, 1.0), c)
    torch.testing.assert_close(classifier_free_guidance(u, c, scale) - u, scale * (c - u))
    torch.testing.assert_close(classifier_free_guidance(u, u, scale), u)        # no effect of the prompt, no change


def test_a_negative_prompt_takes_the_place_of_the_empty_one():
    """The stronger the guidance, the further from what the negative prompt says."""
    def network(x, t, context):
        return context.mean(dim=1)[:, :4, None, None].expand_as(x)
    noise = {scale: SCHEDULE.to_noise(predict_x0(network, SCHEDULE, CONTEXT, UNCOND, guidance_scale=scale)(X, 500),
                                      X, 500, "sample") for scale in (1.0, 3.0, 7.5)}
    negative = network(X, 500, UNCOND)
    away = [(noise[scale] - negative).norm().item() for scale in (1.0, 3.0, 7.5)]
    assert away == pytest.approx([away[0], 3 * away[0], 7.5 * away[0]], rel=1e-4)


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_a_negative_prompt_is_a_push_of_its_own_tied_to_the_scale(scale, away):
    u, c, n = (X.double().roll(i, 0) + i for i in range(3))
    torch.testing.assert_close(composed_guidance(u, c, n, scale, 0.0), classifier_free_guidance(u, c, scale))
    torch.testing.assert_close(composed_guidance(u, c, n, scale, scale - 1), classifier_free_guidance(n, c, scale))
    push = composed_guidance(u, c, n, scale, away) - classifier_free_guidance(u, c, scale)
    torch.testing.assert_close(push, -away * (n - u))


@pytest.mark.parametrize("interval, t, expected", [
    (None, 0, 5.0), ((200, 800), 200, 5.0), ((200, 800), 800, 5.0), ((200, 800), 199.5, 1.0), ((200, 800), 801, 1.0)])
def test_the_scale_holds_within_the_interval_and_is_1_elsewhere(interval, t, expected):
    assert guidance_scale_at(t, 5.0, interval) == expected


def test_both_halves_are_one_run_on_twice_the_batch():
    network = Network()
    u, c = predict_uncond_cond(network, X, 500, torch.cat([UNCOND, CONTEXT]))
    assert len(network.calls) == 1
    assert torch.equal(u, Network()(X, 500, UNCOND)) and torch.equal(c, Network()(X, 500, CONTEXT))


def test_one_negative_prompt_serves_the_whole_batch():
    both = predict_x0(Network(), SCHEDULE, CONTEXT, UNCOND[:1], guidance_scale=5.0)(X, 500)
    each = predict_x0(Network(), SCHEDULE, CONTEXT, UNCOND[:1].repeat(2, 1, 1), guidance_scale=5.0)(X, 500)
    assert torch.equal(both, each)


@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale_is_that_of_diffusers(phi):
    c, g = X, 3 * X.flip(0) + 1
    torch.testing.assert_close(rescale_guidance(g, c, phi), rescale_noise_cfg(g, c, phi), rtol=1e-5, atol=1e-6)


@given(st.floats(0.1, 20), st.integers(0, 1000))
def test_a_full_rescale_has_the_conditional_deviation(stretch, seed):
    c = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g = stretch * c.roll(1, 0) + 0.5
    dims = (1, 2, 3)
    torch.testing.assert_close(rescale_guidance(g, c, 1.0).std(dims), c.std(dims))
    assert torch.equal(rescale_guidance(g, c, 0.0), g)
    halfway = (g.std(dims) + c.std(dims)) / 2
    torch.testing.assert_close(rescale_guidance(g, c, 0.5).std(dims), halfway)


def test_an_output_of_zeros_is_not_rescaled_to_nan():
    zeros = torch.zeros_like(X)
    assert torch.equal(rescale_guidance(zeros, zeros, 0.7), zeros)      # a fresh U-Net's
    made = predict_x0(lambda x, t, context: 0 * x, SCHEDULE, CONTEXT, UNCOND, guidance_scale=7.5,
                      guidance_rescale=0.7)(X, 500)
    assert made.isfinite().all()


def test_rescale_comes_between_guidance_and_x0():
    u, c = Network()(X, 500, UNCOND), Network()(X, 500, CONTEXT)
    made = predict_x0(Network(), SCHEDULE, CONTEXT, UNCOND, guidance_scale=7.5,
                      guidance_rescale=0.7)(X, 500)
    expected = x0_of(rescale_guidance(classifier_free_guidance(u, c, 7.5), c, 0.7))
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("t, guides", [(999, False), (801, False), (800, True), (500.5, True), (200, True),
                                       (199.9, False), (0, False)])
def test_outside_of_the_interval_the_conditional_half_runs_alone(t, guides):
    network = Network()
    made = predict_x0(network, SCHEDULE, CONTEXT, UNCOND, guidance_scale=7.5, guidance_interval=(200, 800))(X, t)
    (x, _, context), = network.calls
    assert len(x) == len(context) == (4 if guides else 2)
    other = predict_x0(Network(), SCHEDULE, CONTEXT, UNCOND, guidance_scale=7.5 if guides else 1.0)(X, t)
    assert torch.equal(made, other)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_prediction_becomes_x0(prediction):
    schedule = NoiseSchedule(NoiseConfig(prediction_type=prediction))
    x0, noise = X, X.flip(0)
    x, output = schedule.add_noise(x0, noise, 300), schedule.target(x0, noise, 300)
    made = predict_x0(lambda x, t, context: output, schedule, CONTEXT)(x, 300)
    torch.testing.assert_close(made, x0, rtol=0, atol=1e-5)


def test_x_keeps_its_type_and_the_network_has_its_own():
    network = Network()
    made = predict_x0(network, SCHEDULE, CONTEXT.bfloat16(), UNCOND.bfloat16(), guidance_scale=7.5)(X, 500)
    assert made.dtype == torch.float32
    assert network.calls[0][0].dtype == network.calls[0][2].dtype == torch.bfloat16


def test_a_guided_run_is_that_of_diffusers():
    """Their loop, written as their pipeline has it: batch, chunk, guide the output, step."""
    theirs = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                     clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    theirs.set_timesteps(10)
    network, x, states = Network(), X, []
    for t in theirs.timesteps:
        u, c = network(torch.cat([x] * 2), float(t), torch.cat([UNCOND, CONTEXT])).chunk(2)
        output = rescale_noise_cfg(u + 7.5 * (c - u), c, 0.7)
        x = theirs.step(output, t, x).prev_sample
        states.append(x)
    denoise = predict_x0(Network(), SCHEDULE, CONTEXT, UNCOND, guidance_scale=7.5, guidance_rescale=0.7)
    for step, state in zip(ddim(denoise, X, make_timesteps(SCHEDULE, 10), SCHEDULE), states, strict=True):
        assert (step.x - state).abs().max() < 1e-5 * state.abs().max()


def test_the_real_network_gives_in_one_batch_what_it_gives_in_two():
    config = PRESETS["tiny"]
    unet = UNet(config.unet).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)               # a fresh one outputs zeros
    x = torch.randn(1, 4, 8, 8)
    context, uncond = torch.randn(2, 1, 5, config.text.dim)
    with torch.no_grad():
        made = predict_x0(unet, SCHEDULE, context, uncond, guidance_scale=4.0)(x, 700)
        u, c = unet(x, 700, uncond), unet(x, 700, context)
        assert not torch.allclose(u, c)
        torch.testing.assert_close(made, SCHEDULE.to_x0(u + 4 * (c - u), x, 700), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [4.0, 0.5])
def test_sharing_what_precedes_the_text_does_not_change_the_guided_output(scale):
    """The unconditional half comes first in both, for a batch as well."""
    config = PRESETS["tiny"]
    unet = UNet(config.unet).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 4, 8, 8)
    context, uncond = torch.randn(2, 2, 5, config.text.dim)
    with torch.no_grad():
        u, c = predict_uncond_cond_shared(unet, x, 700, torch.cat([uncond, context]))
        torch.testing.assert_close(u, unet(x, 700, uncond), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(c, unet(x, 700, context), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(u, c, rtol=1e-2, atol=1e-2)
        apart, shared = (predict_x0(unet, SCHEDULE, context, uncond, guidance_scale=scale, predict_pair=halves)(x, 700)
                         for halves in (predict_uncond_cond, predict_uncond_cond_shared))
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-4)


def test_nothing_given_is_changed():
    given = [X.clone(), CONTEXT.clone(), UNCOND.clone()]
    predict_x0(Network(), SCHEDULE, CONTEXT, UNCOND, guidance_scale=7.5,
                      guidance_rescale=0.7)(X, 500)
    assert all(torch.equal(a, b) for a, b in zip(given, (X, CONTEXT, UNCOND), strict=True))


@pytest.mark.parametrize("options, words", [
    ({"guidance_scale": math.nan}, "the guidance scale is nan: give a finite number"),
    ({"guidance_scale": math.inf}, "the guidance scale is inf: give a finite number"),
    ({"guidance_scale": -math.inf}, "the guidance scale is -inf: give a finite number"),
    ({"guidance_rescale": 1.5}, r"the guidance rescale is 1.5: give a number from 0 \(off\) to 1"),
    ({"guidance_rescale": -0.1}, "the guidance rescale is -0.1"),
    ({"guidance_rescale": math.nan}, "the guidance rescale is nan"),
    ({"guidance_interval": (800, 200)}, r"the guidance interval is \(800, 200\): .* the lower first"),
    ({"guidance_interval": (0, 1000)}, "the guidance interval is"),
    ({"guidance_interval": (math.nan, 10)}, "the guidance interval is"),
])
def test_bad_numbers_are_told_in_a_sentence_before_anything_runs(options, words):
    with pytest.raises(ValueError, match=words) as told:
        predict_x0(Network(), SCHEDULE, CONTEXT, UNCOND, **{"guidance_scale": 7.5, **options})
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=words):
        check_guidance(SCHEDULE, **{"guidance_scale": 7.5, **options})


@pytest.mark.parametrize("options", [{"guidance_scale": 0.0}, {"guidance_scale": -3.0}, {"guidance_rescale": 0.0},
                                     {"guidance_rescale": 1.0}, {"guidance_interval": (0, 999)},
                                     {"guidance_interval": (500, 500)}, {"guidance_interval": (999, 999)}])
def test_the_ends_of_each_range_are_accepted(options):
    check_guidance(SCHEDULE, **{"guidance_scale": 7.5, **options})
    made = predict_x0(Network(), SCHEDULE, CONTEXT, UNCOND, **{"guidance_scale": 7.5, **options})(X, 500)
    assert made.isfinite().all()


@pytest.mark.parametrize("uncond, words", [
    (None, "guidance scale 7.5 needs uncond"),
    (torch.zeros(2, 7, 5), r"uncond is \(2, 7, 5\) but context \(2, 7, 6\)"),
    (torch.zeros(3, 7, 6), r"uncond is \(3, 7, 6\) but context \(2, 7, 6\)"),
])
def test_a_missing_or_misshapen_uncond_is_told(uncond, words):
    with pytest.raises(ValueError, match=words):
        predict_x0(Network(), SCHEDULE, CONTEXT, uncond, guidance_scale=7.5)


@pytest.mark.parametrize("scale, interval", [(5.0, None), (5.0, (200, 700)), (1.0, None), (0.0, None),
                                             (0.0, (300, 400)), (-2.0, (0, 999))])
def test_passes_are_those_that_the_network_runs(scale, interval):
    network, grid = Network(), make_timesteps(SCHEDULE, 11)
    denoise = predict_x0(network, SCHEDULE, CONTEXT, UNCOND, guidance_scale=scale, guidance_interval=interval)
    for t, _ in grid:
        denoise(X, t)
    assert count_nfe([t for t, _ in grid], scale, interval) == sum(len(x) // len(X) for x, _, _ in network.calls)
