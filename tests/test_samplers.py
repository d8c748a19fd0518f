"""Samplers: diffusers' trajectories, the identities of theory, and orders of convergence."""

import inspect
import math
from itertools import pairwise

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn import samplers
from sdlearn.config import PRESETS, NoiseConfig
from sdlearn.guidance import predict_x0
from sdlearn.samplers import (
    SAMPLERS,
    ddim_coefficients,
    dpmpp_2m,
    euler,
    get_sampler,
    heun,
    make_timesteps_for,
    pndm,
    unipc,
)
from sdlearn.schedule import ALMOST_ZERO, TIMESTEP_SPACINGS, NoiseSchedule, make_timesteps
from sdlearn.unet import UNet

# From inside diffusers, whose schedulers are not written for this version of NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (2, 4, 6, 5)
MINI = NoiseConfig(prediction_type="v_prediction", zero_terminal_snr=True)
THEIRS = {
    "ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler, "heun": diffusers.HeunDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "pndm": diffusers.PNDMScheduler, "unipc": diffusers.UniPCMultistepScheduler,
}
SIGMA_SPACE = ("euler", "euler_ancestral", "heun")
AT_TIMESTEP_0 = ("ddim", "pndm")        # end there, not at the predicted x0
WITHOUT_ZERO_SNR = ("heun", "pndm")     # in diffusers, which has none of these for it
NOT_THE_DEFAULT = {"ddpm": {"clip_sample": False}, "ddim": {"clip_sample": False, "set_alpha_to_one": False},
                   "pndm": {"skip_prk_steps": True}}


def network(x, t):
    """A smooth nonlinear function of x and t in the place of a U-Net."""
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).to(x) / 2
    wave = math.sin(float(t) / 150)
    return torch.tanh(torch.einsum("ij,bjhw->bihw", mix, x) + wave) + 0.3 * x * math.cos(float(t) / 400)


def noise(dtype=torch.float32):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


def generator():
    return torch.Generator().manual_seed(7)


def denoiser(schedule, told=None):
    """The denoise(x, t) of that network; `told` says of each t what the network hears in its place."""
    return lambda x, t: schedule.to_x0(network(x, told[t] if told else t), x, t)


