"""Answers to the exercises of notebook 05."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from exercise_answers import right, wrong

# --- timestep_embedding -------------------------------------------------------------------------------


@right("timestep_embedding")
def by_powers(t, dim):
    half = dim // 2
    omega = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(t.to(torch.float32), omega)
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=1)


@right("timestep_embedding")
def by_broadcasting(t, dim):
    i = torch.arange(dim // 2)
    angles = t.float().view(-1, 1) / torch.exp(math.log(10_000) * 2 * i / dim)
    out = torch.empty(len(t), dim)
    out[:, :dim // 2] = angles.cos()
    out[:, dim // 2:] = angles.sin()
    return out


@right("timestep_embedding")
def as_turning_numbers(t, dim):
    half = dim // 2
    turning = torch.polar(torch.ones(len(t), half), t.float()[:, None] * 1e4 ** (-torch.arange(half) / half))
    return torch.cat([turning.real, turning.imag], dim=-1)


@wrong("timestep_embedding", "is float64 where it must be float32")
def in_double(t, dim):
    half = dim // 2
    angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sinusoids(half_of=lambda dim: dim // 2, exponent=lambda i, half: -i / half, time=lambda t: t.float(),
              order=("cos", "sin")):
    def answer(t, dim):
        half = half_of(dim)
        angles = time(t)[:, None] * 10000.0 ** exponent(torch.arange(half), half)
        return torch.cat([getattr(angles, name)() for name in order], dim=-1)
    return answer


for words, answer in [
    ("the sines come first", sinusoids(order=("sin", "cos"))),
    ("of the first DDPM", sinusoids(exponent=lambda i, half: -i / max(half - 1, 1), order=("sin", "cos"))),
    ("divided by dim/2 - 1", sinusoids(exponent=lambda i, half: -i / max(half - 1, 1))),
    ("divide by dim/2", sinusoids(exponent=lambda i, half: -i / (2 * half))),
    ("the exponent is negative", sinusoids(exponent=lambda i, half: i / half)),
    ("t is divided by 1000", sinusoids(time=lambda t: t / 1000)),
    ("the sines twice", sinusoids(order=("sin", "sin"))),
    ("the fraction of t is cut off", sinusoids(time=lambda t: t.int())),
    ("has shape (5, 32) where it must be (5, 16)", sinusoids(half_of=lambda dim: dim)),
    ("cy alternate", lambda t, dim: torch.stack(sinusoids()(t, dim).chunk(2, dim=1), dim=2).reshape(len(t), dim)),
]:
    wrong("timestep_embedding", words)(answer)


# --- unet_resblock ------------------------------------------------------------------------------------

class Block(nn.Module):
    """As most people write it."""

    def __init__(self, inputs, outputs, embed_dim, groups=32, eps=1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(embed_dim, outputs)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = nn.Conv2d(inputs, outputs, kernel_size=1)

    def skip(self, x):
        return self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x

    def time(self, temb):
        return self.time_emb_proj(F.silu(temb)).unsqueeze(-1).unsqueeze(-1)

    def forward(self, x, temb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h + self.time(temb))))
        return self.skip(x) + h


right("unet_resblock")(Block)


@right("unet_resblock")
class WithModules(nn.Module):
    def __init__(self, inputs, outputs, embed_dim, groups=32):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs)
        self.norm2 = nn.GroupNorm(groups, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding="same")
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding="same")
        self.time_emb_proj = nn.Linear(embed_dim, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Sequential()
        self.act = nn.SiLU()

    def forward(self, x, temb):
        shift = self.time_emb_proj(self.act(temb))
        h = self.conv1(self.act(self.norm1(x))) + shift.view(*shift.shape, 1, 1)
        return torch.add(self.conv2(self.act(self.norm2(h))), self.conv_shortcut(x))


@wrong("unet_resblock", "the time is not added")
class Timeless(Block):
    def forward(self, x, temb):
        return self.skip(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


@wrong("unet_resblock", "must match the size of tensor")
class WithoutAxes(Block):
    def time(self, temb):
        return self.time_emb_proj(F.silu(temb))


@wrong("unet_resblock", "does not pass through SiLU")
class Bare(Block):
    def time(self, temb):
        return self.time_emb_proj(temb)[..., None, None]


@wrong("unet_resblock", "SiLU comes after the linear layer")
class Behind(Block):
    def time(self, temb):
        return F.silu(self.time_emb_proj(temb))[..., None, None]


@wrong("unet_resblock", "it is added between the two convolutions")
class Late(Block):
    def forward(self, x, temb):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + self.time(temb) + self.skip(x)


@wrong("unet_resblock", "the input is not added")
class Plain(Block):
    def skip(self, x):
        return 0


@wrong("unet_resblock", "there the input is added as it is")
class AlwaysConvolved(Block):
    def __init__(self, inputs, outputs, embed_dim, groups=32):
        super().__init__(inputs, outputs, embed_dim, groups)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1)


@wrong("unet_resblock", "in the U-Net's ResBlocks it is 1e-5")
class AsInTheAutoencoder(Block):
    def __init__(self, *shape):
        super().__init__(*shape, eps=1e-6)


@wrong("unet_resblock", "`time_emb_proj.weight` has shape (12, 5) where it must be (6, 5)")
class ScaleAndShift(Block):
    def __init__(self, inputs, outputs, embed_dim, groups=32):
        super().__init__(inputs, outputs, embed_dim, groups)
        self.time_emb_proj = nn.Linear(embed_dim, 2 * outputs)


@wrong("unet_resblock", "no parameter `time_emb_proj.weight`")
class NamedOtherwise(Block):
    def __init__(self, inputs, outputs, embed_dim, groups=32):
        super().__init__(inputs, outputs, embed_dim, groups)
        self.time_proj = self.time_emb_proj
        del self.time_emb_proj


# --- resample -----------------------------------------------------------------------------------------

class Conv(nn.Module):
    def __init__(self, channels, **conv):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, **({"padding": 1} | conv))


@right("resample", of="Downsample")
class Strided(Conv):
    def __init__(self, channels):
        super().__init__(channels, stride=2)

    def forward(self, x):
        return self.conv(x)


@right("resample", of="Downsample")
class EverySecond(Conv):
    def forward(self, x):
        return self.conv(x)[:, :, ::2, ::2]


@right("resample", of="Upsample")
class Repeated(Conv):
    def forward(self, x, size=None):
        if size is None:
            size = [2 * side for side in x.shape[-2:]]
        return self.conv(F.interpolate(x, size=tuple(size)))


@right("resample", of="Upsample")
class ByIndex(Conv):
    def forward(self, x, size=None):
        rows, columns = size or (2 * x.shape[2], 2 * x.shape[3])
        row = torch.arange(rows) * x.shape[2] // rows
        column = torch.arange(columns) * x.shape[3] // columns
        return self.conv(x[:, :, row][:, :, :, column])


def shrinking(move, **conv):
    class Shrinking(Conv):
        def __init__(self, channels):
            super().__init__(channels, **conv)

        def forward(self, x):
            return move(self, x)
    return Shrinking


for words, answer in [
    ("as in the autoencoder", shrinking(lambda self, x: self.conv(F.pad(x, [0, 1, 0, 1])), stride=2, padding=0)),
    ("the convolution has no stride", shrinking(lambda self, x: self.conv(x))),
    ("nothing is padded", shrinking(lambda self, x: self.conv(x), stride=2, padding=0)),
    ("it is averaged", shrinking(lambda self, x: self.conv(F.avg_pool2d(x, 2, ceil_mode=True)))),
    ("the largest of four", shrinking(lambda self, x: self.conv(F.max_pool2d(x, 2, ceil_mode=True)))),
    ("no parameter `conv.bias`", shrinking(lambda self, x: self.conv(x), stride=2, bias=False)),
]:
    wrong("resample", words, of="Downsample")(answer)


def enlarging(move):
    class Enlarging(Conv):
        def forward(self, x, size=None):
            return move(self, x, size or (2 * x.shape[2], 2 * x.shape[3]))
    return Enlarging


@wrong("resample", "positional arguments", of="Upsample")
class WithoutSize(Conv):
    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2))


for words, answer in [
    ("bilinear", enlarging(lambda self, x, size: self.conv(F.interpolate(x, size, mode="bilinear")))),
    ("it must come after", enlarging(lambda self, x, size: F.interpolate(self.conv(x), size))),
    ("the convolution is missing", enlarging(lambda self, x, size: F.interpolate(x, size))),
    ("the size is not used", enlarging(
        lambda self, x, size: self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))),
    ("transposed convolution", enlarging(lambda self, x, size: F.conv_transpose2d(
        x, self.conv.weight, self.conv.bias, stride=2, padding=1, output_padding=1))),
]:
    wrong("resample", words, of="Upsample")(answer)


# --- skip_channels ------------------------------------------------------------------------------------

@right("skip_channels")
def by_slices(config):
    lists = [[width] * (config.layers_per_block + 1) for width in config.channels]
    return [config.channels[0]] + [width for level in lists for width in level][:-1]


@right("skip_channels")
def step_by_step(config):
    made = []
    made.append(config.channels[0])
    for level in range(len(config.channels)):
        for _ in range(config.layers_per_block):
            made.append(config.channels[level])
        if level + 1 < len(config.channels):
            made.append(config.channels[level])
    return made


def each(config, extra=1):
    return [width for width in config.channels for _ in range(config.layers_per_block + extra)]


for words, answer in [
    ("conv_in's output is a skip as well", lambda config: each(config)[:-1]),
    ("what a Downsample makes is a skip", lambda config: [config.channels[0], *each(config, 0)]),
    ("one too many at the end", lambda config: [config.channels[0], *each(config)]),
    ("the middle's output is no skip", lambda config: [config.channels[0], *each(config)[:-1], config.channels[-1]]),
    ("the first is the one that is made first", lambda config: by_slices(config)[::-1]),
    ("where it must be a list", lambda config: tuple(by_slices(config))),
    ("has 4 items where there must be 12", lambda config: list(config.channels)),
]:
    wrong("skip_channels", words)(answer)


@wrong("skip_channels", "the next level's first ResBlock widens")
def widened(config):
    made = [config.channels[0]]
    for width, after in zip(config.channels, (*config.channels[1:], None), strict=True):
        made += [width] * config.layers_per_block + ([after] if after else [])
    return made


# --- up_inputs ----------------------------------------------------------------------------------------

def made_by(config):
    return by_slices(config)


@right("up_inputs")
def by_lists(config):
    count, made = config.layers_per_block + 1, made_by(config)[::-1]
    widths = config.channels[::-1]
    from_below = [widths[0]] + [width for width in widths for _ in range(count)][:-1]
    both = [a + b for a, b in zip(from_below, made, strict=True)]
    return [both[i:i + count] for i in range(0, len(both), count)]


@right("up_inputs")
def by_numpy(config):
    count = config.layers_per_block + 1
    own = np.repeat(config.channels[::-1], count)
    total = np.concatenate([own[:1], own[:-1]]) + np.array(made_by(config))[::-1]
    return total.reshape(-1, count).tolist()


def walked(config, take=-1, count=None, below_of=None):
    made, below, out = made_by(config), config.channels[-1], []
    for width in config.channels[::-1]:
        level = []
        for _ in range(config.layers_per_block + 1 if count is None else count):
            level.append(below + made.pop(take))
            below = width
        out.append(level)
    return out


for words, answer in [
    ("it is a stack", lambda config: walked(config, take=0)),
    ("one ResBlock more on the way up", lambda config: walked(config, count=config.layers_per_block)),
    ("the lowest comes first", lambda config: walked(config)[::-1]),
    ("give one for each level", lambda config: [one for level in walked(config) for one in level]),
    ("the skips are not counted", lambda config: [
        [below] + [width] * config.layers_per_block
        for below, width in zip((config.channels[-1], *config.channels[:0:-1]), config.channels[::-1], strict=True)]),
    ("as wide as the level below", lambda config: [
        [width + made for made in level] for width, level in zip(
            config.channels[::-1],
            [made_by(config)[::-1][i:i + config.layers_per_block + 1]
             for i in range(0, len(made_by(config)), config.layers_per_block + 1)], strict=True)]),
]:
    wrong("up_inputs", words)(answer)


@wrong("up_inputs", "not of its input")
def growing(config):
    made, below, found = made_by(config), config.channels[-1], []
    for _ in config.channels:
        level = []
        for _ in range(config.layers_per_block + 1):
            below += made.pop()
            level.append(below)
        found.append(level)
    return found


# --- walk ---------------------------------------------------------------------------------------------

@right("walk", of="encode")
def block_by_block(unet, x, temb, context):
    h = unet.conv_in(x)
    out = [h]
    for block in unet.down_blocks:
        made = block(h, temb, context)
        h = made[-1]
        out.extend(made)
    out.append(unet.mid_block(h, temb, context))
    return out


@right("walk", of="encode")
def layer_by_layer(unet, x, temb, context):
    out = [unet.conv_in(x)]
    for block in unet.down_blocks:
        for resnet, attention in zip(block.resnets, block.attentions, strict=True):
            out.append(attention(resnet(out[-1], temb), context))
        for downsample in block.downsamplers:
            out.append(downsample(out[-1]))
    return out + [unet.mid_block(out[-1], temb, context)]


@right("walk", of="decode")
def by_popping(unet, features, temb, context):
    stack = list(features)
    h, whole = stack.pop(), stack[0].shape[-2:]
    for block in unet.up_blocks:
        mine = [stack.pop() for _ in block.resnets]
        h = block(h, mine, temb, context, stack[-1].shape[-2:] if stack else whole)
    return unet.conv_out(F.silu(unet.conv_norm_out(h)))


@right("walk", of="decode")
def decode_layer_by_layer(unet, features, temb, context):
    stack = list(features)
    h = stack.pop()
    for block in unet.up_blocks:
        for resnet, attention in zip(block.resnets, block.attentions, strict=True):
            h = attention(resnet(torch.cat([h, stack.pop()], dim=1), temb), context)
        for upsample in block.upsamplers:
            h = upsample(h, tuple(stack[-1].shape[2:]))
    h = unet.conv_norm_out(h)
    return unet.conv_out(h * h.sigmoid())


@wrong("walk", "changes its argument `features` in place", of="decode")
def emptying(unet, features, temb, context):
    return by_popping_in_place(unet, features, temb, context)


def by_popping_in_place(unet, features, temb, context):
    h = features.pop()
    for block in unet.up_blocks:
        mine = [features.pop() for _ in block.resnets]
        h = block(h, mine, temb, context, features[-1].shape[2:] if features else None)
    return unet.conv_out(F.silu(unet.conv_norm_out(h)))


for words, answer in [
    ("conv_in's output is missing", lambda unet, *given: block_by_block(unet, *given)[1:]),
    ("the middle's output is missing", lambda unet, *given: block_by_block(unet, *given)[:-1]),
    ("has 8 items where there must be 7", lambda unet, *given: [*block_by_block(unet, *given), given[0]]),
]:
    wrong("walk", words, of="encode")(answer)


@wrong("walk", "only the last map of each block is a skip", of="encode")
def last_ones(unet, x, temb, context):
    out = [unet.conv_in(x)]
    for block in unet.down_blocks:
        out.append(block(out[-1], temb, context)[-1])
    return [*out, unet.mid_block(out[-1], temb, context)]


def going_up(pick, end=lambda unet, h: unet.conv_out(F.silu(unet.conv_norm_out(h))), sized=True):
    def answer(unet, features, temb, context):
        *stack, h = features
        for block in unet.up_blocks:
            mine, stack = pick(stack, len(block.resnets))
            h = block(h, mine, temb, context, (stack or features)[-1 if stack else 0].shape[2:] if sized else None)
        return end(unet, h)
    return answer


@wrong("walk", "is `size` that of the last skip that remains", of="decode")
def as_large_as_its_own(unet, features, temb, context):
    *stack, h = features
    for block in unet.up_blocks:
        mine = [stack.pop() for _ in block.resnets]
        h = block(h, mine, temb, context, h.shape[2:])
    return unet.conv_out(F.silu(unet.conv_norm_out(h)))


def last_first(stack, count):
    return stack[:-count - 1:-1], stack[:-count]


for words, answer in [
    ("the last made comes first", going_up(lambda stack, count: (stack[-count:], stack[:-count]))),
    ("taken from the end", going_up(lambda stack, count: (stack[:count], stack[count:]))),
    ("half of 7 rows is 4", going_up(last_first, sized=False)),
    ("SiLU before conv_out", going_up(last_first, lambda unet, h: unet.conv_out(unet.conv_norm_out(h)))),
    ("the norm before conv_out", going_up(last_first, lambda unet, h: unet.conv_out(F.silu(h)))),
    ("has shape (2, 8, 8, 6) where it must be (2, 4, 8, 6)", going_up(last_first, lambda unet, h: h)),
]:
    wrong("walk", words, of="decode")(answer)
