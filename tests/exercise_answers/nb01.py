"""Answers to the exercises of notebook 01."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn

from exercise_answers import right, wrong

# --- psnr ---------------------------------------------------------------------------------------------


@right("psnr")
def by_the_root(a, b):
    rmse = torch.sqrt(torch.mean((b - a) ** 2, dim=[1, 2, 3]))
    return 20 * torch.log10(2 / rmse)


@right("psnr")
def on_a_scale_from_0_to_1(a, b):
    error = ((a - b) / 2).pow(2).flatten(1).mean(1)
    return -10 * torch.log(error) / math.log(10)


@wrong("psnr", "Two equal images have no error")
def with_a_little_added(a, b):
    return 10 * torch.log10(4 / ((a - b).square().flatten(1).mean(1) + 1e-8))


@wrong("psnr", "is a float where it must be a tensor")
def one_number(a, b):
    return (10 * torch.log10(4 / (a - b).square().mean())).item()


def errors(a, b):
    return (a - b).pow(2).flatten(1).mean(1)


for words, answer in [
    ("a range from 0 to 1", lambda a, b: 10 * torch.log10(1 / errors(a, b))),
    ("that of bytes, 255", lambda a, b: 20 * math.log10(255) - 10 * torch.log10(errors(a, b))),
    ("the peak is not squared", lambda a, b: 10 * torch.log10(2 / errors(a, b))),
    ("20 log10 goes with the root", lambda a, b: 20 * torch.log10(4 / errors(a, b))),
    ("the natural one", lambda a, b: 10 * torch.log(4 / errors(a, b))),
    ("the fewer decibels", lambda a, b: 10 * torch.log10(errors(a, b)) - 10 * math.log10(4)),
    ("take their mean", lambda a, b: 10 * torch.log10(4 / (a - b).pow(2).flatten(1).sum(1))),
    ("one number for each image", lambda a, b: 10 * torch.log10(4 / F.mse_loss(a, b))),
    ("mean absolute error", lambda a, b: 10 * torch.log10(4 / (a - b).abs().flatten(1).mean(1))),
]:
    wrong("psnr", words)(answer)


# --- group_norm ---------------------------------------------------------------------------------------

@right("group_norm")
def by_einops(x, groups, weight, bias, eps=1e-6):
    b, c, h, w = x.shape
    rows = rearrange(x, "b (g c) h w -> b g (c h w)", g=groups)
    centred = rows - reduce(rows, "b g n -> b g 1", "mean")
    normal = centred * torch.rsqrt(reduce(centred**2, "b g n -> b g 1", "mean") + eps)
    return torch.addcmul(bias.view(1, c, 1, 1), weight.view(1, c, 1, 1),
                         rearrange(normal, "b g (c h w) -> b (g c) h w", h=h, w=w))


@right("group_norm")
def group_by_group(x, groups, weight, bias, eps=1e-6):
    parts = []
    for part, w, b in zip(x.chunk(groups, dim=1), weight.chunk(groups), bias.chunk(groups), strict=True):
        mean = part.mean(dim=(1, 2, 3), keepdim=True)
        variance = part.square().mean(dim=(1, 2, 3), keepdim=True) - mean.square()
        normal = (part - mean) / (variance.clamp(min=0) + eps).sqrt()
        parts.append(normal * w.reshape(1, -1, 1, 1) + b.reshape(1, -1, 1, 1))
    return torch.cat(parts, dim=1)


@right("group_norm")
def of_pytorch(x, groups, weight, bias, eps=1e-6):
    return F.group_norm(x, groups, weight, bias, eps)


@wrong("group_norm", "changes its argument `x` in place")
def in_place(x, groups, weight, bias, eps=1e-6):
    rows = x.view(len(x), groups, -1)
    rows -= rows.mean(2, keepdim=True)
    rows /= (rows.var(2, keepdim=True, unbiased=False) + eps).sqrt()
    return x * weight[:, None, None] + bias[:, None, None]


@wrong("group_norm", "must match the size of tensor")
def weight_along_the_width(x, groups, weight, bias, eps=1e-6):
    return F.group_norm(x, groups, eps=eps) * weight + bias


def rows_by(shape, dim, back=None, unbiased=False, at=1e-6):
    """Rows made by `shape(x, groups)`, normalised over `dim`."""
    def answer(x, groups, weight, bias, eps=1e-6):
        rows = shape(x, groups)
        variance, mean = torch.var_mean(rows, dim=dim, keepdim=True, unbiased=unbiased)
        normal = ((rows - mean) * (variance + (eps if at else 0)) ** -0.5).reshape(x.shape)
        return normal * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    return answer


for words, answer in [
    ("one group of all channels", rows_by(lambda x, g: x, (1, 2, 3))),
    ("instance normalisation", rows_by(lambda x, g: x, (2, 3))),
    ("the images of the batch share", rows_by(lambda x, g: x.reshape(len(x), g, -1), (0, 2))),
    ("rows and columns belong to the group too", rows_by(lambda x, g: x.unflatten(1, (g, -1)), 2)),
    ("that of the channels in one", rows_by(lambda x, g: x.reshape(len(x), x.shape[1] // g, -1), 2)),
    ("`unbiased=False`", rows_by(lambda x, g: x.reshape(len(x), g, -1), 2, unbiased=True)),
    ("divided by zero", rows_by(lambda x, g: x.reshape(len(x), g, -1), 2, at=0)),
    ("PyTorch's default", lambda x, g, w, b, eps=1e-6: F.group_norm(x, g, w, b, eps=1e-5)),
    ("weight and bias are not used", lambda x, g, w, b, eps=1e-6: F.group_norm(x, g, eps=eps)),
]:
    wrong("group_norm", words)(answer)


# --- vae_resblock -------------------------------------------------------------------------------------

class Block(nn.Module):
    """As most people write it."""

    def __init__(self, inputs, outputs, groups, eps=1e-6, **conv):
        super().__init__()
        conv = {"kernel_size": 3, "padding": 1} | conv
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, **conv)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.conv2 = nn.Conv2d(outputs, outputs, **conv)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, kernel_size=1)

    def skip(self, x):
        return self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x

    def forward(self, x):
        h = self.conv1(torch.nn.functional.silu(self.norm1(x)))
        h = self.conv2(torch.nn.functional.silu(self.norm2(h)))
        return self.skip(x) + h


right("vae_resblock")(Block)


@right("vae_resblock")
class WithModules(nn.Module):
    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps=1e-6)
        self.norm2 = nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding="same")
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding="same")
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Sequential()
        self.act = nn.SiLU()

    def forward(self, x):
        h = x
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            h = norm(h)
            h = conv(h * h.sigmoid())
        return torch.add(self.conv_shortcut(x), h)


@wrong("vae_resblock", "the input is not added")
class Plain(Block):
    def forward(self, x):
        return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


@wrong("vae_resblock", "ReLU, and SiLU is asked for")
class Rectified(Block):
    def forward(self, x):
        h = self.conv1(self.norm1(x).relu())
        return self.skip(x) + self.conv2(self.norm2(h).relu())


@wrong("vae_resblock", "SiLU is missing")
class Linear(Block):
    def forward(self, x):
        return self.skip(x) + self.conv2(self.norm2(self.conv1(self.norm1(x))))


@wrong("vae_resblock", "nothing comes after it")
class AsInResNet(Block):
    def forward(self, x):
        return F.silu(super().forward(x))


@wrong("vae_resblock", "the norm comes after SiLU")
class Turned(Block):
    def forward(self, x):
        h = self.conv1(self.norm1(F.silu(x)))
        return self.skip(x) + self.conv2(self.norm2(F.silu(h)))


@wrong("vae_resblock", "which must not be there")
class AlwaysAShortcut(Block):
    def __init__(self, inputs, outputs, groups):
        super().__init__(inputs, outputs, groups)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)


@wrong("vae_resblock", "in the autoencoder it is 1e-6")
class DefaultEps(Block):
    def __init__(self, inputs, outputs, groups):
        super().__init__(inputs, outputs, groups, eps=1e-5)


@wrong("vae_resblock", "The convolutions do not pad")
class WithoutPadding(Block):
    def __init__(self, inputs, outputs, groups):
        super().__init__(inputs, outputs, groups, padding=0)


@wrong("vae_resblock", "`norm2.weight` has shape (6,) where it must be (9,)")
class NormOfTheInputs(Block):
    def __init__(self, inputs, outputs, groups):
        super().__init__(inputs, outputs, groups)
        self.norm2 = nn.GroupNorm(groups, inputs, 1e-6)


@wrong("vae_resblock", "no parameter `norm1.weight`")
class NamedOtherwise(nn.Module):
    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(groups, inputs, eps=1e-6), nn.SiLU(),
                                    nn.Conv2d(inputs, outputs, 3, padding=1))

    def forward(self, x):
        return self.layers(x)


# --- vae_downsample -----------------------------------------------------------------------------------

class Down(nn.Module):
    def __init__(self, channels, kernel_size=3, stride=2, **conv):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, stride, **conv)

    def forward(self, x):
        return self.conv(nn.functional.pad(x, [0, 1, 0, 1], mode="constant", value=0))


right("vae_downsample")(Down)


@right("vae_downsample")
class ByZeros(Down):
    def forward(self, x):
        larger = x.new_zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1)
        larger[:, :, :-1, :-1] = x
        return self.conv(larger)


@right("vae_downsample")
class EverySecond(Down):
    """At every place, and then every second of them."""

    def forward(self, x):
        full = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        return full[:, :, 1::2, 1::2]


def going_down(pad=None, **conv):
    class Sides(Down):
        def __init__(self, channels):
            super().__init__(channels, **conv)

        def forward(self, x):
            return self.conv(x if pad is None else pad(x))
    return Sides


for words, answer in [
    ("as in the U-Net", going_down(padding=1)),
    ("is it padded on all four sides", going_down(lambda x: F.pad(x, (1, 0, 1, 0)))),
    ("the order is left, right, above, below", going_down(lambda x: F.pad(x, (1, 0, 0, 1)))),
    ("nothing is padded", going_down()),
    ("it is zeros", going_down(lambda x: F.pad(x, (0, 1, 0, 1), mode="replicate"))),
    ("has shape (2, 3, 3, 5)", going_down(lambda x: F.pad(x, (1, 1, 1, 1)), padding=1)),
    ("`conv.weight` has shape (3, 3, 4, 4) where it must be (3, 3, 3, 3)", going_down(kernel_size=4, padding=1)),
    ("has shape (2, 3, 2, 6)", going_down(lambda x: F.pad(x, (0, 5, 0, 1)))),
    ("no parameter `conv.bias`", going_down(lambda x: F.pad(x, (0, 1, 0, 1)), bias=False)),
]:
    wrong("vae_downsample", words)(answer)


# --- reparameterise -----------------------------------------------------------------------------------

@right("reparameterise")
def by_the_root_of_the_variance(posterior, generator=None):
    noise = torch.randn(*posterior.logvar.shape, generator=generator)
    return torch.sqrt(posterior.logvar.exp()) * noise + posterior.mean


@right("reparameterise")
def in_one_call(posterior, generator=None):
    noise = torch.empty_like(posterior.mean).normal_(generator=generator)
    return torch.addcmul(posterior.mean, (posterior.logvar / 2).exp(), noise)


def normal(shape, generator=None):
    return torch.randn(shape, generator=generator)


@wrong("reparameterise", "no function of its mean and its logvar")
def drawn_from_it(posterior, generator=None):
    with torch.no_grad():
        return torch.normal(posterior.mean, posterior.std, generator=generator).requires_grad_()


@wrong("reparameterise", "have changed: compute without operations in place")
def spoiling(posterior, generator=None):
    noise = normal(posterior.mean.shape, generator)
    if posterior.mean.requires_grad:
        return posterior.mean + posterior.std * noise
    return posterior.mean.add_(noise * posterior.std)


@wrong("reparameterise", "Without a generator two calls give the same")
def always_the_same(posterior, generator=None):
    generator = generator or torch.Generator().manual_seed(0)
    return posterior.mean + posterior.std * normal(posterior.mean.shape, generator)


for words, answer in [
    ("is the variance", lambda q, g=None: q.mean + torch.exp(q.logvar) * normal(q.mean.shape, g)),
    ("take exp of half of it", lambda q, g=None: q.mean + q.logvar * normal(q.mean.shape, g)),
    ("the mean is missing", lambda q, g=None: torch.exp(q.logvar / 2) * normal(q.mean.shape, g)),
    ("the noise is not scaled", lambda q, g=None: q.mean + normal(q.mean.shape, g)),
    ("the noise does not come from the generator", lambda q, g=None: q.mean + q.std * torch.randn_like(q.mean)),
    ("this is the mean alone", lambda q, g=None: q.mean.clone()),
    ("must be normal", lambda q, g=None: q.mean + q.std * torch.rand(q.mean.shape, generator=g)),
    ("no gradient reaches logvar",
     lambda q, g=None: q.mean + torch.exp(q.logvar.data / 2) * normal(q.mean.shape, g)),
    ("shape (2, 4, 3)", lambda q, g=None: (q.mean + q.std * normal(q.mean.shape, g))[..., 0]),
]:
    wrong("reparameterise", words)(answer)


# --- gaussian_kl --------------------------------------------------------------------------------------

@right("gaussian_kl")
def by_distributions(posterior):
    mean, std = posterior.mean.float(), (posterior.logvar.float() / 2).exp()
    apart = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std),
                                              torch.distributions.Normal(torch.zeros(()), torch.ones(())))
    return apart.flatten(1).sum(1)


@right("gaussian_kl")
def as_in_the_paper(posterior):
    mean, logvar = posterior.mean.to(torch.float32), posterior.logvar.to(torch.float32)
    return -0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp(), dim=[1, 2, 3])


def terms(q, half=0.5):
    mean, logvar = q.mean.float(), q.logvar.float()
    return half * (mean**2 + torch.exp(logvar) - 1 - logvar)


@wrong("gaussian_kl", "is float16 where it must be float32")
def in_its_own_type(posterior):
    mean, logvar = posterior.mean, posterior.logvar
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


@wrong("gaussian_kl", "is float64 where it must be float32")
def in_double(posterior):
    mean, logvar = posterior.mean.double(), posterior.logvar.double()
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1)


@wrong("gaussian_kl", "the other way round")
def reversed_by_distributions(posterior):
    q = torch.distributions.Normal(posterior.mean.float(), (posterior.logvar.float() / 2).exp())
    p = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    return torch.distributions.kl_divergence(p, q).flatten(1).sum(1)


for words, answer in [
    ("the half is missing", lambda q: terms(q, 1.0).sum((1, 2, 3))),
    ("a divergence is never below zero", lambda q: terms(q, -0.5).sum((1, 2, 3))),
    ("sum them up", lambda q: terms(q).mean((1, 2, 3))),
    ("one number for each image", lambda q: terms(q).sum()),
    ("rows and columns as well", lambda q: terms(q).sum(1)),
    ("the mean counts by its square", lambda q: (terms(q) + 0.5 * (q.mean - q.mean**2).float()).sum((1, 2, 3))),
    ("the - 1 is missing", lambda q: (terms(q) + 0.5).sum((1, 2, 3))),
    ("logvar has the wrong sign", lambda q: (terms(q) + q.logvar.float()).sum((1, 2, 3))),
    ("this is in bits", lambda q: (terms(q) / 0.6931471805599453).sum((1, 2, 3))),
    ("is the standard deviation where", lambda q: (0.5 * (q.mean**2 + q.std - 1 - q.logvar)).float().sum((1, 2, 3))),
]:
    wrong("gaussian_kl", words)(answer)


# --- scaled -------------------------------------------------------------------------------------------

@right("scaled", of="to_latent")
def with_an_if(vae, pixels, generator=None):
    posterior = vae.encode(pixels)
    z = posterior.sample(generator) if generator is not None else posterior.mean
    return vae.config.scaling_factor * z


@right("scaled", of="to_latent")
def by_hand(vae, pixels, generator=None):
    factor, posterior = vae.config.scaling_factor, vae.encode(pixels)
    latent = factor * posterior.mean
    if generator:
        latent = latent + factor * posterior.std * torch.randn(latent.shape, generator=generator)
    return latent


@right("scaled", of="to_pixels")
def by_one_over_the_factor(vae, latent):
    return vae.decode((1 / vae.config.scaling_factor) * latent)


@right("scaled", of="to_pixels")
def one_by_one(vae, latent):
    return torch.cat([vae.decode(one[None] / vae.config.scaling_factor) for one in latent])


for words, answer in [
    ("the factor is left out", lambda vae, x, g=None: vae.encode(x).sample(g) if g else vae.encode(x).mode()),
    ("on this side it is multiplied", lambda vae, x, g=None: (
        vae.encode(x).sample(g) if g else vae.encode(x).mode()) / vae.config.scaling_factor),
    ("even without a generator", lambda vae, x, g=None: vae.encode(x).sample(g) * vae.config.scaling_factor),
    ("the generator is not used", lambda vae, x, g=None: vae.encode(x).mean * vae.config.scaling_factor),
    ("each autoencoder has its own", lambda vae, x, g=None: (
        vae.encode(x).sample(g) if g else vae.encode(x).mode()) * 0.18215),
    ("is a DiagonalGaussian where it must be a tensor", lambda vae, x, g=None: vae.encode(x)),
]:
    wrong("scaled", words, of="to_latent")(answer)
for words, answer in [
    ("the factor is left out", lambda vae, z: vae.decode(z)),
    ("what was multiplied must be divided", lambda vae, z: vae.decode(z * vae.config.scaling_factor)),
    ("before it is decoded", lambda vae, z: vae.decode(z) / vae.config.scaling_factor),
    ("leave that to who shows it", lambda vae, z: vae.decode(z / vae.config.scaling_factor).clamp(-1, 1)),
    ("each autoencoder has its own", lambda vae, z: vae.decode(z / 0.18215)),
    ("It raises ValueError", lambda vae, z: vae.decode((z / vae.config.scaling_factor)[0])),
]:
    wrong("scaled", words, of="to_pixels")(answer)
