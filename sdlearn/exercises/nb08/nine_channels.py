"""Exercises of notebook 08: a U-Net widened to nine input channels, and its inputs."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ...config import PRESETS
from ...inpaint import nine_channels
from ...training.inpaint import widen_unet
from ...unet import UNet
from ..testing import randn, require, require_shape
from . import lesson

# --- 8.5 ----------------------------------------------------------------------------------------------

wide = lesson.exercise(
    5, widen_unet, grade="supported", minutes=12,
    asks="Write `widen_unet(unet)`: a new U-Net that reads 9 channels (in general, twice the latent's and 1) and gives "
         "the base's output whatever is in the new ones. All other weights are copies of the base's.",
    hints=["Only `conv_in.weight` has another shape: (C, 9, 3, 3) in place of (C, 4, 3, 3). What must its five new "
           "columns be, so that they add nothing?",
           "`UNet(replace(unet.config, in_channels=9))` makes one with the right shapes; `replace` is that of "
           "`dataclasses`, and `unet.config.out_channels` is the number of the latent's channels.",
           "Take `weights = unet.state_dict()`, put `conv_in.weight` in as zeros whose first four columns are the "
           "base's, and `load_state_dict`, which copies."])


def base_unet() -> UNet:
    """A small U-Net in which nothing is zero, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet(replace(PRESETS["tiny"].unet, in_channels=4, out_channels=4))
        for module in unet.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.reset_parameters()
    return unet.eval().requires_grad_(False)


X, BESIDE, TEXT = randn(2, 4, 6, 8, seed=4), randn(2, 5, 6, 8, seed=5), randn(2, 5, 16, seed=6)


@wide.test("shape")
def reads_nine(widened):
    made = widened(base_unet())
    require(isinstance(made, nn.Module) and hasattr(made, "conv_in"), "It must return a U-Net")
    require_shape(made.conv_in.weight, (base_unet().conv_in.weight.shape[0], 9, 3, 3), "`conv_in.weight`")
    require(getattr(made.config, "in_channels", 4) == 9,
            f"Its config still says in_channels {made.config.in_channels}: make it from a config that says 9")


@wide.test("value")
def zeros_behind_the_bases(widened):
    widened.agrees(lambda answer: answer(base_unet()).conv_in.weight, what="`conv_in.weight`")


@wide.test("value")
def the_output_is_the_bases(widened):
    widened.agrees(lambda answer: answer(base_unet())(torch.cat([X, BESIDE], 1), 500.0, TEXT),
                   what="With any mask and masked latent, the output")


@wide.test("edge case")
def the_base_is_unchanged(widened):
    base = base_unet()
    before = base(X, 500.0, TEXT)
    made = widened(base)
    require(made is not base and base.conv_in.weight.shape[1] == 4, "The base itself was widened: make a new U-Net")
    own = {one.data_ptr() for one in base.parameters()}
    require(not any(one.data_ptr() in own for one in made.parameters()),
            "It shares weights with the base: training the new one would change the base, too. Copy them")
    require(torch.equal(base(X, 500.0, TEXT), before), "The base's output has changed")


@wide.test("edge case")
def gradients_are_not_zero(widened):
    made = widened(base_unet()).requires_grad_(True)
    with torch.enable_grad():
        made(torch.cat([X, BESIDE], 1), 500.0, TEXT).square().sum().backward()
    gradient = made.conv_in.weight.grad
    require(gradient is not None and bool(gradient[:, 4:].abs().amax((0, 2, 3)).min() > 0),
            "No gradient reaches some of the new channels' weights: zero weights learn all the same, if they are "
            "parameters")


def filled(columns, others=True):
    """A wide U-Net; `columns` makes (C, 9, 3, 3) of the base's (C, 4, 3, 3)."""
    def widened(unet):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            made = UNet(replace(unet.config, in_channels=9)).eval().requires_grad_(False)
        weights = unet.state_dict() if others else made.state_dict()
        made.load_state_dict({**weights, "conv_in.weight": columns(unet.conv_in.weight)})
        return made
    return widened


def new_weights(old: Tensor, count: int = 5) -> Tensor:
    return old.new_zeros(len(old), count, 3, 3)


for diagnosis, answer in [
    ("the new channels come before the old ones: the noisy latent comes first",
     filled(lambda old: torch.cat([new_weights(old), old], 1))),
    ("the mask's channel comes first: the noisy latent must",
     filled(lambda old: torch.cat([new_weights(old, 1), old, new_weights(old, 4)], 1))),
    ("all of it is zero: then the U-Net is deaf to the noisy latent as well",
     filled(lambda old: torch.cat([new_weights(old, 4), new_weights(old)], 1))),
    ("the base's weights are there twice: what reads the masked latent starts at zero",
     filled(lambda old: torch.cat([old, new_weights(old, 1), old], 1))),
    ("they are the mean of the old ones: they must start at zero, to add nothing",
     filled(lambda old: torch.cat([old, old.mean(1, keepdim=True).expand(-1, 5, -1, -1)], 1))),
    ("they are ones: they must start at zero, to add nothing",
     filled(lambda old: torch.cat([old, 1 + new_weights(old)], 1))),
    ("only `conv_in.weight` was taken from the base: all the other weights are its, too",
     filled(lambda old: torch.cat([old, new_weights(old)], 1), others=False)),
]:
    wide.mistake(diagnosis)(answer)