def scheduler_of(name, config, n, spacing, **extra):
    """diffusers' scheduler, and the grid it walks as explicit pairs."""
    betas = {"cosine": "squaredcos_cap_v2"}.get(config.beta_schedule, config.beta_schedule)
    settings = {"beta_start": config.beta_start, "beta_end": config.beta_end, "beta_schedule": betas,
                "prediction_type": config.prediction_type, "timestep_spacing": spacing, "steps_offset": 1,
                **NOT_THE_DEFAULT.get(name, {}), **extra}
    if config.zero_terminal_snr and name not in WITHOUT_ZERO_SNR:
        settings["rescale_betas_zero_snr"] = True
    theirs = THEIRS[name](**settings)
    theirs.set_timesteps(n)
    times = list(dict.fromkeys(theirs.timesteps.tolist()))  # Heun's holds all but the first twice, PNDM's the second
    if name in AT_TIMESTEP_0:   # diffusers takes t - N // n, which on some grids is not the next timestep
        return theirs, [(t, t - 1000 // n if t >= 1000 // n else None) for t in times]
    return theirs, list(zip(times, [*times[1:], None], strict=True))


def their_trajectory(name, theirs, grid, **options):
    """Their x after each step, in the variance preserving scale."""
    x, states = noise() * theirs.init_noise_sigma, []
    told = [t for pair in grid for t in pair][:-1] if name == "heun" else [t for t, _ in grid]
    if name == "pndm":
        told[1:1] = told[1:2]
    if name not in ("heun", "dpmpp_2m", "pndm", "unipc"):
        options["generator"] = generator()
    for t, t_told in zip(theirs.timesteps, told, strict=True):
        output = network(theirs.scale_model_input(x, t), t_told)
        x = theirs.step(output, t, x, **options).prev_sample
        scale = (theirs.sigmas[theirs.step_index] ** 2 + 1) ** 0.5 if name in SIGMA_SPACE else 1
        states.append(x / scale)
    if name == "heun":
        return states[1::2] + states[-1:]
    return states[1:] if name == "pndm" and len(grid) > 1 else states


def our_trajectory(name, schedule, grid, spacing, told=None, **options):
    start = noise()
    if name in SIGMA_SPACE and spacing != "leading":
        start = start * schedule.at(grid[0][0])[1]                  # theirs is sigma_max noise: see samplers
    steps = SAMPLERS[name](denoiser(schedule, told), start, grid, schedule, generator=generator(), **options)
    return [step.x for step in steps]


def difference(ours, theirs):
    """The largest difference of two trajectories, relative to the size of the state."""
    assert len(ours) == len(theirs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def parity(name, config, n, spacing, options=None, exact_table=False, **extra):
    theirs, grid = scheduler_of(name, config, n, spacing, **extra)
    cut_off = name in ("euler", "euler_ancestral", "dpmpp_2m", "unipc") and config.zero_terminal_snr
    schedule = NoiseSchedule(config, floor=ALMOST_ZERO if cut_off else 0.0)
    options = options or {}
    if exact_table:
        theirs.alphas_cumprod = schedule.alphas_cumprod
        theirs.set_timesteps(n)
    return difference(our_trajectory(name, schedule, grid, spacing, **options),
                      their_trajectory(name, theirs, grid, **options))


CASES = [(name, prediction) for name in SAMPLERS for prediction in ("epsilon", "v_prediction", "sample")
         if (name, prediction) not in (("euler_ancestral", "sample"), ("pndm", "sample"))]      # none in diffusers


@pytest.mark.parametrize("n", [1, 2, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("name, prediction", CASES)
def test_trajectories_are_those_of_diffusers(name, prediction, spacing, n):
    assert parity(name, NoiseConfig(prediction_type=prediction), n, spacing) < 1e-5


@pytest.mark.parametrize("n", [4, 20, 50])
@pytest.mark.parametrize("name, prediction", [case for case in CASES if "pndm" not in case])
def test_trajectories_down_to_timestep_0_are_those_of_diffusers(name, prediction, n):
    """Fractions on the way, for Euler's kind. At the end sigma is 0.03, and its table must be exact.

    Theirs comes from abar in float32, which has 1 - abar to five digits at timestep 0; so it is
    given abar in float64. On its own table its Heun is up to 3e-5 off.
    """
    assert parity(name, NoiseConfig(prediction_type=prediction), n, "linspace", exact_table=True) < 1e-5


@pytest.mark.parametrize("n", [1, 3, 7, 48, 300])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_pndm_is_that_of_diffusers_down_to_timestep_0(prediction, n):
    """On a grid without offset. Theirs has no other: it takes its steps for N // n each, whatever the grid."""
    config = NoiseConfig(prediction_type=prediction)
    assert parity("pndm", config, n, "leading", exact_table=True, steps_offset=0) < 1e-5


@pytest.mark.parametrize("n", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("name, prediction",
                         [case for case in CASES if not {*WITHOUT_ZERO_SNR, "epsilon"} & {*case}])
def test_trajectories_with_zero_terminal_snr_are_those_of_diffusers(name, prediction, n):
    """Within float32's rounding of their X, which for Euler's kind starts at 4096 times the noise."""
    config = NoiseConfig(prediction_type=prediction, zero_terminal_snr=True)
    rounding = 4096 * 2**-23 if name in SIGMA_SPACE and n <= 5 else 0
    assert parity(name, config, n, "trailing") < max(1e-5, rounding)


@pytest.mark.parametrize("n", [5, 20, 50])
def test_heun_with_zero_terminal_snr_is_that_of_diffusers_below_the_last_timestep(n):
    """diffusers' Heun knows no zero terminal SNR, but takes its betas, on a grid without t = 999.

    Its PNDM takes them too, but combines v, where the one here combines eps to be of second order.
    """
    abar = NoiseSchedule(MINI).alphas_cumprod
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    assert parity("heun", MINI, n, "leading", trained_betas=betas.tolist()) < 1e-5


@pytest.mark.parametrize("config, eta", [(NoiseConfig(), 0.3), (NoiseConfig(), 1.0), (MINI, 0.3), (MINI, 0.9)])
def test_ddim_with_fresh_noise_is_that_of_diffusers(config, eta):
    spacing = "trailing" if config.zero_terminal_snr else "leading"
    assert parity("ddim", config, 20, spacing, {"eta": eta}) < 1e-5


@pytest.mark.parametrize("name", AT_TIMESTEP_0)
def test_ending_at_x0_is_that_of_diffusers(name):
    theirs, grid = scheduler_of(name, NoiseConfig(), 10, "leading", set_alpha_to_one=True)
    ours = our_trajectory(name, NoiseSchedule(NoiseConfig()), grid, "leading", set_alpha_to_one=True)
    assert difference(ours, their_trajectory(name, theirs, grid)) < 1e-5


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_other_beta_schedules_are_those_of_diffusers(name, beta_schedule):
    config = NoiseConfig(beta_schedule=beta_schedule, prediction_type="v_prediction")
    assert parity(name, config, 10, "leading") < 1e-5


KARRAS_CASES = [(name, config) for name in ("euler", "heun", "dpmpp_2m", "unipc")     # those with it in diffusers
                for config in (NoiseConfig(), NoiseConfig(prediction_type="v_prediction"), MINI)
                if name not in WITHOUT_ZERO_SNR or not config.zero_terminal_snr]


def karras_scheduler(name, config, n):
    """diffusers' scheduler with Karras' sigmas, and the timesteps that it would tell the network."""
    theirs, _ = scheduler_of(name, config, n, "linspace", use_karras_sigmas=True)
    schedule = NoiseSchedule(config, floor=ALMOST_ZERO if config.zero_terminal_snr else 0.0)
    theirs.alphas_cumprod = schedule.alphas_cumprod     # in float64: theirs is five digits at timestep 0
    theirs.set_timesteps(n)
    theirs.set_begin_index(0)       # rounded, the first timestep may be there twice; it would begin at the second
    times = theirs.timesteps.tolist()
    return theirs, schedule, [times[0], *times[1::2]] if name == "heun" else times


@pytest.mark.parametrize("n", [5, 20, 50])
@pytest.mark.parametrize("name, config", KARRAS_CASES)
def test_karras_trajectories_are_those_of_diffusers(name, config, n):
    """Both tell the network the timesteps of ours, then both those of theirs; the sigmas are the same."""
    for ours_told in (True, False):
        theirs, schedule, times = karras_scheduler(name, config, n)
        grid = make_timesteps(schedule, n, "karras")
        told = {t: t if ours_told else their_t for (t, _), their_t in zip(grid, times, strict=True)}
        told_pairs = [(told[t], told.get(t_prev)) for t, t_prev in grid]
        ours = our_trajectory(name, schedule, grid, "karras", told)
        assert difference(ours, their_trajectory(name, theirs, told_pairs)) < 1e-5


@pytest.mark.parametrize("n", [2, 5, 20, 50])
@pytest.mark.parametrize("name, config", KARRAS_CASES)
def test_karras_timesteps_are_close_to_those_of_diffusers(name, config, n):
    """Between whole timesteps theirs interpolate the logarithm of sigma, ours sigma; DPM++ and UniPC then round."""
    _, schedule, theirs = karras_scheduler(name, config, n)
    fractions = karras_scheduler("euler", config, n)[2]
    assert theirs == (fractions if name in ("euler", "heun") else [round(t) for t in fractions])
    assert [t for t, _ in make_timesteps(schedule, n, "karras")] == pytest.approx(fractions, abs=0.13)


@pytest.mark.parametrize("n", [2, 7, 30, 48, 100])
@pytest.mark.parametrize("name", SAMPLERS)
def test_default_grids_are_those_of_diffusers(name, n):
    """In the spacing that each of their schedulers has where none is given."""
    spacing = inspect.signature(THEIRS[name]).parameters["timestep_spacing"].default
    theirs, _ = scheduler_of(name, NoiseConfig(), n, spacing)
    times = list(dict.fromkeys(theirs.timesteps.tolist()))
    assert [t for t, _ in make_timesteps_for(name, NoiseSchedule(NoiseConfig()), n)] == pytest.approx(times, rel=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_starts_at_the_last_timestep_by_default(name):
    assert [t for t, _ in make_timesteps_for(name, NoiseSchedule(MINI), 4)] == [999, 749, 499, 249]
    assert make_timesteps_for(name, NoiseSchedule(MINI), 4, "leading")[0][0] == 751


def run(name, schedule, grid, x=None, **options):
    """The trajectory in float64, where identities hold to 1e-12."""
    x = noise(torch.float64) if x is None else x
    steps = SAMPLERS[name](denoiser(schedule), x, grid, schedule, generator=generator(), **options)
    return [step.x for step in steps]


configs, counts = st.sampled_from([NoiseConfig(), MINI]), st.integers(1, 20)
few = settings(max_examples=25)


@few
@given(configs, counts, st.sampled_from(TIMESTEP_SPACINGS))
def test_samplers_are_one_where_theory_says_so(config, n, spacing):
    schedule = NoiseSchedule(config)
    grid = make_timesteps(schedule, n, spacing)
    ddim, fresh = (run("ddim", schedule, grid, eta=eta, set_alpha_to_one=True) for eta in (0.0, 1.0))
    assert difference(run("euler", schedule, grid), ddim) < 1e-12
    assert difference(run("euler_ancestral", schedule, grid, eta=0.0), ddim) < 1e-12
    assert difference(run("ddpm", schedule, grid), fresh) < 1e-10
    assert difference(run("euler_ancestral", schedule, grid), fresh) < 1e-10


@few
@given(configs, counts, st.sampled_from(TIMESTEP_SPACINGS))
def test_first_order_dpmpp_is_ddim(config, n, spacing):
    """Each step alone, which leaves DPM++ 2M no earlier prediction, is of first order."""
    schedule = NoiseSchedule(config)
    x, states = noise(torch.float64), []
    grid = make_timesteps(schedule, n, spacing)
    for pair in grid:
        x = run("dpmpp_2m", schedule, [pair], x)[-1]
        states.append(x)
    assert difference(states, run("ddim", schedule, grid, set_alpha_to_one=True)) < 1e-10


def test_second_order_samplers_are_not_ddim():
    schedule = NoiseSchedule(NoiseConfig())
    grid = make_timesteps(schedule, 10)
    for name in ("heun", "dpmpp_2m", "pndm", "unipc"):
        assert difference(run(name, schedule, grid), run("euler", schedule, grid)) > 1e-3


@few
@given(configs, counts, st.sampled_from(TIMESTEP_SPACINGS))
def test_unipc_predicts_with_dpmpp_2m(config, n, spacing):
    """Its steps without the corrector: the first of all, and any that follows a corrector that is turned off."""
    schedule = NoiseSchedule(config)
    grid = make_timesteps(schedule, n, spacing)
    assert difference(run("unipc", schedule, grid)[:1], run("dpmpp_2m", schedule, grid)[:1]) < 1e-12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "correction", uncorrected)
        assert difference(run("unipc", schedule, grid), run("dpmpp_2m", schedule, grid)) < 1e-10


def uncorrected(rise, rise_last):
    """The corrector's weights that give the predictor's step: half the last slope, nothing of what is new."""
    return (0.0 if rise_last is None else -rise / rise_last / 2), 0.0


@pytest.mark.parametrize("rise, rise_last", [(0.01, 0.02), (0.3, 0.3), (2.0, 0.5), (0.4, math.inf)])
def test_unipcs_weights_integrate_a_parabola_exactly(rise, rise_last):
    """Against the mean over the step by the midpoints of 20,000 parts."""
    lam = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * rise
    share = lam.exp() / lam.exp().sum()
    older, newer = samplers.correction(rise, rise_last)
    for power in (1, 2) if rise_last < math.inf else (1,):
        made = older * ((-rise_last) ** power if rise_last < math.inf else 0) + newer * rise**power
        assert made == pytest.approx((share * lam**power).sum().item(), rel=1e-6)
    assert samplers.correction(rise, None) == (0.0, 0.5)


def test_deterministic_samplers_come_to_one_image():
    """On a network of which nobody knows the solution: twice the steps, and they are closer to one another."""
    schedule, apart = NoiseSchedule(NoiseConfig(prediction_type="v_prediction")), []
    for n in (25, 50, 100, 200):
        grid = make_timesteps(schedule, n, "karras")[:-1]        # down to timestep 0, where all of them end
        best = run("unipc", schedule, grid)[-1:]
        apart.append({name: difference(run(name, schedule, grid)[-1:], best)
                      for name in ("ddim", "pndm", "dpmpp_2m", "heun")})
    for finer, coarser in zip(apart[1:], apart, strict=False):
        assert all(finer[name] < 0.6 * coarser[name] for name in finer)
    assert max(apart[-1].values()) < 0.03 and max(apart[-1]["heun"], apart[-1]["dpmpp_2m"]) < 1e-3


MEAN, STD = 0.7, 0.4


def gaussian_denoiser(schedule):
    """E[x0 | x] for x0 ~ N(MEAN, STD^2), the best that a network could learn."""
    def denoise(x, t):
        alpha, sigma = schedule.at(t)
        return MEAN + STD**2 * alpha / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
    return denoise


def flow(schedule, x, t, t_end):
    """The probability-flow solution: the number of standard deviations from the mean stays what it is."""
    (alpha, sigma), (alpha_end, sigma_end) = schedule.at(t), schedule.at(t_end)
    z = (x - alpha * MEAN) / math.hypot(alpha * STD, sigma)
    return alpha_end * MEAN + math.hypot(alpha_end * STD, sigma_end) * z


@pytest.mark.parametrize("name, order, config", [
    ("ddim", 1, NoiseConfig()), ("euler", 1, NoiseConfig()), ("heun", 2, NoiseConfig()),
    ("dpmpp_2m", 2, NoiseConfig()), ("unipc", 3, NoiseConfig()), ("pndm", 2, NoiseConfig()),
    ("pndm", 2, NoiseConfig(prediction_type="sample")),
    ("pndm", 1, NoiseConfig(prediction_type="v_prediction")),    # as in diffusers, which combines v
])
def test_deterministic_samplers_converge_at_their_order(name, order, config):
    """Down to timestep 0, on a smooth grid: from there the last step to sigma 0 is of first order for all.

    The corrector gives UniPC one order more than its name says.
    """
    schedule = NoiseSchedule(config)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None, None]
    errors = []
    for n in (30, 60, 120, 240):
        grid = make_timesteps(schedule, n, "karras")[:-1]
        *_, last = SAMPLERS[name](gaussian_denoiser(schedule), x, grid, schedule)
        errors.append((last.x - flow(schedule, x, 999, 0)).abs().max().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([order] * 3, abs=0.2)


@pytest.mark.parametrize("name, order", [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("pndm", 2), ("unipc", 3)])
def test_orders_hold_from_pure_noise(name, order):
    """With zero terminal SNR, whose first step leaves infinite sigma/alpha behind."""
    schedule = NoiseSchedule(MINI)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None, None]
    errors = []
    for n in (120, 240, 480):
        *_, last = SAMPLERS[name](gaussian_denoiser(schedule), x, make_timesteps(schedule, n, "karras")[:-1], schedule)
        errors.append((last.x - flow(schedule, x, 999, 0)).abs().max().item())
    slopes = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert slopes == pytest.approx([order] * 2, abs=0.2)


@pytest.mark.parametrize("config", [NoiseConfig(), MINI])
@pytest.mark.parametrize("name, options", [(name, {}) for name in SAMPLERS] + [("ddim", {"eta": 0.5})])
def test_samples_of_a_gaussian_have_its_mean_and_deviation(name, options, config):
    """Started at the noisy Gaussian's own mean and deviation: Stable Diffusion's schedule keeps 7 % of them."""
    schedule = NoiseSchedule(config)
    alpha, sigma = schedule.at(999)
    x = alpha * MEAN + math.hypot(alpha * STD, sigma) * torch.randn(10_000, 1, 1, 1)
    grid = make_timesteps(schedule, 200, "linspace")
    *_, last = SAMPLERS[name](gaussian_denoiser(schedule), x, grid, schedule, **options)
    assert last.x.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert last.x.std().item() == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("n, spacing", [(n, spacing) for n in (1, 2, 3, 25) for spacing in TIMESTEP_SPACINGS]
                         + [(1000, "trailing")])
@pytest.mark.parametrize("name", SAMPLERS)
def test_zero_terminal_snr_works_in_every_sampler(name, n, spacing):
    """The last timestep holds no signal; a sampler that divides by alpha ends in infinity there."""
    schedule = NoiseSchedule(MINI)
    grid, x = make_timesteps(schedule, n, spacing), torch.randn(500, 1, 1, 1)
    steps = list(SAMPLERS[name](gaussian_denoiser(schedule), x, grid, schedule))
    assert all(step.x.isfinite().all() for step in steps)
    if n >= 25:     # with fewer, Heun's trapezoids may be far too wide for these noise levels
        assert max(step.x.abs().max() for step in steps) < 6
        assert steps[-1].x.mean().item() == pytest.approx(MEAN, abs=0.1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_perfect_denoiser_is_obeyed(name):
    """A network that knows the image leads to it; Stable Diffusion's DDIM and PNDM stop just short of it."""
    schedule, image = NoiseSchedule(NoiseConfig()), torch.full(SHAPE, 0.5)
    *_, last = SAMPLERS[name](lambda x, t: image, noise(), make_timesteps_for(name, schedule, 7), schedule)
    assert (last.x - image).abs().max() < (0.2 if name in AT_TIMESTEP_0 else 1e-6)
    assert torch.equal(last.x0, image)


@pytest.mark.parametrize("config", [NoiseConfig(), MINI])
@pytest.mark.parametrize("name", SAMPLERS)
def test_steps_are_told_in_order_and_nothing_given_is_changed(name, config):
    schedule, x = NoiseSchedule(config), noise()
    grid, calls = make_timesteps(schedule, 6), []

    def denoise(x, t):
        calls.append(t)
        assert type(t) in (int, float)
        return network(x, t)

    steps = get_sampler(name)(denoise, x, grid, schedule, generator=generator())
    assert calls == []                                      # nothing runs until somebody asks
    steps = list(steps)
    assert [step.index for step in steps] == list(range(6))
    assert [step.t for step in steps] == [t for t, _ in grid]
    twice = {"heun": 5, "pndm": 1}.get(name, 0)
    if twice and config.zero_terminal_snr:      # not where x holds no signal
        twice -= 1
    assert len(calls) == 6 + twice
    assert torch.equal(x, noise())
    again = list(get_sampler(name)(network, x, grid, schedule, generator=generator()))
    assert all(torch.equal(a.x, b.x) for a, b in zip(steps, again, strict=True))


@pytest.mark.parametrize("name, calls", [("heun", 10), ("pndm", 6)])
def test_the_floor_of_alpha_counts_as_no_signal(name, calls):
    """Six steps: Heun calls twice but in the last, PNDM twice in the first; neither does where x holds no signal."""
    for floor in (0.0, ALMOST_ZERO):
        schedule, seen = NoiseSchedule(MINI, floor=floor), []
        list(SAMPLERS[name](lambda x, t, seen=seen: seen.append(t) or 0.3 * x, noise(), make_timesteps(schedule, 6),
                            schedule))
        assert len(seen) == calls


@pytest.mark.parametrize("config", [NoiseConfig(), MINI])
@pytest.mark.parametrize("name, draws", [(name, {"ddpm": 5, "euler_ancestral": 5}.get(name, 0)) for name in SAMPLERS])
def test_noise_of_deviation_0_is_not_drawn(name, draws, config):
    """Deterministic samplers leave the generator's state alone, and so does the last step of the stochastic ones."""
    schedule, used, expected = NoiseSchedule(config), generator(), generator()
    list(SAMPLERS[name](denoiser(schedule), noise(), make_timesteps(schedule, 6), schedule, generator=used))
    for _ in range(draws):
        torch.randn(SHAPE, generator=expected)
    assert torch.equal(used.get_state(), expected.get_state())


@pytest.mark.parametrize("name", SAMPLERS)
def test_types_are_kept_and_the_noise_does_not_depend_on_them(name):
    schedule = NoiseSchedule(NoiseConfig())
    grid = make_timesteps(schedule, 4)
    runs = {dtype: [step.x for step in SAMPLERS[name](lambda x, t: 0.3 * x, noise(dtype), grid, schedule,
                                                      generator=generator())]
            for dtype in (torch.float32, torch.float64, torch.bfloat16)}
    assert all(x.dtype == dtype for dtype, states in runs.items() for x in states)
    assert difference([x.double() for x in runs[torch.float32]], runs[torch.float64]) < 1e-5
    assert difference([x.double() for x in runs[torch.bfloat16]], runs[torch.float64]) < 0.1


@pytest.mark.parametrize("config", [NoiseConfig(), NoiseConfig(prediction_type="v_prediction"), MINI])
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_waits_for_the_device(name, config):
    """On the meta device, which has no values, waiting for one raises."""
    schedule, x = NoiseSchedule(config), torch.zeros(SHAPE, device="meta")
    for spacing in TIMESTEP_SPACINGS:
        grid = make_timesteps(schedule, 6, spacing)
        *_, last = SAMPLERS[name](denoiser(schedule), x, grid, schedule, generator=generator())
        assert last.x.device.type == "meta" and last.x.shape == SHAPE


def test_the_guided_loop_needs_nothing_from_the_device():
    """On the meta device, which has no values, waiting for one raises, and so does mixing devices."""
    config = PRESETS["tiny"]
    unet = UNet(config.unet).to("meta")
    context = torch.zeros(1, 77, config.text.dim, device="meta")
    schedule = NoiseSchedule(MINI)
    denoise = predict_x0(unet, schedule, context, context, guidance_scale=7.5, guidance_rescale=0.7,
                         guidance_interval=(100, 900))
    x = torch.zeros(1, 4, 8, 8, device="meta")
    for name, sampler in SAMPLERS.items():
        *_, last = sampler(denoise, x, make_timesteps_for(name, schedule, 3), schedule, generator=generator())
        assert last.x.device.type == "meta" and last.x.shape == x.shape


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_is_a_generator_that_fits_a_screen(name):
    assert inspect.isgeneratorfunction(SAMPLERS[name])
    assert len(inspect.getsource(SAMPLERS[name]).splitlines()) <= 40


def test_an_unknown_sampler_is_told_which_there_are():
    with pytest.raises(ValueError, match="no sampler 'plms': choose one of ddpm, ddim, euler, euler_a"):
        get_sampler("plms")
    with pytest.raises(ValueError, match="no sampler 'DDIM'"):
        make_timesteps_for("DDIM", NoiseSchedule(NoiseConfig()), 10)


@pytest.mark.parametrize("n", [0, -1, 1001, 2000, 2.5, True, "20"])
def test_a_wrong_number_of_steps_is_told(n):
    with pytest.raises(ValueError, match="give a whole number from 1 to 1000"):
        make_timesteps_for("euler", NoiseSchedule(NoiseConfig()), n)


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral"])
@pytest.mark.parametrize("eta", [-0.1, 1.5, math.nan])
def test_a_wrong_eta_is_told(name, eta):
    schedule = NoiseSchedule(NoiseConfig())
    with pytest.raises(ValueError, match="eta is .*: give a number from 0"):
        next(SAMPLERS[name](network, noise(), make_timesteps(schedule, 3), schedule, eta=eta))


def test_a_grid_may_start_anywhere():
    """As in img2img: the tail of a grid continues a latent noised to its first timestep."""
    schedule = NoiseSchedule(NoiseConfig())
    grid = make_timesteps(schedule, 400, "karras")
    tail = grid[200:]
    x = flow(schedule, torch.linspace(-1, 1, 5, dtype=torch.float64).reshape(-1, 1, 1, 1), 999, tail[0][0])
    for sampler in (euler, heun, dpmpp_2m, pndm, unipc):
        *_, last = sampler(gaussian_denoiser(schedule), x, tail[:-1], schedule)
        assert (last.x - flow(schedule, x, tail[0][0], 0)).abs().max() < 0.01


@pytest.mark.parametrize("config", [NoiseConfig(), NoiseConfig(prediction_type="v_prediction", zero_terminal_snr=True)])
def test_ddim_is_two_factors_a_step(config):
    schedule = NoiseSchedule(config)
    grid, x = make_timesteps(schedule, 7), noise(torch.float64)
    factors = ddim_coefficients(schedule, grid)
    assert all(type(value) is float for pair in factors for value in pair) and len(factors) == 7
    steps = list(SAMPLERS["ddim"](network, x, grid, schedule))
    for (t, _), (a, b), step in zip(grid, factors, steps, strict=True):
        x = a * x + b * network(x, t)
        torch.testing.assert_close(x, step.x)
