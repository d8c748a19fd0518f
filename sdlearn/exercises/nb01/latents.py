"""Exercises of notebook 01: PSNR, the reparameterisation trick, the KL divergence, the scaling of latents."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...config import VAEConfig
from ...images import psnr
from ...vae import VAE, DiagonalGaussian
from ..testing import randn, require, require_shape
from . import lesson

# --- 1.1 ----------------------------------------------------------------------------------------------

decibels = lesson.exercise(
    1, psnr, grade="guided", minutes=4,
    asks="Write `psnr(a, b)`: peak signal-to-noise ratio in dB of each image, (B,), for pixels (B, 3, H, W) in "
         "[-1, 1]: ten times the decimal logarithm of peak squared over the mean squared error.",
    hints=["The peak is the largest difference that two pixels can have: how far is it from -1 to 1?",
           "The mean runs over all numbers of one image, and not over the batch: `.mean(dim=(1, 2, 3))`.",
           "`10 * torch.log10(peak**2 / error)`, and the peak is 2."])

ONE, OTHER = randn(3, 3, 8, 8).clamp(-1, 1), randn(3, 3, 8, 8, seed=1).clamp(-1, 1)  # (B, 3, H, W)
NEAR = ONE + torch.tensor([0.01, 0.1, 0.3])[:, None, None, None] * randn(3, 3, 8, 8, seed=2)


@decibels.test("shape")
def one_number_for_each_image(psnr):
    psnr.agrees(lambda answer: answer(ONE, NEAR) * 0)


@decibels.test("value")
def of_images_near_to_each_other(psnr):
    psnr.same(ONE, NEAR)


@decibels.test("value")
def of_other_images(psnr):
    psnr.same(ONE, OTHER)


@decibels.test("edge case")
def equal_images_have_no_error(psnr):
    require(bool(psnr(ONE, ONE).isposinf().all()), "Two equal images have no error, so the ratio is infinite: log of "
            "a number over zero is `inf` in PyTorch, and nothing has to be added to the error")


def of_errors(made: Callable, error: Callable = lambda off: off.square().mean(dim=(1, 2, 3))) -> Callable:
    return lambda a, b: made(error(a - b))


for diagnosis, answer in [
    ("the peak is that of a range from 0 to 1: here pixels go from -1 to 1", of_errors(lambda e: -10 * e.log10())),
    ("the peak is that of bytes, 255: these pixels go from -1 to 1", of_errors(lambda e: 10 * (255**2 / e).log10())),
    ("the peak is not squared, while the error is", of_errors(lambda e: 10 * (2 / e).log10())),
    ("20 log10 goes with the root of the mean squared error", of_errors(lambda e: 20 * (4 / e).log10())),
    ("the factor 10 is missing: a decibel is a tenth of a bel", of_errors(lambda e: (4 / e).log10())),
    ("decibels are made with the decimal logarithm, and this is the natural one",
     of_errors(lambda e: 10 * (4 / e).log())),
    ("the fraction is inverted: the more error, the fewer decibels", of_errors(lambda e: 10 * (e / 4).log10())),
    ("the errors of an image are summed up: take their mean",
     of_errors(lambda e: 10 * (4 / e).log10(), lambda off: off.square().sum(dim=(1, 2, 3)))),
    ("this is the mean absolute error: square first",
     of_errors(lambda e: 10 * (4 / e).log10(), lambda off: off.abs().mean(dim=(1, 2, 3)))),
    ("this is the square of the mean, where errors up and down cancel out: square first",
     of_errors(lambda e: 10 * (4 / e).log10(), lambda off: off.mean(dim=(1, 2, 3)).square())),
    ("the mean runs over the batch as well: give one number for each image",
     of_errors(lambda e: 10 * (4 / e).log10(), lambda off: off.square().mean())),
    ("this is one number for the whole batch: give a tensor with one for each image",
     of_errors(lambda e: 10 * math.log10(4 / e), lambda off: off.square().mean())),
    ("the mean runs over the colours alone: it runs over rows and columns as well",
     of_errors(lambda e: 10 * (4 / e).log10(), lambda off: off.square().mean(dim=1))),
]:
    decibels.mistake(diagnosis)(answer)


# --- 1.5 ----------------------------------------------------------------------------------------------

reparameterise = lesson.exercise(
    5, DiagonalGaussian.sample, name="reparameterise", grade="guided", minutes=4,
    asks="Write `reparameterise(posterior, generator=None)`: a sample (B, Z, h, w) of the Gaussian whose `mean` and "
         "`logvar` the posterior holds, through which gradients reach both. The noise comes from the generator.",
    beyond="In the package it is the method `Gaussian.sample`, and its noise is the same on every device.",
    hints=["Do not draw *from* the Gaussian: draw standard normal noise, and make of it what you want.",
           "logvar is the logarithm of the *variance*. What is the standard deviation?",
           "`mean + std * noise`, with noise = `torch.randn(mean.shape, generator=generator)` and std = "
           "`torch.exp(0.5 * logvar)`."])

MEAN, LOGVAR = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1) - 1                      # (B, Z, h, w)


def posterior(mean: Tensor = MEAN, logvar: Tensor = LOGVAR) -> DiagonalGaussian:
    """A Gaussian that nobody else holds, so that nobody can spoil it for others."""
    return DiagonalGaussian(mean.detach().clone(), logvar.detach().clone())


def drawn(answer: Callable, seed: int = 3, **given) -> Tensor:
    return answer(posterior(**given), torch.Generator().manual_seed(seed))


@reparameterise.test("shape")
def a_sample_has_the_shape_of_the_mean(reparameterise):
    require_shape(drawn(reparameterise), MEAN.shape, "The sample")


@reparameterise.test("value")
def of_a_gaussian_around_zero(reparameterise):
    reparameterise.agrees(lambda answer: drawn(answer, mean=torch.zeros_like(MEAN)),
                          what="With a mean of zero, the sample")


@reparameterise.test("value")
def of_any_gaussian(reparameterise):
    reparameterise.agrees(drawn, what="The sample")


@reparameterise.test("value")
def gradients_reach_mean_and_logvar(reparameterise):
    def gradients(answer):
        mean, logvar = MEAN.clone().requires_grad_(), LOGVAR.clone().requires_grad_()
        answer(DiagonalGaussian(mean, logvar), torch.Generator().manual_seed(3)).sum().backward()
        return [torch.zeros_like(one) if one.grad is None else one.grad for one in (mean, logvar)]
    reparameterise.agrees(gradients, what="The gradient (of the mean, of logvar)")


@reparameterise.test("edge case")
def without_a_generator_each_call_is_another(reparameterise):
    one, other = reparameterise(posterior()), reparameterise(posterior())
    require(not torch.equal(one, other), "Without a generator two calls give the same sample: new noise must be drawn")


@reparameterise.test("edge case")
def the_posterior_is_unchanged(reparameterise):
    given = posterior()
    reparameterise(given, torch.Generator().manual_seed(3))
    require(torch.equal(given.mean, MEAN) and torch.equal(given.logvar, LOGVAR),
            "The posterior's own tensors have changed: compute without operations in place")


def with_noise(made: Callable, noise: Callable = torch.randn) -> Callable:
    """A sample as `made(mean, logvar, noise)`."""
    return lambda posterior, generator=None: made(
        posterior.mean, posterior.logvar, noise(posterior.mean.shape, generator=generator))


for diagnosis, answer in [
    ("no gradient reaches logvar: the standard deviation was taken out of the graph",
     with_noise(lambda m, lv, n: m + (0.5 * lv).exp().detach() * n)),
    ("exp(logvar) is the variance: noise is scaled by its root", with_noise(lambda m, lv, n: m + lv.exp() * n)),
    ("logvar is a logarithm: take exp of half of it", with_noise(lambda m, lv, n: m + lv * n)),
    ("this scales by exp(logvar / 4): one root is enough", with_noise(lambda m, lv, n: m + lv.exp().sqrt().sqrt() * n)),
    ("this is one over the standard deviation: where is the sign of logvar turned?",
     with_noise(lambda m, lv, n: m + (-0.5 * lv).exp() * n)),
    ("the mean is missing", with_noise(lambda m, lv, n: (0.5 * lv).exp() * n + 0 * m)),
    ("the mean is scaled as well: only the noise is", with_noise(lambda m, lv, n: (0.5 * lv).exp() * (m + n))),
    ("the noise is not scaled: its standard deviation is to be that of the posterior",
     with_noise(lambda m, lv, n: m + n + 0 * lv)),
    ("this is the mean alone: a sample has noise",
     lambda posterior, generator=None: posterior.mean + 0 * posterior.logvar),
    ("the noise is uniform, `rand`: it must be normal, `randn`",
     with_noise(lambda m, lv, n: m + (0.5 * lv).exp() * n, torch.rand)),
    ("all places share one number of noise", with_noise(
        lambda m, lv, n: m + (0.5 * lv).exp() * n, lambda shape, generator: torch.randn((), generator=generator))),
    ("the noise does not come from the generator that was given", lambda posterior, generator=None:
     posterior.mean + posterior.std * torch.randn(posterior.mean.shape)),
    ("no gradient reaches the two: what is drawn from the Gaussian is no function of its mean and its logvar",
     lambda posterior, generator=None: DiagonalGaussian(posterior.mean, posterior.logvar).sample(generator).detach()
     .requires_grad_()),
]:
    reparameterise.mistake(diagnosis)(answer)


# --- 1.6 ----------------------------------------------------------------------------------------------

divergence = lesson.exercise(
    6, DiagonalGaussian.kl, name="gaussian_kl", grade="supported", minutes=8,
    asks="Write `gaussian_kl(posterior)`: the Kullback-Leibler divergence of the diagonal Gaussian from the standard "
         "normal, in nats, summed for each image: (B,), in float32 whatever the type of mean and logvar.",
    beyond="In the package it is the method `Gaussian.kl`.",
    hints=["The numbers of a latent are independent, so their divergences add up: find that of one number first.",
           "KL(q||p) is the mean under q of log q - log p. Under q the mean of z² is mean² + variance, and that of "
           "(z - mean)² / variance is 1.",
           "The terms of one number: half of mean² + variance - 1 - logvar. Where mean is 0 and logvar 0, that is 0.",
           "`0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))`, after `.float()`."])


@divergence.test("shape")
def one_number_for_each_posterior(gaussian_kl):
    gaussian_kl.agrees(lambda answer: answer(posterior()) * 0, what="The divergence")


@divergence.test("value")
def of_the_standard_normal_itself(gaussian_kl):
    gaussian_kl.agrees(lambda answer: answer(posterior(MEAN * 0, LOGVAR * 0)),
                       what="Of the standard normal from itself, the divergence")


@divergence.test("value")
def of_a_shifted_one(gaussian_kl):
    gaussian_kl.agrees(lambda answer: answer(posterior(MEAN, LOGVAR * 0)),
                       what="With logvar 0, where only the mean counts, the divergence")


@divergence.test("value")
def of_any_posterior(gaussian_kl):
    gaussian_kl.agrees(lambda answer: answer(posterior()), what="The divergence")


@divergence.test("edge case")
def in_half_precision(gaussian_kl):
    wide = posterior(200 * MEAN.half(), LOGVAR.half())              # squares beyond 65504, the end of float16
    gaussian_kl.agrees(lambda answer: answer(wide), what="With float16, the divergence")


def of_terms(made: Callable, total: Callable = lambda terms: terms.sum(dim=(1, 2, 3))) -> Callable:
    return lambda posterior: total(made(posterior.mean.float(), posterior.logvar.float()))


def right_terms(mean: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


for diagnosis, answer in [
    ("the half is missing", of_terms(lambda m, lv: m.square() + lv.exp() - 1 - lv)),
    ("everything has the wrong sign: a divergence is never below zero", of_terms(lambda m, lv: -right_terms(m, lv))),
    ("logvar has the wrong sign: the divergence of a narrow posterior is large, since -logvar grows",
     of_terms(lambda m, lv: 0.5 * (m.square() + lv.exp() - 1 + lv))),
    ("the - 1 is missing: the divergence of the standard normal from itself is 0",
     of_terms(lambda m, lv: 0.5 * (m.square() + lv.exp() - lv))),
    ("the mean counts by its square", of_terms(lambda m, lv: 0.5 * (m + lv.exp() - 1 - lv))),
    ("exp(logvar) has the wrong sign: the mean under q of z² is mean² + variance",
     of_terms(lambda m, lv: 0.5 * (m.square() - lv.exp() - 1 - lv))),
    ("the variance is missing: a posterior that is too wide must cost something as well",
     of_terms(lambda m, lv: 0.5 * (m.square() - lv))),
    ("the standard deviation is used for the variance, in both places: logvar is the logarithm of the variance",
     of_terms(lambda m, lv: 0.5 * (m.square() + (lv / 2).exp() - 1 - lv / 2))),
    ("the mean is missing: a posterior far from zero must cost something",
     of_terms(lambda m, lv: 0.5 * (lv.exp() - 1 - lv))),
    ("exp(logvar / 2) is the standard deviation where the variance is needed",
     of_terms(lambda m, lv: 0.5 * (m.square() + (lv / 2).exp() - 1 - lv))),
    ("the variance is used where its logarithm is needed: exp is taken once too often, or the log is missing",
     of_terms(lambda m, lv: 0.5 * (m.square() + lv.exp() - 1 - lv.exp()))),
    ("this is KL(p||q), the divergence of the standard normal from the posterior: the other way round",
     of_terms(lambda m, lv: 0.5 * ((1 + m.square()) / lv.exp() - 1 + lv))),
    ("this is in bits: nats come of the natural logarithm",
     of_terms(lambda m, lv: right_terms(m, lv) / math.log(2))),
    ("this is the mean over the numbers of a latent: sum them up",
     of_terms(right_terms, lambda terms: terms.mean(dim=(1, 2, 3)))),
    ("the batch is summed up as well: give one number for each image", of_terms(right_terms, torch.sum)),
    ("only the channels are summed up: the sum runs over rows and columns as well",
     of_terms(right_terms, lambda t: t.sum(dim=1))),
    ("float16 ends at 65504, and the square of the mean is beyond: compute in float32",
     lambda posterior: right_terms(posterior.mean, posterior.logvar).sum(dim=(1, 2, 3)).float()),
]:
    divergence.mistake(diagnosis)(answer)


# --- 1.7 ----------------------------------------------------------------------------------------------

scaled = lesson.exercise(
    7, VAE.to_latent, VAE.to_pixels, name="scaled", grade="on your own", minutes=8,
    asks="Write `to_latent(vae, pixels, generator=None)` and `to_pixels(vae, latent)`: between pixels and the scaled "
         "latents that the U-Net works with. The mode of the posterior, or a sample where there is a generator.",
    beyond="In the package they are methods of `VAE`, and `to_pixels` can decode a few images at a time.",
    hints=["`vae.encode(pixels)` gives a Gaussian with `mode()` and `sample(generator)`, `vae.decode(latent)` gives "
           "pixels; neither knows of the factor, `vae.config.scaling_factor`.",
           "Scaled latents have a standard deviation near 1. Stable Diffusion's unscaled ones have about 5.5, and its "
           "factor is 0.18215: is that multiplied, or divided by?",
           "What is multiplied at the one end is divided at the other; and a sample is scaled as a whole, noise too."])

VAES = VAEConfig(channels=(4, 8), layers_per_block=1, groups=2, scaling_factor=0.3)
PIXELS = randn(2, 3, 8, 8, seed=4).clamp(-1, 1)                                     # (B, 3, H, W)
LATENT = randn(2, 4, 4, 4, seed=5)                                                  # (B, Z, h, w)


def small_vae(factor: float = 0.3) -> VAE:
    """The same one each time; its posteriors are so wide that a sample differs from the mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = VAE(VAEConfig(**{**vars(VAES), "scaling_factor": factor}))
        torch.nn.init.constant_(vae.quant_conv.bias[VAES.latent_channels:], -1.0)
        vae.decoder.conv_out.weight.data *= 4                       # some pixels beyond -1 and 1
    return vae.requires_grad_(False).eval()


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(6)


