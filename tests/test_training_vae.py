"""Training of the autoencoder: which crops, which noise, which terms of the loss; its figures under noise."""

import pytest
import torch
from recipes import scene_config

from sdlearn.data import CORE, draw_scene
from sdlearn.images import psnr, to_tensor
from sdlearn.training.vae import (
    VAERecipe,
    chroma,
    deviation_imbalance,
    gradient_loss,
    reconstruction_under_noise,
)
from sdlearn.vae import DiagonalGaussian


@pytest.fixture(scope="module")
def config():
    return scene_config()


def test_crops_are_taken_around_the_smallest_object_more_often(config, monkeypatch):
    def distances(share):
        monkeypatch.setattr("sdlearn.training.vae.SMALLEST_SHARE", share)
        recipe, found = VAERecipe(config, world=CORE), []
        for seed in range(120):
            drawn = draw_scene(seed, world=CORE)
            if len(drawn.objects) > 1:
                smallest = min(drawn.objects, key=lambda placed: max(placed.extent))
                crop = recipe._crop(seed, 32)
                left, top, right, bottom = smallest.box
                found.append(any((crop == drawn.image[y:y + 32, x:x + 32]).all()
                                 for x in range(max(0, left - 24), min(96, right - 8) + 1, 1)
                                 for y in range(max(0, top - 24), min(96, bottom - 8) + 1, 1)))
        return sum(found) / len(found)
    assert distances(1.0) > 0.9 > distances(0.0)


def test_noise_on_the_latent_is_relative_to_its_deviation_and_differs_between_images(config):
    recipe = VAERecipe(config, latent_noise=0.15)
    latents = 10 * torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    deviations = (recipe.with_noise(latents) - latents).flatten(1).std(dim=1) / 10
    assert deviations.max() <= 0.16 and deviations.min() < 0.02 and deviations.std() > 0.03
    assert torch.equal(VAERecipe(config, latent_noise=0.0).with_noise(latents), latents)


def test_larger_latents_are_no_way_out_of_the_noise(config):
    recipe = VAERecipe(config, latent_noise=0.15)
    scale = torch.tensor(1.0, requires_grad=True)
    latents = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    noisy = recipe.with_noise(scale * latents)
    relative = (noisy / scale.detach() - latents).square().sum()             # what a decoder sees after rescaling
    torch.manual_seed(0)
    exact = (recipe.with_noise(scale * latents) / scale - latents).square().sum()
    assert torch.autograd.grad(exact, scale)[0].abs() < 1e-4 * relative.detach()


def test_the_decoder_learns_from_noisy_latents(config, monkeypatch):
    recipe = VAERecipe(config)
    pixels = to_tensor([draw_scene(0).image])
    monkeypatch.setattr(recipe, "with_noise", lambda latents: latents * 0)
    flat, _ = recipe.loss(recipe.model, pixels)
    monkeypatch.undo()
    real, _ = recipe.loss(recipe.model, pixels)
    assert float(flat.detach()) != float(real.detach())


def test_chroma_is_zero_for_greys_and_keeps_the_hue():
    grey = torch.rand(2, 1, 4, 4).expand(2, 3, 4, 4)
    assert chroma(grey).abs().max() < 1e-6
    pink, green = torch.tensor([1.0, 0.3, 0.5]), torch.tensor([0.5, 0.9, 0.4])
    assert torch.allclose(chroma(pink.view(1, 3, 1, 1)).flatten(), pink - pink.mean())
    assert (chroma(pink.view(1, 3, 1, 1)) - chroma(green.view(1, 3, 1, 1))).abs().max() > 0.5


def test_imbalance_is_zero_for_channels_of_equal_deviation():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(64, 4, 16, 16, generator=generator)
    assert deviation_imbalance(latents) < 1e-3
    scales = torch.tensor([0.5, 1.0, 1.0, 2.0]).view(1, 4, 1, 1)
    wanted = (torch.tensor([0.5, 1.0, 1.0, 2.0]) / 1.125).log().square().mean()
    assert deviation_imbalance(latents * scales) == pytest.approx(float(wanted), rel=0.05)
    assert deviation_imbalance(latents * scales * 3) == pytest.approx(float(wanted), rel=0.05)


def test_edges_are_compared_at_two_scales():
    a = torch.zeros(1, 3, 8, 8)
    b = a.clone()
    b[..., ::2] = 1.0                       # stripes of one pixel, which half the resolution does not show
    fine = gradient_loss(a, b)
    assert gradient_loss(a, b, scales=2) == pytest.approx(float(fine) / 2)


def test_reconstruction_gets_worse_with_noise_and_is_the_same_each_time(config):
    class Coarse:                           # an autoencoder by averages of 8 x 8 pixels
        def parameters(self):
            return iter([torch.zeros(1)])

        def encode(self, pixels):
            mean = torch.nn.functional.avg_pool2d(pixels, 8)
            return DiagonalGaussian(mean, mean)

        def decode(self, latents):
            return torch.nn.functional.interpolate(latents, scale_factor=8.0)
    figures = reconstruction_under_noise(Coarse(), count=12)
    assert list(figures) == [0.0, 0.1, 0.15] and figures == reconstruction_under_noise(Coarse(), count=12)
    assert figures[0.0]["PSNR"] > figures[0.1]["PSNR"] > figures[0.15]["PSNR"]
    assert figures[0.0]["small objects"] < figures[0.0]["PSNR"]
    drawn = [draw_scene(seed, "test", CORE) for seed in range(12)]
    pixels = to_tensor([one.image for one in drawn])
    again = Coarse().decode(Coarse().encode(pixels).mode())
    assert figures[0.0]["PSNR"] == pytest.approx(float(psnr(again, pixels).mean()), rel=1e-6)
