"""Answers to the exercises of notebook 08."""

import copy
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from exercise_answers import right, wrong
from sdlearn.inpaint import soft_mask
from sdlearn.schedule import standard_noise
from sdlearn.unet import UNet

# --- latent_mask --------------------------------------------------------------------------------------


def checked(cells, mask, factor):
    if mask.shape[2] % factor or mask.shape[3] % factor:
        raise ValueError("no multiple")
    if not all(one.any() for one in cells):
        raise ValueError("too thin")
    return cells


@right("latent_mask")
def by_slice(mask, factor):
    return checked(mask[:, :, ::factor, ::factor], mask, factor)


@right("latent_mask")
def by_interpolation(mask, factor):
    if any(side % factor for side in mask.shape[-2:]):
        raise ValueError(f"sides must be multiples of {factor}")
    small = F.interpolate(mask, scale_factor=1 / factor, mode="nearest")
    if (small.amax(dim=(1, 2, 3)) == 0).any():
        raise ValueError("nothing left")
    return small


@right("latent_mask")
def by_squares(mask, factor):
    b, _, height, width = mask.shape
    if height % factor or width % factor:
        raise ValueError("no multiple")
    squares = mask.reshape(b, 1, height // factor, factor, width // factor, factor)
    return checked(squares[:, :, :, 0, :, 0] > 0.5, mask, factor)


for words, answer in [
    ("where *most* of a cell's pixels", lambda mask, factor: (F.avg_pool2d(mask, factor) > 0.5).float()),
    ("a mask is 0 or 1", lambda mask, factor: F.interpolate(mask, scale_factor=1 / factor, mode="area")),
    ("where *any* pixel of a cell is", lambda mask, factor: F.max_pool2d(mask, factor)),
    ("where *all* pixels of a cell are", lambda mask, factor: 1 - F.max_pool2d(1 - mask, factor)),
    ("in the middle of each cell", lambda mask, factor: mask[:, :, factor // 2::factor, factor // 2::factor]),
    ("the lower right pixel", lambda mask, factor: mask[:, :, factor - 1::factor, factor - 1::factor]),
    ("this interpolates between pixels",
     lambda mask, factor: F.interpolate(mask, scale_factor=1 / factor, mode="bilinear")),
    ("has shape (2, 1, 24, 32)", lambda mask, factor: mask),
    ("leaves no cell: that must raise ValueError", lambda mask, factor: mask[:, :, ::factor, ::factor]),
]:
    wrong("latent_mask", words)(answer)


@wrong("latent_mask", "The second mask of a batch has no cell left")
def looks_at_the_batch_as_one(mask, factor):
    small = mask[:, :, ::factor, ::factor]
    if not small.any():
        raise ValueError
    return small


@wrong("latent_mask", "12 rows of pixels are no multiple of 8")
def takes_any_size(mask, factor):
    return checked(mask[:, :, ::factor, ::factor], mask[:, :, :factor, :factor], factor)


# --- paste --------------------------------------------------------------------------------------------

@right("paste")
def by_shares(original, generated, mask, seam=0):
    share = soft_mask(mask, seam)
    return (1 - share) * original + share * generated


@right("paste")
def by_where(original, generated, mask, *, seam=0):
    share = soft_mask(mask, seam)
    return torch.where(share == 0, original, original + share * (generated - original))


def mixed(weight, swap=False):
    def paste(original, generated, mask, seam=0):
        a, b = (generated, original) if swap else (original, generated)
        share = weight(mask, seam)
        return torch.lerp(a, b, share.expand_as(a))
    return paste


for words, answer in [
    ("have changed places", mixed(soft_mask, swap=True)),
    ("`seam` is not used", mixed(lambda mask, seam: mask)),
    ("outside of the mask there is nothing", lambda o, g, mask, seam=0: soft_mask(mask, seam) * g),
    ("both are added up", lambda o, g, mask, seam=0: soft_mask(mask, seam) * g + o),
    ("stays hard", mixed(lambda mask, seam: F.max_pool2d(mask, 2 * seam + 1, 1, seam))),
    ("the mask is blurred", mixed(lambda mask, seam: F.avg_pool2d(mask, 2 * seam + 1, 1, seam))),
    ("must be (2, 3, 12, 16)", lambda o, g, mask, seam=0: mask * o[:1, :1] if seam else mask),
    ("not the original's bit for bit", lambda o, g, mask, seam=0: o + g - (1 - soft_mask(mask, seam)) * g
     - soft_mask(mask, seam) * o),
]:
    wrong("paste", words)(answer)


@wrong("paste", "changes its argument `original` in place")
def in_place(original, generated, mask, seam=0):
    return original.lerp_(generated, soft_mask(mask, seam).expand_as(original))


# --- blended_denoise ------------------------------------------------------------------------------------------

@right("blended_denoise")
def by_products(denoise, known, mask, noise, schedule):
    def denoise_known(x, t):
        entering = mask * x + (1 - mask) * schedule.add_noise(known, noise, t)
        return mask * denoise(entering, t) + (1 - mask) * known
    return denoise_known


@right("blended_denoise")
class Told:
    """A class with __call__ does as well as a function within a function."""

    def __init__(self, denoise, known, mask, noise, schedule):
        self.denoise, self.known, self.keep, self.noise, self.schedule = denoise, known, mask == 0, noise, schedule

    def __call__(self, x, t):
        alpha, sigma = self.schedule.at(t)
        noisy = alpha * self.known + sigma * self.noise
        return torch.where(self.keep, self.known, self.denoise(torch.where(self.keep, noisy, x), t))


def blends(enters=lambda known, noise, t, s: s.add_noise(known, noise, t), leaves=lambda known, noisy: known,
           flip=False):
    def answer(denoise, known, mask, noise, schedule):
        m = 1 - mask if flip else mask

        def denoise_known(x, t):
            noisy = enters(known, noise, t, schedule)
            x0 = denoise(x if noisy is None else m * x + (1 - m) * noisy, t)
            back = leaves(known, noisy)
            return x0 if back is None else m * x0 + (1 - m) * back
        return denoise_known
    return answer


for words, answer in [
    ("the mask is turned round", blends(flip=True)),
    ("enter without noise", blends(enters=lambda known, noise, t, s: known)),
    ("as much noise at every t", blends(enters=lambda known, noise, t, s: known + noise)),
    ("not replaced before the call", blends(enters=lambda known, noise, t, s: None)),
    ("not replaced after the call", blends(leaves=lambda known, noisy: None)),
    ("x0 is the clean latent", blends(leaves=lambda known, noisy: noisy)),
    ("the noise alone enters", blends(enters=lambda known, noise, t, s: noise)),
    ("not replaced before the call", lambda denoise, known, mask, noise, schedule: denoise),
    ("no noise of your own", blends(enters=lambda known, noise, t, s: s.add_noise(known, torch.randn(known.shape), t))),
    ("It must return a function", lambda denoise, known, mask, noise, schedule: known),
]:
    wrong("blended_denoise", words)(answer)


@wrong("blended_denoise", "changes `x` in place")
def writes_into_x(denoise, known, mask, noise, schedule):
    def denoise_known(x, t):
        keep = (mask == 0).expand_as(x)
        x[keep] = schedule.add_noise(known, noise, t).expand_as(x)[keep]
        return torch.where(keep, known, denoise(x, t))
    return denoise_known


@wrong("blended_denoise", "2 times for one call")
def twice(denoise, known, mask, noise, schedule):
    def denoise_known(x, t):
        seen = torch.where(mask == 0, schedule.add_noise(known, noise, t), x)
        return torch.where(mask == 0, denoise(seen, t) * 0 + known, denoise(seen, t))
    return denoise_known


# --- repaint ------------------------------------------------------------------------------------------

def blend_by(denoise, known, mask, noise, schedule):
    return by_products(denoise, known, mask, noise, schedule)


@right("repaint")
def with_a_while(sample, known, mask, *, times=10):
    def sampler(denoise, x, grid, schedule, *, generator=None):
        for index, (t, t_prev) in enumerate(grid):
            left = 1 if t_prev is None else times
            while True:
                noise = standard_noise(x, generator)
                [step] = list(sample(blend_by(denoise, known, mask, noise, schedule), x, [(t, t_prev)], schedule,
                                     generator=generator))
                x, left = step.x, left - 1
                if left == 0:
                    break
                variance = (schedule.alphas_cumprod[t] / schedule.alphas_cumprod[t_prev]).item()
                x = math.sqrt(variance) * x + math.sqrt(1 - variance) * standard_noise(x, generator)
            yield step._replace(index=index)
    return sampler


@right("repaint")
def going_back_first(sample, known, mask, times=10):
    def sampler(denoise, x, grid, schedule, generator=None):
        for index, (t, t_prev) in enumerate(grid):
            for i in range(times if t_prev is not None else 1):
                if i > 0:
                    k = schedule.at(t)[0] / schedule.at(t_prev)[0]
                    x = k * x + (1 - k * k) ** 0.5 * standard_noise(x, generator)
                denoise_known = blend_by(denoise, known, mask, standard_noise(x, generator), schedule)
                for step in sample(denoise_known, x, [(t, t_prev)], schedule, generator=generator):
                    x = step.x
            yield type(step)(index, t, x, step.x0)
    return sampler


def resampler(passes=lambda times, last: 1 if last else times, noise_each=True, blend=True, index_of=lambda i: i,
              up=None, each=False, too_late=False):
    forward = up or (lambda x, noise, k, s, t: k * x + math.sqrt(1 - k * k) * noise)

    def repaint(sample, known, mask, *, times=10):
        def sampler(denoise, x, grid, schedule, *, generator=None):
            one = standard_noise(x, generator) if not noise_each else None
            for index, (t, t_prev) in enumerate(grid):
                n = passes(times, t_prev is None)
                for i in range(n):
                    noise = standard_noise(x, generator) if noise_each else one
                    denoise_known = blend_by(denoise, known, mask, noise, schedule) if blend else denoise
                    [step] = sample(denoise_known, x, [(t, t_prev)], schedule, generator=generator)
                    x = step.x
                    if i < n - 1 or (too_late and t_prev is not None):
                        k = schedule.at(t)[0] / schedule.at(1 if t_prev is None else t_prev)[0]
                        if each:
                            yield step._replace(index=index)
                        x = forward(x, standard_noise(x, generator), k, schedule, t)
                yield step._replace(index=index_of(index), x=x if too_late else step.x)
        return sampler
    return repaint


for words, answer in [
    ("every pass is yielded", resampler(each=True)),
    ("is repeated as well", resampler(passes=lambda times, last: times)),
    ("`times` times more", resampler(passes=lambda times, last: 1 if last else times + 1)),
    ("`times` is not used", resampler(passes=lambda times, last: 1)),
    ("not blended in", resampler(blend=False)),
    ("the same noise each time", resampler(noise_each=False)),
    ("taken for a clean latent", resampler(up=lambda x, noise, k, s, t: s.add_noise(x, noise, t))),
    ("the root of 1 - k:", resampler(up=lambda x, noise, k, s, t: k * x + (1 - k) ** 0.5 * noise)),
    ("by k squared", resampler(up=lambda x, noise, k, s, t: k * k * x + (1 - k * k) ** 0.5 * noise)),
    ("the variance grows", resampler(up=lambda x, noise, k, s, t: x + (1 - k * k) ** 0.5 * noise)),
    ("does not go back up", resampler(up=lambda x, noise, k, s, t: x)),
    ("the passes before are lost", resampler(up=lambda x, noise, k, s, t: noise)),
    ("after the last pass as well", resampler(too_late=True)),
    ("the index of each step is 0", resampler(index_of=lambda i: 0)),
]:
    wrong("repaint", words)(answer)


# --- widen_unet ------------------------------------------------------------------------------------------

@right("widen_unet")
def by_state(unet):
    wide = UNet(replace(unet.config, in_channels=2 * unet.config.out_channels + 1))
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    old = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([old, torch.zeros(len(old), 5, 3, 3)], dim=1)
    wide.load_state_dict(state)
    return wide


@right("widen_unet")
def by_padding(unet):
    wide = copy.deepcopy(unet).requires_grad_(True)
    wide.config = replace(unet.config, in_channels=9)
    conv = nn.Conv2d(9, unet.conv_in.out_channels, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(F.pad(unet.conv_in.weight, (0, 0, 0, 0, 0, 5)))
        conv.bias.copy_(unet.conv_in.bias)
    wide.conv_in = conv
    return wide


def wide_of(columns, config=True, copied=True, bias=True, others=True):
    def widen_unet(unet):
        wide = copy.deepcopy(unet) if copied else copy.copy(unet)
        if not copied:
            wide._modules = dict(unet._modules)
        if config:
            wide.config = replace(unet.config, in_channels=9)
        if not others:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                wide = UNet(replace(unet.config, in_channels=9)).eval().requires_grad_(False)
        conv = nn.Conv2d(9, unet.conv_in.out_channels, 3, padding=1)
        with torch.no_grad():
            conv.weight.copy_(columns(unet.conv_in.weight))
            if bias:
                conv.bias.copy_(unet.conv_in.bias)
        wide.conv_in = conv.requires_grad_(False)
        return wide
    return widen_unet


def nothing(old, count=5):
    return torch.zeros(len(old), count, 3, 3)


def base_first(old):
    return torch.cat([old, nothing(old)], 1)


for words, answer in [
    ("come before the old ones", wide_of(lambda old: torch.cat([nothing(old), old], 1))),
    ("the mask's channel comes first", wide_of(lambda old: torch.cat([nothing(old, 1), old, nothing(old, 4)], 1))),
    ("all of it is zero", wide_of(lambda old: nothing(old, 9))),
    ("are there twice", wide_of(lambda old: torch.cat([old, nothing(old, 1), old], 1))),
    ("the mean of the old ones",
     wide_of(lambda old: torch.cat([old, old.mean(1, keepdim=True).repeat(1, 5, 1, 1)], 1))),
    ("they are ones", wide_of(lambda old: torch.cat([old, torch.ones(len(old), 5, 3, 3)], 1))),
    ("`conv_in.weight` is", wide_of(lambda old: torch.cat([old, torch.randn(len(old), 5, 3, 3)], 1))),
    ("Its config still says in_channels 4", wide_of(base_first, config=False)),
    ("With any mask and masked latent, the output", wide_of(base_first, bias=False)),
    ("It shares weights with the base", wide_of(base_first, copied=False)),
    ("has shape (8, 4, 3, 3)", lambda unet: copy.deepcopy(unet)),
]:
    wrong("widen_unet", words)(answer)


@wrong("widen_unet", "The base itself was widened")
def the_base_itself(unet):
    conv = nn.Conv2d(9, unet.conv_in.out_channels, 3, padding=1)
    conv.weight.data = base_first(unet.conv_in.weight)
    conv.bias.data = unet.conv_in.bias.data
    unet.conv_in, unet.config = conv, replace(unet.config, in_channels=9)
    return unet


@wrong("widen_unet", "only `conv_in.weight` was taken from the base")
def a_fresh_unet(unet):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        wide = UNet(replace(unet.config, in_channels=9))
    wide.conv_in.weight.data = base_first(unet.conv_in.weight)
    return wide


@wrong("widen_unet", "The base's output has changed")
def the_base_loses_a_layer(unet):
    wide = by_state(unet)
    unet.conv_out.weight.data.zero_()
    return wide


@wrong("widen_unet", "No gradient reaches some of the new channels")
def which_reads_four(unet):
    wide = by_state(unet)
    wide.conv_in.forward = lambda x: F.conv2d(x[:, :4], wide.conv_in.weight[:, :4], wide.conv_in.bias, padding=1)
    return wide


@wrong("widen_unet", "It must return a U-Net")
def weights_alone(unet):
    return by_state(unet).state_dict()


@wrong("widen_unet", "The base's output has changed")
def the_base_is_scaled_in_place(unet):
    wide = by_state(unet)
    unet.conv_in.weight.data.mul_(4 / 9)
    return wide


# --- nine_channels ------------------------------------------------------------------------------------

@right("nine_channels")
def by_cat(unet, mask, masked_latent):
    extra = torch.cat([mask, masked_latent], dim=1)

    def run(x, t, context, residuals=None):
        return unet(torch.cat([x, extra.repeat(len(x) // len(extra), 1, 1, 1)], dim=1), t, context, residuals)
    return run


@right("nine_channels")
def by_copies(unet, mask, masked_latent):
    def run(x, t, context, residuals=None):
        times = x.shape[0] // mask.shape[0]
        parts = x, torch.cat([mask] * times), torch.cat([masked_latent] * times)
        return unet(torch.hstack(parts), t, context, residuals)
    return run


def reading(parts, copies=lambda one, n: one.repeat(n, 1, 1, 1), passed=lambda residuals: residuals, at=lambda t: t):
    def nine_channels(unet, mask, masked_latent):
        def run(x, t, context, residuals=None):
            n = len(x) // len(mask)
            given = parts(x, copies(mask, n), copies(masked_latent, n))
            return unet(torch.cat(given, 1), at(t), context, passed(residuals))
        return run
    return nine_channels


def in_order(x, m, z):
    return [x, m, z]


for words, answer in [
    ("the mask is the last", reading(lambda x, m, z: [x, z, m])),
    ("the mask is the first", reading(lambda x, m, z: [m, x, z])),
    ("have changed places", reading(lambda x, m, z: [z, m, x])),
    ("the mask is turned round", reading(lambda x, m, z: [x, 1 - m, z])),
    ("the noisy latent is masked", reading(lambda x, m, z: [x * m, m, z])),
    ("cut out once more", reading(lambda x, m, z: [x, m, z * (m < 0.5)])),
    ("the two copies of a mask are adjacent", reading(in_order, copies=lambda one, n: one.repeat_interleave(n, 0))),
    ("the residuals are not passed on", reading(in_order, passed=lambda residuals: None)),
    ("the timestep is not passed on", reading(in_order, at=lambda t: 0)),
    ("has shape (2, 8, 6, 8)", reading(lambda x, m, z: [x, z])),
    ("It must return a function", lambda unet, mask, masked_latent: torch.cat([mask, masked_latent], 1)),
    ("he masks are not repeated", reading(in_order, copies=lambda one, n: one)),
]:
    wrong("nine_channels", words)(answer)
