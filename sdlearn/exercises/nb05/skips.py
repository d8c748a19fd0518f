"""Exercises of notebook 05: skip connections, encoder and decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import PRESETS, UNetConfig
from ...unet import UNet, skip_channels, up_inputs
from ..nb01.layers import weights_of
from ..testing import randn, require
from . import lesson

SD, MINI = PRESETS["sd15"].unet, PRESETS["mini"].unet
ODD = UNetConfig(channels=(8, 12, 20), attention=(True, False, False), layers_per_block=3, heads=2, context_dim=16,
                 groups=4)
FLAT = UNetConfig(channels=(8,), attention=(True,), layers_per_block=1, heads=2, context_dim=16, groups=4)

# --- 5.4 ----------------------------------------------------------------------------------------------

skips = lesson.exercise(
    4, skip_channels, grade="guided", minutes=6,
    asks="Write `skip_channels(config)`: a list of the channels of all skips in the order in which they are made: "
         "conv_in's output, then at each level those of each ResBlock and of the Downsample, which the lowest level "
         "lacks.",
    hints=["For each of them there is one number. The first is `config.channels[0]`: conv_in makes it.",
           "A level has `config.layers_per_block` ResBlocks on the way down, and its Downsample keeps the channels.",
           "The lowest level has no Downsample; and the middle's output is no skip."])


@skips.test("shape")
def is_a_list(skip_channels):
    found = skip_channels(SD)
    require(isinstance(found, list), f"It returns a {type(found).__name__} where it must be a list")


@skips.test("value")
def of_stable_diffusion(skip_channels):
    skip_channels.agrees(lambda answer: list(answer(SD)), what="For Stable Diffusion 1.x, the list")


@skips.test("value")
def of_mini(skip_channels):
    skip_channels.agrees(lambda answer: list(answer(MINI)), what="For mini, the list")


@skips.test("edge case")
def other_levels(skip_channels):
    skip_channels.agrees(lambda answer: list(answer(ODD)), what="With three ResBlocks a level, the list")
    skip_channels.agrees(lambda answer: list(answer(FLAT)), what="With a single level, the list")


def levels(config, *, first=True, down=True, lowest=False, layers=0, next_level=False):
    """The list; the switches are mistakes."""
    found, widths = [config.channels[0]] * first, config.channels
    for level, width in enumerate(widths):
        found += [width] * (config.layers_per_block + layers)
        if down and (lowest or level < len(widths) - 1):
            found.append(widths[min(level + next_level, len(widths) - 1)])
    return found


for diagnosis, switches in [
    ("conv_in's output is a skip as well, the first", {"first": False}),
    ("what a Downsample makes is a skip as well", {"down": False}),
    ("there is one too many at the end: the lowest level has no Downsample, and the middle's output is no skip",
     {"lowest": True}),
    ("there is one ResBlock too many in a level: there is one more on the way up, not down", {"layers": 1}),
    ("a Downsample keeps the channels of its level: the next level's first ResBlock widens", {"next_level": True}),
]:
    skips.mistake(diagnosis)(lambda config, switches=switches: levels(config, **switches))


@skips.mistake("it is the other way round: the first is the one that is made first")
def turned(config):
    return levels(config)[::-1]


# --- 5.5 ----------------------------------------------------------------------------------------------

inputs = lesson.exercise(
    5, up_inputs, grade="supported", minutes=10,
    asks="Write `up_inputs(config)`: the channels that each ResBlock on the way up reads, a list for each level, the "
         "lowest first. It reads what comes from below and one skip, side by side; the skip made last is read first.",
    beyond="The package's function calls its own `skip_channels`; you may call yours.",
    hints=["A level has one ResBlock more than on the way down: `config.layers_per_block + 1`.",
           "What comes from below has the channels of the block before: of the middle at first, and from the second "
           "ResBlock of a level on those of that level.",
           "`skips.pop()` takes the last of a list. Keep `below` in a variable, append `below + skips.pop()`, and then "
           "set `below` to the level's channels."])


@inputs.test("shape")
def a_list_for_each_level(up_inputs):
    up_inputs.agrees(lambda answer: [len(level) for level in answer(SD)],
                     what="For Stable Diffusion 1.x, the number of ResBlocks in each level")


@inputs.test("value")
def read_in_mini(up_inputs):
    up_inputs.agrees(lambda answer: [list(level) for level in answer(MINI)], what="For mini, the list")


@inputs.test("value")
def read_in_stable_diffusion(up_inputs):
    up_inputs.agrees(lambda answer: [list(level) for level in answer(SD)], what="For Stable Diffusion 1.x, the list")


@inputs.test("edge case")
def read_elsewhere(up_inputs):
    up_inputs.agrees(lambda answer: [list(level) for level in answer(ODD)], what="With 3 ResBlocks a level, the list")
    up_inputs.agrees(lambda answer: [list(level) for level in answer(FLAT)], what="With a single level, the list")


def upwards(config, *, take=-1, layers=1, with_skip=True, stays=False, early=False, grows=False):
    made, below, found = skip_channels(config), config.channels[-1], []
    for width in reversed(config.channels):
        below = width if early else below
        level = []
        for _ in range(config.layers_per_block + layers):
            level.append(below + (made.pop(take) if with_skip else 0))
            below = level[-1] if grows else below if stays else width
        found.append(level)
        below = below if grows else width
    return found


for diagnosis, switches in [
    ("the skip that was made first is read first: it is a stack, the last made comes first", {"take": 0}),
    ("a level has one ResBlock more on the way up", {"layers": 0}),
    ("the skips are not counted: they are concatenated to the features from below", {"with_skip": False}),
    ("only the first ResBlock of a level reads what comes from below: the next reads what the first made",
     {"stays": True}),
    ("the first ResBlock of a level reads what comes from below, as wide as the level below", {"early": True}),
    ("the next input has the channels of a ResBlock's output, its level's, not of its input", {"grows": True}),
]:
    inputs.mistake(diagnosis)(lambda config, switches=switches: upwards(config, **switches))


@inputs.mistake("the order of the levels is reversed: the lowest comes first")
def from_above(config):
    return upwards(config)[::-1]


@inputs.mistake("it is one list of all: give one for each level")
def in_one_list(config):
    return sum(upwards(config), [])


# --- 5.6 ----------------------------------------------------------------------------------------------

walk = lesson.exercise(
    6, UNet.encode, UNet.decode, name="walk", grade="on your own", minutes=25,
    asks="Write `encode(unet, x, temb, context)`: the list of all skips, conv_in's output first, and the middle's "
         "output as the last; and `decode(unet, features, temb, context)`: the output, from that list.",
    beyond="The package's `encode` also adds a ControlNet's hint to conv_in's output.",
    hints=["encode: begin with `features = [unet.conv_in(x)]`. `block(features[-1], temb, context)` of a down block "
           "is a list of all that it makes, its last the input of the next block; `unet.mid_block` returns one map.",
           "decode: each up block reads as many skips as it has resnets, the one made last first: "
           "`block(h, skips, temb, context, size)`. How many are left then?",
           "size: rows and columns that the block's Upsample has to reach: those of the last skip that is left. None "
           "is left for the highest level, which has no Upsample: any size will do.",
           "At the end of decode: `unet.conv_norm_out`, SiLU, `unet.conv_out`."])

SMALL = UNetConfig(channels=(8, 12), attention=(True, False), layers_per_block=2, heads=2, context_dim=16, groups=4)
with torch.no_grad():
    NET = UNet(SMALL).eval().requires_grad_(False)
    NET.load_state_dict(weights_of(NET))
    X, CONTEXT, TEMB = randn(2, 4, 8, 6, seed=1), randn(2, 5, 16, seed=2), randn(2, 32, seed=3)
    FEATURES = NET.encode(X, TEMB, CONTEXT)
    ROUNDED = NET.encode(randn(2, 4, 7, 5, seed=1), TEMB, CONTEXT)


def went_down(encode, x: Tensor = X) -> list[Tensor]:
    with torch.no_grad():
        return list(encode(NET, x, TEMB, CONTEXT))


def went_up(decode, features=None) -> Tensor:
    with torch.no_grad():
        return decode(NET, list(features or FEATURES), TEMB, CONTEXT)


@walk.test("shape")
def maps_and_their_shapes(encode, decode):
    """Of encode alone, as the next: encode is tested before decode is written."""
    encode.agrees(lambda answer: [0 * one for one in went_down(answer)], what="encode's result")


@walk.test("value")
def the_way_down(encode, decode):
    encode.agrees(went_down, what="encode's result")


@walk.test("value")
def the_way_up(encode, decode):
    decode.agrees(went_up, what="decode's result")


@walk.test("edge case")
def halves_that_are_rounded(encode, decode):
    encode.agrees(lambda answer: went_down(answer, randn(2, 4, 7, 5, seed=1)), what="Of 7 x 5 cells, encode's result")
    decode.agrees(lambda answer: went_up(answer, ROUNDED), what="Of 7 x 5 cells, decode's result")


def down(unet, x, temb, context, *, first=True, all_of_it=True, middle=True):
    features = [unet.conv_in(x)]
    for block in unet.down_blocks:
        made = block(features[-1], temb, context)
        features += made if all_of_it else made[-1:]
    return features[0 if first else 1:] + [unet.mid_block(features[-1], temb, context)] * middle


@walk.mistake("conv_in's output is missing: it is the first skip")
def without_the_first(unet, x, temb, context):
    return down(unet, x, temb, context, first=False)


@walk.mistake("only the last map of each block is a skip: every ResBlock and every Downsample makes a skip")
def one_of_each(unet, x, temb, context):
    return down(unet, x, temb, context, all_of_it=False)


@walk.mistake("the middle's output is missing: it is the last of the list")
def without_the_middle(unet, x, temb, context):
    return down(unet, x, temb, context, middle=False)


@walk.mistake("every block starts from conv_in's output: it must start from the last map")
def from_the_start(unet, x, temb, context):
    features = [unet.conv_in(x)]
    for block, width in zip(unet.down_blocks, (SMALL.channels[0], *SMALL.channels), strict=False):
        features += block(next(one for one in features if one.shape[1] == width), temb, context)
    return [*features, unet.mid_block(features[-1], temb, context)]


def upward(*, order=slice(None, None, -1), from_front=False, sized=True, own=False, end=F.silu, norm=True):
    def answer(unet, features, temb, context):
        *left, h = features
        for block in unet.up_blocks:
            count = len(block.resnets)
            if from_front:
                mine, left = left[:count], left[count:]
            else:
                mine, left = left[-count:], left[:-count]
            size = (left[-1] if left and not own else mine[-1]).shape[2:] if sized else None
            h = block(h, mine[order], temb, context, size)
        return unet.conv_out(end(unet.conv_norm_out(h) if norm else h))
    return answer


for diagnosis, switches in [
    ("the skips of a block are read in the order in which they were made: the last made comes first",
     {"order": slice(None)}),
    # Both of these meet a map of another size, and PyTorch says the same of them.
    ("are the skips taken from the end of the list, and is `size` that of the last skip that remains?",
     {"from_front": True, "order": slice(None)}),
    ("are the skips taken from the end of the list, and is `size` that of the last skip that remains?",
     {"own": True}),
    ("no size is passed to the block: half of 7 rows is 4, and twice 4 is 8", {"sized": False}),
    ("SiLU before conv_out is missing", {"end": lambda x: x}),
    ("the norm before conv_out is missing", {"norm": False}),
]:
    walk.mistake(diagnosis, of="decode")(upward(**switches))
