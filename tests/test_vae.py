"""The autoencoder: equal to diffusers' on the same weights, and true to its formulas."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from sdlearn.config import PRESETS, VAEConfig
from sdlearn.vae import VAE, DiagonalGaussian

KEYS = json.loads((Path(__file__).parent / "data" / "keys_vae_text.json").read_text())

CONFIGS = {
    "tiny": PRESETS["tiny"].vae,
    "mini": PRESETS["mini"].vae,
    # Stable Diffusion's in all but width: 4 levels, 2 ResBlocks each, the widths' ratios 1, 2, 4, 4.
    "reduced": VAEConfig(channels=(8, 16, 32, 32), groups=4),
    "one_level": VAEConfig(channels=(8,), groups=4, layers_per_block=1),
}


def reference(config: VAEConfig) -> AutoencoderKL:
    """diffusers' autoencoder of the same shape, with random weights in every parameter."""
    levels = len(config.channels)
    model = AutoencoderKL(
        in_channels=config.in_channels, out_channels=config.in_channels,
        latent_channels=config.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.channels, layers_per_block=config.layers_per_block,
        norm_num_groups=config.groups, scaling_factor=config.scaling_factor)
    randomise(model)
    return model.eval()


def randomise(model: torch.nn.Module) -> None:
    """Norms begin as 1 and 0, where a swapped or forgotten one would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))


def pair(config: VAEConfig) -> tuple[VAE, AutoencoderKL]:
    theirs = reference(config)
    ours = VAE(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def tiny() -> VAE:
    torch.manual_seed(0)
    return VAE(PRESETS["tiny"].vae).eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cells", [(4, 4), (3, 5), (6, 1)])
@torch.no_grad()
def test_equal_to_diffusers(name, cells):
    config = CONFIGS[name]
    ours, theirs = pair(config)
    pixels = torch.rand(2, 3, *(config.factor * side for side in cells)) * 2 - 1
    latent = torch.randn(2, config.latent_channels, *cells)
    # float32 as it is used; float64, where only another formula could differ.
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.float64, 1e-12)]:
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        posterior, expected = ours.encode(pixels.to(dtype)), theirs.encode(pixels.to(dtype)).latent_dist
        assert difference(posterior.mean, expected.mean) < tolerance
        assert difference(posterior.logvar, expected.logvar) < tolerance
        assert difference(posterior.kl(), expected.kl()) < 1e-5         # computed in float32 in any case
        assert difference(ours.decode(latent.to(dtype)), theirs.decode(latent.to(dtype)).sample) < tolerance


def test_gradients_equal_to_diffusers():
    ours, theirs = pair(CONFIGS["reduced"])
    ours, theirs = ours.double(), theirs.double()
    pixels = torch.rand(1, 3, 16, 24, dtype=torch.float64)
    noise = torch.Generator().manual_seed(5)
    decoded, posterior = ours(pixels, noise)
    (decoded.square().mean() + posterior.mean.square().mean()).backward()
    expected = theirs.encode(pixels).latent_dist
    decoded = theirs.decode(expected.sample(noise.manual_seed(5))).sample
    (decoded.square().mean() + expected.mean.square().mean()).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    scale = max(float(g.abs().max()) for g in gradients.values())
    for name, parameter in ours.named_parameters():
        assert float((parameter.grad - gradients[name]).abs().max()) < 1e-10 * scale, name


def test_full_size_is_stable_diffusions():
    with torch.device("meta"):
        model = VAE(PRESETS["sd15"].vae)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == dict(KEYS["vae"])
    assert sum(p.numel() for p in model.parameters()) == 83_653_863


def test_full_size_shapes_at_512():
    with torch.device("meta"):
        model = VAE(PRESETS["sd15"].vae)
        posterior = model.encode(torch.empty(1, 3, 512, 768))
        assert posterior.mean.shape == posterior.logvar.shape == (1, 4, 64, 96)
        assert model.decode(posterior.mode()).shape == (1, 3, 512, 768)


def test_every_norm_has_the_eps_of_the_checkpoints():
    with torch.device("meta"):
        norms = [m for m in VAE(PRESETS["sd15"].vae).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 52
    assert {norm.eps for norm in norms} == {1e-6}
    assert {norm.num_groups for norm in norms} == {32}


# --- the Gaussian in the middle ---------------------------------------------------------------------

@given(mean=st.floats(-20, 20), logvar=st.floats(-30, 20), count=st.integers(1, 3))
def test_kl_is_that_of_torch_distributions(mean, logvar, count):
    torch.manual_seed(count)
    means = mean + torch.randn(count, 4, 2, 3)
    logvars = (logvar + torch.randn(count, 4, 2, 3)).clamp(-30, 20)
    normal = torch.distributions.Normal(means.double(), (logvars.double() / 2).exp())
    standard = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    expected = torch.distributions.kl_divergence(normal, standard).sum(dim=(1, 2, 3))
    torch.testing.assert_close(DiagonalGaussian(means, logvars).kl().double(), expected, rtol=1e-5, atol=1e-5)


def test_kl_of_the_standard_normal_is_zero():
    zeros = torch.zeros(2, 4, 3, 3)
    assert DiagonalGaussian(zeros, zeros).kl().tolist() == [0, 0]


def test_logvar_is_clamped_and_stays_finite():
    moments = torch.cat([torch.zeros(1, 4, 1, 2), torch.tensor([-1000.0, 1000.0]).expand(1, 4, 1, 2)], dim=1)
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.logvar.unique().tolist() == [-30, 20]
    assert posterior.sample().isfinite().all() and posterior.kl().isfinite().all()
    assert posterior.std.half().isfinite().all()


def test_sample_repeats_with_its_generator():
    posterior = DiagonalGaussian(torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5))
    first = posterior.sample(torch.Generator().manual_seed(1))
    torch.manual_seed(99)                                               # not the source of the noise
    assert torch.equal(first, posterior.sample(torch.Generator().manual_seed(1)))
    assert not torch.equal(first, posterior.sample(torch.Generator().manual_seed(2)))
    torch.manual_seed(3)
    unseeded = posterior.sample()
    torch.manual_seed(3)
    assert torch.equal(unseeded, posterior.sample())


def test_sample_has_the_mean_and_the_spread():
    mean, logvar = torch.full((1, 4, 200, 200), 3.0), torch.full((1, 4, 200, 200), 2.0).log() * 2
    drawn = DiagonalGaussian(mean, logvar).sample(torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx(3, abs=0.02)
    assert drawn.std().item() == pytest.approx(2, abs=0.02)
    assert torch.equal(DiagonalGaussian(mean, logvar).mode(), mean)


def test_sample_is_differentiable_in_mean_and_logvar():
    mean = torch.zeros(1, 4, 2, 2, requires_grad=True)
    logvar = torch.zeros(1, 4, 2, 2, requires_grad=True)
    drawn = DiagonalGaussian(mean, logvar).sample(torch.Generator().manual_seed(0))
    drawn.sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))
    torch.testing.assert_close(logvar.grad, drawn.detach() / 2)         # d std / d logvar = std / 2


# --- latents and pixels -----------------------------------------------------------------------------

@settings(max_examples=25)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), batch=st.integers(1, 3))
@torch.no_grad()
def test_any_multiple_of_the_factor_goes_there_and_back(tiny, rows, columns, batch):
    pixels = torch.zeros(batch, 3, tiny.config.factor * rows, tiny.config.factor * columns)
    latent = tiny.to_latent(pixels)
    assert latent.shape == (batch, tiny.config.latent_channels, rows, columns)
    assert tiny.to_pixels(latent).shape == pixels.shape


@torch.no_grad()
def test_scaling_factor_is_applied_once_each_way():
    torch.manual_seed(1)
    model = VAE(replace(PRESETS["tiny"].vae, scaling_factor=0.25)).eval()
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    posterior = model.encode(pixels)
    assert torch.equal(model.to_latent(pixels), posterior.mode() * 0.25)
    drawn = model.to_latent(pixels, torch.Generator().manual_seed(4))
    assert torch.equal(drawn, posterior.sample(torch.Generator().manual_seed(4)) * 0.25)
    assert torch.equal(model.to_pixels(drawn), model.decode(drawn / 0.25))


@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 9])
@torch.no_grad()
def test_decoding_in_parts_is_decoding(tiny, at_once):
    latent = torch.randn(5, 4, 3, 4)
    sizes = []
    hook = tiny.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    in_parts = tiny.decode(latent, at_once=at_once)
    hook.remove()
    assert max(sizes) == min(at_once, 5) and sum(sizes) == 5            # no more memory than asked for
    torch.testing.assert_close(in_parts, tiny.decode(latent), rtol=1e-5, atol=1e-5)
    assert torch.equal(tiny.to_pixels(latent, at_once=at_once), in_parts)


@torch.no_grad()
def test_images_of_a_batch_do_not_mix(tiny):
    pixels = torch.rand(3, 3, 8, 8) * 2 - 1
    changed = pixels.clone()
    changed[1] = 0
    before, after = tiny.encode(pixels).mean, tiny.encode(changed).mean
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


@torch.no_grad()
def test_arguments_are_left_as_they_were(tiny):
    pixels, latent = torch.rand(1, 3, 8, 8), torch.randn(1, 4, 4, 4)
    copies = pixels.clone(), latent.clone()
    tiny.to_latent(pixels), tiny.to_pixels(latent)
    assert torch.equal(pixels, copies[0]) and torch.equal(latent, copies[1])


def test_an_empty_batch_is_an_empty_batch(tiny):
    assert tiny.to_pixels(torch.empty(0, 4, 4, 4)).shape == (0, 3, 8, 8)


# --- errors -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, near", [
    ((100, 128), "96 x 128"), ((128, 101), "128 x 104"), ((3, 3), "8 x 8"),
])
def test_size_that_is_no_multiple(size, near):
    with torch.device("meta"):
        model, pixels = VAE(PRESETS["mini"].vae), torch.empty(1, 3, *size)
    with pytest.raises(ValueError, match=rf"multiples of 8, .* {size[0]} x {size[1]}: .* {near}$"):
        model.encode(pixels)


@pytest.mark.parametrize("pixels, message", [
    (torch.zeros(3, 8, 8), r"\(batch, 3, height, width\), not \(3, 8, 8\)"),
    (torch.zeros(1, 4, 8, 8), r"not \(1, 4, 8, 8\)"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating-point.*uint8.*127.5"),
    (torch.zeros(1, 3, 0, 8), "multiples of 2"),
])
def test_pixels_of_the_wrong_kind(tiny, pixels, message):
    with pytest.raises(ValueError, match=message):
        tiny.encode(pixels)


def test_latents_of_the_wrong_shape(tiny):
    with pytest.raises(ValueError, match=r"\(batch, 4, height, width\), not \(1, 3, 8, 8\)"):
        tiny.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="at least 1, not 0"):
        tiny.decode(torch.zeros(1, 4, 8, 8), at_once=0)
