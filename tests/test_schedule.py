"""The noise schedule: published numbers, the algebra of eps, v and x0, and the grids."""

import math
from dataclasses import replace

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdlearn.config import PRESETS, NoiseConfig
from sdlearn.schedule import (
    ALMOST_ZERO,
    PREDICTION_TYPES,
    TIMESTEP_SPACINGS,
    NoiseSchedule,
    betas,
    make_timesteps,
    seeded_noise,
)

# From inside diffusers, whose schedulers are not written for this version of NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SD = NoiseSchedule(NoiseConfig())
ZERO = NoiseSchedule(NoiseConfig(prediction_type="v_prediction", zero_terminal_snr=True))
SHAPE = (3, 4, 5, 2)


def normal(seed, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_stable_diffusions_published_numbers():
    assert SD.num_train_timesteps == 1000 and SD.alphas_cumprod.shape == (1000,)
    assert SD.alphas_cumprod.dtype == torch.float64
    assert SD.alphas_cumprod[0].item() == pytest.approx(0.99915, abs=5e-6)
    assert SD.alphas_cumprod[999].item() == pytest.approx(0.0046601, abs=5e-8)
    alpha, sigma = SD.alpha_sigma(torch.tensor([0, 999]))
    assert (sigma / alpha).tolist() == pytest.approx([0.029167, 14.6146], rel=2e-5)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_abar_is_that_of_diffusers(name, zero_terminal_snr):
    """Theirs is in float32; rescaled, it goes through betas and back, and loses more."""
    config = NoiseConfig(beta_schedule=name, prediction_type="sample", zero_terminal_snr=zero_terminal_snr)
    theirs = diffusers.DDIMScheduler(
        beta_start=config.beta_start, beta_end=config.beta_end, rescale_betas_zero_snr=zero_terminal_snr,
        beta_schedule={"cosine": "squaredcos_cap_v2"}.get(name, name))
    ours = NoiseSchedule(config).alphas_cumprod
    torch.testing.assert_close(ours, theirs.alphas_cumprod.double(), rtol=1e-4, atol=2e-6)
    assert (ours.diff() < 0).all()


def test_zero_terminal_snr_keeps_the_first_value_and_ends_at_nothing():
    assert ZERO.alphas_cumprod[0].item() == pytest.approx(SD.alphas_cumprod[0].item(), rel=1e-12)
    assert ZERO.alphas_cumprod[-1] == 0 and (ZERO.alphas_cumprod[:-1] > 0).all()
    assert ZERO.at(999) == (0.0, 1.0) and ZERO.at(999.0) == (0.0, 1.0)
    x0, noise = normal(1), normal(2)
    assert torch.equal(ZERO.add_noise(x0, noise, 999), noise)
    assert torch.equal(ZERO.target(x0, noise, 999), -x0)
    assert torch.equal(ZERO.to_x0(-x0, noise, 999), x0)


def test_a_floor_stands_in_for_abar_0_only():
    floored = NoiseSchedule(ZERO.config, floor=ALMOST_ZERO)
    assert floored.alphas_cumprod[-1] == 2.0**-24
    assert torch.equal(floored.alphas_cumprod[:-1], ZERO.alphas_cumprod[:-1])
    alpha, sigma = floored.at(999)
    assert sigma / alpha == pytest.approx(4096, rel=1e-7)
    assert torch.equal(NoiseSchedule(SD.config, floor=ALMOST_ZERO).alphas_cumprod, SD.alphas_cumprod)


@pytest.mark.parametrize("schedule", [SD, ZERO])
def test_signal_and_noise_share_the_variance(schedule):
    alpha, sigma = schedule.alpha_sigma(torch.linspace(0, 999, 5001, dtype=torch.float64))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-14)
    assert (alpha.diff() < 0).all() and (sigma.diff() > 0).all()


def test_a_whole_timestep_is_the_same_as_integer_float_and_tensor():
    for schedule in (SD, ZERO):
        for t in (0, 1, 500, 998, 999):
            assert schedule.at(t) == schedule.at(float(t))
            alpha, sigma = schedule.alpha_sigma(torch.tensor([t]))
            assert (alpha.item(), sigma.item()) == schedule.at(t)
            assert alpha.item() ** 2 == pytest.approx(schedule.alphas_cumprod[t].item(), rel=1e-14)
    assert SD.at(None) == (1.0, 0.0)


def test_between_timesteps_sigma_over_alpha_is_a_straight_line():
    def ratio(t):
        alpha, sigma = SD.at(t)
        return sigma / alpha
    for t in (0, 17, 998):
        assert ratio(t + 0.25) == pytest.approx(0.75 * ratio(t) + 0.25 * ratio(t + 1), rel=1e-12)


times = st.one_of(st.integers(0, 998), st.floats(0, 998))