@scaled.test("shape")
def there_and_back(to_latent, to_pixels):
    vae = small_vae()
    require_shape(to_latent(vae, PIXELS), LATENT.shape, "The latent")
    require_shape(to_pixels(vae, LATENT), PIXELS.shape, "The image")


@scaled.test("value")
def the_mode(to_latent, to_pixels):
    to_latent.agrees(lambda answer: answer(small_vae(), PIXELS), what="Without a generator, the latent")


@scaled.test("value")
def a_sample(to_latent, to_pixels):
    to_latent.agrees(lambda answer: answer(small_vae(), PIXELS, noise()), what="With a generator, the latent")


@scaled.test("value")
def the_image(to_latent, to_pixels):
    to_pixels.agrees(lambda answer: answer(small_vae(), LATENT), what="The image")


@scaled.test("edge case")
def another_factor(to_latent, to_pixels):
    to_latent.agrees(lambda answer: answer(small_vae(2.0), PIXELS), what="With a factor of 2, the latent")
    to_pixels.agrees(lambda answer: answer(small_vae(2.0), 9 * LATENT), what="Of a large latent, the image")


def chosen(posterior: DiagonalGaussian, generator: torch.Generator | None) -> Tensor:
    return posterior.mode() if generator is None else posterior.sample(generator)


