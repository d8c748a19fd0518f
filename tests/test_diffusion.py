"""The diffusion loss and sampling without a pipeline, against the same by hand."""

import pytest
import torch
import torch.nn.functional as F

from sdlearn.config import NoiseConfig
from sdlearn.diffusion import diffusion_loss, sample_latents
from sdlearn.guidance import predict_x0
from sdlearn.samplers import SAMPLERS, make_timesteps_for
from sdlearn.schedule import NoiseSchedule, seeded_noise

SCHEDULES = [NoiseSchedule(NoiseConfig(**config)) for config in (
    {}, {"prediction_type": "v_prediction", "zero_terminal_snr": True}, {"prediction_type": "sample"})]
SHAPE = (4, 5, 3)
X0, NOISE = seeded_noise(SHAPE, [0, 1, 2]), seeded_noise(SHAPE, [3, 4, 5])
CONTEXT, UNCOND = seeded_noise((7, 6), [0, 1, 2]), seeded_noise((7, 6), [9])
T = torch.tensor([3, 500, 999])


def network(x, t, context):
    """Depends on x, t and context."""
    scale = context.mean(dim=1)[:, :4, None, None]
    time = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(x * scale + torch.sin(time / 100)) + scale


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.config.prediction_type)
def test_loss_is_the_mean_squared_error_from_the_schedules_target(schedule):
    output = network(schedule.add_noise(X0, NOISE, T), T, CONTEXT)
    errors = (output - schedule.target(X0, NOISE, T)) ** 2
    loss = diffusion_loss(network, schedule, X0, CONTEXT, T, NOISE)
    assert loss.shape == () and torch.allclose(loss, errors.mean())
    each = diffusion_loss(network, schedule, X0, CONTEXT, T, NOISE, reduction="none")
    assert each.shape == (3,) and torch.allclose(each, errors.mean(dim=(1, 2, 3)))


def test_loss_of_a_half_precision_network_is_computed_in_float32():
    def half(x, t, context):
        return network(x, t, context).bfloat16()

    schedule = SCHEDULES[0]
    output = half(schedule.add_noise(X0, NOISE, T), T, CONTEXT).float()
    for reduction, wanted in (("mean", F.mse_loss(output, NOISE)), ("none", ((output - NOISE) ** 2).mean((1, 2, 3)))):
        loss = diffusion_loss(half, schedule, X0, CONTEXT, T, NOISE, reduction=reduction)
        assert loss.dtype == torch.float32 and torch.allclose(loss, wanted)


def test_another_reduction_is_an_error():
    with pytest.raises(ValueError, match="reduction is 'sum': choose mean or none"):
        diffusion_loss(network, SCHEDULES[0], X0, CONTEXT, T, NOISE, reduction="sum")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_latents_is_the_samplers_last_latent_with_guidance(sampler):
    schedule, guidance_scale = SCHEDULES[1], 3.0
    denoise = predict_x0(network, schedule, CONTEXT, UNCOND, guidance_scale=guidance_scale)
    *_, last = SAMPLERS[sampler](denoise, NOISE, make_timesteps_for(sampler, schedule, 4), schedule,
                                 generator=torch.Generator().manual_seed(8))
    latents = sample_latents(network, schedule, NOISE, CONTEXT, UNCOND, sampler=sampler, num_inference_steps=4,
                             guidance_scale=guidance_scale, generator=torch.Generator().manual_seed(8))
    assert torch.equal(latents, last.x)


def test_sample_latents_of_one_seed_do_not_depend_on_the_batch():
    def latents(seeds, context):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample_latents(network, SCHEDULES[0], seeded_noise(SHAPE, generators), context, num_inference_steps=3,
                              sampler="ddpm", generator=generators)

    assert torch.allclose(latents([7, 8], CONTEXT[:2])[1:], latents([8], CONTEXT[1:2]))


def test_sample_latents_rejects_an_unknown_sampler_and_a_scale_without_uncond():
    with pytest.raises(ValueError, match="there is no sampler 'k'"):
        sample_latents(network, SCHEDULES[0], NOISE, CONTEXT, num_inference_steps=3, sampler="k")
    with pytest.raises(ValueError, match="needs uncond"):
        sample_latents(network, SCHEDULES[0], NOISE, CONTEXT, num_inference_steps=3, guidance_scale=3.0)