@given(times, st.sampled_from(PREDICTION_TYPES), st.sampled_from(PREDICTION_TYPES), st.sampled_from([SD, ZERO]))
def test_conversions_go_round(t, have, want, schedule):
    """From what is had to what is wanted, and back, for eps, v and x0 that belong to one x."""
    x0, noise = normal(1), normal(2)
    alpha, sigma = schedule.at(t)
    x = schedule.add_noise(x0, noise, t)
    outputs = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}
    convert = {"epsilon": schedule.to_noise, "v_prediction": schedule.to_v, "sample": schedule.to_x0}
    made = convert[want](outputs[have], x, t, have)
    # What divides by a small alpha, or by a small sigma, loses as many digits.
    tolerance = 1e-14 / min(alpha, sigma)
    torch.testing.assert_close(made, outputs[want], rtol=0, atol=100 * tolerance)
    torch.testing.assert_close(convert[have](made, x, t, want), outputs[have], rtol=0, atol=1e4 * tolerance / alpha)


@given(st.lists(st.integers(0, 999), min_size=3, max_size=3), st.sampled_from(PREDICTION_TYPES))
def test_a_batch_of_timesteps_is_each_one_alone(t, prediction):
    schedule = NoiseSchedule(NoiseConfig(prediction_type=prediction))
    x0, noise, each = normal(1), normal(2), torch.tensor(t)
    x, target = schedule.add_noise(x0, noise, each), schedule.target(x0, noise, each)
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(x[one], schedule.add_noise(x0[one], noise[one], t[i]))
        assert torch.equal(target[one], schedule.target(x0[one], noise[one], t[i]))
    torch.testing.assert_close(schedule.to_x0(target, x, each), x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(schedule.to_noise(target, x, each), noise, rtol=0, atol=1e-11)


def test_v_is_that_of_diffusers():
    theirs = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, noise, t = normal(1, torch.float32), normal(2, torch.float32), torch.tensor([3, 500, 999])
    schedule = NoiseSchedule(NoiseConfig(prediction_type="v_prediction"))
    torch.testing.assert_close(schedule.target(x0, noise, t), theirs.get_velocity(x0, noise, t), rtol=0, atol=2e-6)
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=0, atol=2e-6)


@pytest.mark.parametrize("t", [0, 300, 700.5, 999])
def test_noised_latents_have_the_mean_and_variance_that_the_schedule_states(t):
    n, (alpha, sigma) = 200_000, SD.at(t)
    x = SD.add_noise(torch.full((n, 1), 2.0), torch.randn(n, 1), t)
    assert x.mean().item() == pytest.approx(2 * alpha, abs=5 * sigma / math.sqrt(n))
    assert x.var().item() == pytest.approx(sigma**2, rel=5 * math.sqrt(2 / n))


def test_a_step_forward_is_a_step_of_the_markov_chain():
    """abar is the product of the shares kept: noising step by step gives what noising at once does."""
    kept = 1 - betas(SD.config)
    signal, variance = 1.0, 0.0
    for share in kept[:300].tolist():
        signal, variance = signal * math.sqrt(share), variance * share + (1 - share)
    assert SD.at(299) == pytest.approx((signal, math.sqrt(variance)), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_are_kept_and_nothing_given_is_changed(dtype):
    x0, noise, t = normal(1, torch.float32).to(dtype), normal(2, torch.float32).to(dtype), torch.tensor([0, 9, 999])
    copies = x0.clone(), noise.clone(), t.clone()
    for now in (t, 500, 500.5):
        x = ZERO.add_noise(x0, noise, now)
        outputs = [x, ZERO.target(x0, noise, now), ZERO.to_x0(noise, x, now), ZERO.to_noise(x0, x, now),
                   ZERO.to_v(x0, x, now, "sample")]
        assert all(output.dtype == dtype and output.shape == SHAPE for output in outputs)
    assert all(torch.equal(a, b) for a, b in zip(copies, (x0, noise, t), strict=True))


@given(st.integers(1, 1000), st.sampled_from(TIMESTEP_SPACINGS), st.sampled_from([SD, ZERO]))
def test_grids_fall_pair_by_pair_to_the_end(n, spacing, schedule):
    grid = make_timesteps(schedule, n, spacing)
    starts, ends = zip(*grid, strict=True)
    assert len(grid) == n and ends == (*starts[1:], None)
    assert 999 >= starts[0] and starts[-1] >= 0
    assert all(later < earlier for earlier, later in zip(starts, starts[1:], strict=False))
    assert all(type(t) is int or not t.is_integer() for t in starts)
    assert spacing == "leading" or starts[0] == 999


@pytest.mark.parametrize("ours, theirs, kind, exception", [
    ("leading", "leading", diffusers.DDIMScheduler, 1000),          # theirs has timestep 1000 there
    ("trailing", "trailing", diffusers.DDIMScheduler, None),
    ("linspace", "linspace", diffusers.EulerDiscreteScheduler, 1),  # theirs is timestep 0
    ("linspace_open", "linspace", diffusers.DPMSolverMultistepScheduler, 1000),     # theirs has 500 twice
])
def test_grids_are_those_of_diffusers(ours, theirs, kind, exception):
    scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                     timestep_spacing=theirs)
    for n in {*range(1, 1001, 13), 2, 4, 10, 20, 25, 48, 50, 100, 500, 1000} - {exception}:
        scheduler.set_timesteps(n)
        times = scheduler.timesteps.tolist()[:n]                    # for n = 61 their trailing holds a 62nd, -1
        assert [t for t, _ in make_timesteps(SD, n, ours)] == pytest.approx(times, abs=1e-3)