for diagnosis, answer in [
    ("the factor is left out", lambda vae, pixels, generator=None: chosen(vae.encode(pixels), generator)),
    ("it is divided by the factor: on this side it is multiplied",
     lambda vae, pixels, generator=None: chosen(vae.encode(pixels), generator) / vae.config.scaling_factor),
    ("the pixels are multiplied before they are encoded: it is the latent that is scaled",
     lambda vae, pixels, generator=None: chosen(vae.encode(vae.config.scaling_factor * pixels), generator)),
    ("the generator is not used: where there is one, a sample is asked for",
     lambda vae, pixels, generator=None: vae.encode(pixels).mode() * vae.config.scaling_factor),
    ("a sample is drawn even without a generator: then the mode is asked for",
     lambda vae, pixels, generator=None: vae.encode(pixels).sample(generator) * vae.config.scaling_factor),
    ("the mean is scaled and the noise is not: scale the whole sample", lambda vae, pixels, generator=None: (
        posterior := vae.encode(pixels)).mean * vae.config.scaling_factor
        + (0 if generator is None else posterior.sample(generator) - posterior.mean)),
    ("0.18215 is Stable Diffusion's: each autoencoder has its own, in its config",
     lambda vae, pixels, generator=None: chosen(vae.encode(pixels), generator) * 0.18215),
]:
    scaled.mistake(diagnosis, of="to_latent")(answer)
for diagnosis, answer in [
    ("the factor is left out", lambda vae, latent: vae.decode(latent)),
    ("it is multiplied by the factor: what was multiplied must be divided",
     lambda vae, latent: vae.decode(latent * vae.config.scaling_factor)),
    ("the image is divided by the factor: it is the latent that is scaled, before it is decoded",
     lambda vae, latent: vae.decode(latent) / vae.config.scaling_factor),
    ("0.18215 is Stable Diffusion's: each autoencoder has its own, in its config",
     lambda vae, latent: vae.decode(latent / 0.18215)),
    ("the image is cut off at -1 and 1: leave that to who shows it, for a loss needs what lies beyond",
     lambda vae, latent: vae.to_pixels(latent).clamp(-1, 1)),
]:
    scaled.mistake(diagnosis, of="to_pixels")(answer)