# --- 8.6 ----------------------------------------------------------------------------------------------

nine = lesson.exercise(
    6, nine_channels, grade="supported", minutes=10,
    asks="Write `nine_channels(unet, mask, masked_latent)`: it returns a function `run(x, t, context, residuals=None)` "
         "that calls `unet` with [x, mask, masked_latent] as channels, in this order. One mask may serve several "
         "latents, and guidance's batch [u; c] holds all latents twice.",
    beyond="The package's function also checks the sizes, and that the U-Net reads so many channels.",
    hints=["`torch.cat([x, mask, masked_latent], dim=1)` joins channels; 4, 1 and 4 of them.",
           "Where x holds n = len(x) // len(mask) times as many images as the mask, the *whole batch* of masks is "
           "repeated n times: `mask.repeat(n, 1, 1, 1)`; the masked latent likewise.",
           "A function inside of a function: `def run(x, t, context, residuals=None): ... return unet(..., t, context, "
           "residuals)`, then `return run`."])

MASK = (randn(2, 1, 6, 8, seed=7) > 0).float()
MASKED = randn(2, 4, 6, 8, seed=8)


def network(x: Tensor, t: float, context: Tensor, residuals=None) -> Tensor:
    """A U-Net that outputs what it was given."""
    output = x + float(t) / 1000 + context.mean(dim=(1, 2))[:, None, None, None]
    return output if residuals is None else output + residuals[0]


@nine.test("shape")
def a_function_that_hands_over_nine(nine_channels):
    run = nine_channels(network, MASK, MASKED)
    require(callable(run), "It must return a function, which a sampler can call again and again")
    require_shape(run(X, 500.0, TEXT), (2, 9, 6, 8), "What it hands to the U-Net")


@nine.test("value")
def in_this_order(nine_channels):
    nine_channels.agrees(lambda answer: answer(network, MASK, MASKED)(X, 500.0, TEXT), what="What the U-Net is given")


@nine.test("value")
def t_and_text_are_passed_on(nine_channels):
    nine_channels.agrees(lambda answer: answer(network, MASK, MASKED)(X, 20.0, 2 * TEXT),
                         what="At another timestep, with another text, what the U-Net is given")


@nine.test("edge case")
def guidance_holds_all_twice(nine_channels):
    nine_channels.agrees(
        lambda answer: answer(network, MASK, MASKED)(X.repeat(2, 1, 1, 1), 500.0, TEXT.repeat(2, 1, 1)),
        what="With two masks for the four latents of [u; c], what the U-Net is given")


@nine.test("edge case")
def one_mask_for_all(nine_channels):
    nine_channels.agrees(lambda answer: answer(network, MASK[:1], MASKED[:1])(X, 500.0, TEXT),
                         what="With one mask for two latents, what the U-Net is given")


@nine.test("edge case")
def residuals_are_passed_on(nine_channels):
    more = [randn(2, 9, 6, 8, seed=9)]
    nine_channels.agrees(lambda answer: answer(network, MASK, MASKED)(X, 500.0, TEXT, more),
                         what="With a ControlNet's residuals, what the U-Net is given")


def handing(join, spread=Tensor.repeat, on=True, time=float):
    def nine_channels(unet, mask, masked_latent):
        def run(x, t, context, residuals=None):
            n = len(x) // len(mask)
            m, z = (spread(one, n, 1, 1, 1) for one in (mask, masked_latent))
            return unet(torch.cat(join(x, m, z), dim=1), time(t), context, residuals if on else None)
        return run
    return nine_channels


def twins(one: Tensor, times: int, *_: int) -> Tensor:
    return one.repeat_interleave(times, dim=0)


for diagnosis, answer in [
    ("the mask is the last: it comes between the noisy latent and the masked one", handing(lambda x, m, z: [x, z, m])),
    ("the mask is the first: the noisy latent is", handing(lambda x, m, z: [m, x, z])),
    ("the noisy and the masked latent have changed places", handing(lambda x, m, z: [z, m, x])),
    ("the mask is turned round: 1 is what is repainted", handing(lambda x, m, z: [x, 1 - m, z])),
    ("the noisy latent is masked: all of it is noisy, and all of it is passed on",
     handing(lambda x, m, z: [x * m, m, z])),
    ("the masked latent is cut out once more: it was made from grey-filled pixels, and stays as it was encoded",
     handing(lambda x, m, z: [x, m, z * (1 - m)])),
    ("the two copies of a mask are adjacent: [u; c] holds all images twice, one after the other",
     handing(lambda x, m, z: [x, m, z], spread=twins)),
    ("the masks are not repeated: [u; c] holds all images twice, and one mask may serve several",
     handing(lambda x, m, z: [x, m, z], spread=lambda one, *_: one)),
    ("`expand` stretches a batch of one only: repeat the batch",
     handing(lambda x, m, z: [x, m, z], spread=lambda one, n, *_: one.expand(n * len(one), -1, -1, -1))),
    ("the residuals are not passed on", handing(lambda x, m, z: [x, m, z], on=False)),
    ("the timestep is not passed on", handing(lambda x, m, z: [x, m, z], time=lambda t: 0.0)),
]:
    nine.mistake(diagnosis)(answer)