def test_stable_diffusions_grids_in_words():
    assert [t for t, _ in make_timesteps(SD, 50)] == list(range(981, 0, -20))
    assert [t for t, _ in make_timesteps(ZERO, 50)] == list(range(999, 0, -20))
    assert make_timesteps(SD, 2) == [(501, 1), (1, None)]
    assert [t for t, _ in make_timesteps(SD, 1000)] == list(range(999, -1, -1))


@pytest.mark.parametrize("n", [1, 2, 10, 30])
def test_karras_grid_has_the_sigmas_of_diffusers(n):
    theirs = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                              use_karras_sigmas=True)
    theirs.alphas_cumprod = SD.alphas_cumprod       # in float64: theirs is five digits at timestep 0
    theirs.set_timesteps(n)
    pairs = [SD.at(t) for t, _ in make_timesteps(SD, n, "karras")]
    expected = theirs.sigmas[:-1].tolist() if n > 1 else [14.614643]
    assert [sigma / alpha for alpha, sigma in pairs] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [0, -3, 1001, 2000, 1.0, True, None, "20"])
def test_a_wrong_number_of_steps_is_told(n):
    with pytest.raises(ValueError, match=r"^.* steps asked for: give a whole number from 1 to 1000$"):
        make_timesteps(SD, n)


@pytest.mark.parametrize("make, words", [
    (lambda: make_timesteps(SD, 10, "even"), "no spacing 'even': choose one of leading, linspace"),
    (lambda: NoiseSchedule(NoiseConfig(prediction_type="eps")), "prediction_type is 'eps': choose one of epsilon"),
    (lambda: NoiseSchedule(NoiseConfig(beta_schedule="sigmoid")), "beta_schedule is 'sigmoid': choose"),
    (lambda: NoiseSchedule(NoiseConfig(num_train_timesteps=1)), "give at least 2"),
    (lambda: NoiseSchedule(NoiseConfig(zero_terminal_snr=True)), "needs v_prediction or sample"),
    (lambda: SD.to_x0(normal(1), normal(2), 5, "v"), "prediction_type is 'v': choose one of"),
    (lambda: SD.at(1000), r"timestep 1000 is outside of 0\.\.\.999"),
    (lambda: SD.at(-1), "timestep -1 is outside"),
    (lambda: SD.at(999.5), "timestep 999.5 is outside"),
    (lambda: SD.at(math.nan), "timestep nan is outside"),
    (lambda: SD.add_noise(normal(1), normal(2), torch.tensor([1, 2, 1000])), "outside of 0"),
    (lambda: SD.add_noise(normal(1), normal(2), torch.tensor([1, 2])), r"t is \(2,\).*of the 3 latents"),
])
def test_bad_input_is_told_in_a_sentence(make, words):
    with pytest.raises(ValueError, match=words) as told:
        make()
    assert "\n" not in str(told.value)


def test_every_preset_has_a_schedule():
    for preset in PRESETS.values():
        schedule = NoiseSchedule(preset.noise)
        assert make_timesteps(schedule, 20)[-1][1] is None
    short = NoiseSchedule(replace(SD.config, num_train_timesteps=100))
    assert [t for t, _ in make_timesteps(short, 4)] == [76, 51, 26, 1]


def test_seeded_noise_of_an_image_depends_on_its_seed_alone():
    batch = seeded_noise((4, 3, 2), [5, 6])
    assert batch.shape == (2, 4, 3, 2) and batch.dtype == torch.float32
    assert torch.equal(batch[1:], seeded_noise((4, 3, 2), [6])) and not torch.equal(batch[0], batch[1])
    generator = torch.Generator().manual_seed(6)
    assert torch.equal(batch[1:], seeded_noise((4, 3, 2), [generator]))
    assert not torch.equal(batch[1:], seeded_noise((4, 3, 2), [generator]))         # the generator has moved on
