"""The U-Net gives diffusers' numbers on the same weights, and has every key of the full-size models."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdlearn.config import PRESETS, UNetConfig
from sdlearn.controlnet import Control, ControlNet, add_control
from sdlearn.diagnostics.attention import record_attention
from sdlearn.layers import zero_conv
from sdlearn.unet import Encoder, UNet, skip_channels, up_inputs

KEYS = json.loads((Path(__file__).parent / "data" / "keys_unet.json").read_text())

SD1 = UNetConfig(channels=(32, 64, 96, 96), context_dim=24)
SD2 = UNetConfig(channels=(32, 64, 96, 96), context_dim=40, heads=None, head_dim=16, linear_projection=True)
CONFIGS = {
    "tiny": PRESETS["tiny"].unet,
    "mini": PRESETS["mini"].unet,
    "lower_two": replace(PRESETS["mini"].unet, channels=(16, 32, 48), attention=(False, True, True)),
    "sd1_small": SD1,
    "sd2_small": SD2,
    "inpaint": replace(SD1, in_channels=9),
    "head_dim_conv": replace(SD1, heads=None, head_dim=8),
    "heads_linear": replace(SD2, heads=4, head_dim=None),
    "one_level": UNetConfig(channels=(16,), attention=(True,), groups=4, context_dim=24),
    "attention_above": UNetConfig(channels=(8, 16, 24), attention=(True, False, False), layers_per_block=3,
                                  out_channels=6, heads=2, groups=4, context_dim=24),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are so small that threads, on a busy machine, wait for each other more than they help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def diffusers_unet(config):
    """diffusers' U-Net of this shape. Its `attention_head_dim` is the number of heads."""
    heads = tuple(config.heads_at(width) for width in config.channels)
    return UNet2DConditionModel(
        in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=config.channels, layers_per_block=config.layers_per_block,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)],
        attention_head_dim=heads, cross_attention_dim=config.context_dim,
        use_linear_projection=config.linear_projection, norm_num_groups=config.groups)


@cache
def pair(name):
    """Our U-Net and diffusers', of the same random weights, norms and biases included."""
    torch.manual_seed(0)
    ours, reference = UNet(CONFIGS[name]), diffusers_unet(CONFIGS[name])
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours.eval().requires_grad_(False), reference.eval().requires_grad_(False)


def inputs(config, h=16, w=16, batch=2, tokens=77):
    return torch.randn(batch, config.in_channels, h, w), torch.randn(batch, tokens, config.context_dim)


def same(ours, reference, tolerance=1e-5):
    """Whether the largest difference is within `tolerance` of the reference's scale."""
    assert ours.shape == reference.shape
    assert reference.abs().max() > 0, "a reference of zeros would prove nothing"
    assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


# ---------------------------------------------------------------------------- parity

@pytest.mark.parametrize("h, w", [(16, 16), (13, 9), (17, 17), (8, 24)])
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_diffusers(name, h, w):
    ours, reference = pair(name)
    x, context = inputs(CONFIGS[name], h, w)
    t = torch.tensor([731.25, 12.0])
    same(ours(x, t, context), reference(x, t, context).sample)


@pytest.mark.parametrize("tokens", [1, 77, 154, 300])
def test_equal_to_diffusers_with_other_lengths_of_text(tokens):
    ours, reference = pair("sd1_small")
    x, context = inputs(SD1, tokens=tokens)
    same(ours(x, 500, context), reference(x, 500, context).sample)


@pytest.mark.parametrize("t", [0, 999, 981, 0.5, 998.875, torch.tensor(7), torch.tensor([3, 900]),
                               torch.tensor([0.25, 999.0], dtype=torch.float64)], ids=str)
def test_equal_to_diffusers_at_every_kind_of_timestep(t):
    ours, reference = pair("sd2_small")
    x, context = inputs(SD2)
    same(ours(x, t, context), reference(x, t, context).sample)


@settings(max_examples=30)
@given(st.integers(1, 21), st.integers(1, 21), st.integers(1, 3), st.integers(1, 90), st.floats(0, 999),
       st.sampled_from(["tiny", "one_level", "attention_above"]))
def test_equal_to_diffusers_at_any_size(h, w, batch, tokens, t, name):
    ours, reference = pair(name)
    x, context = inputs(CONFIGS[name], h, w, batch, tokens)
    same(ours(x, t, context), reference(x, t, context).sample)


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_load_in_diffusers_and_parameter_counts_agree(name):
    ours, reference = pair(name)
    reference.load_state_dict(ours.state_dict(), strict=True)
    theirs = dict(reference.named_modules())
    settings_of = {nn.GroupNorm: ("eps", "num_groups"), nn.LayerNorm: ("eps",),
                   nn.Conv2d: ("stride", "padding")}
    compared = 0
    for path, module in ours.named_modules():
        for kind, names in settings_of.items():
            if isinstance(module, kind) and isinstance(theirs[path], kind):
                compared += 1
                for number in names:
                    assert getattr(module, number) == getattr(theirs[path], number), f"{path}.{number}"
    assert compared >= 20


@pytest.mark.parametrize("name", ["mini", "sd2_small"])
def test_equal_to_diffusers_with_residuals(name):
    ours, reference = pair(name)
    x, context = inputs(CONFIGS[name], 13, 9)
    features = ours.encode(x, ours.embed_time(40, x), context)
    residuals = [torch.randn_like(feature) for feature in features]
    same(ours(x, 40, context, residuals),
         reference(x, 40, context, down_block_additional_residuals=tuple(residuals[:-1]),
                   mid_block_additional_residual=residuals[-1]).sample)


# ---------------------------------------------------------------------------- full size

@pytest.mark.parametrize(("name", "count"), [
    ("sd15", 859_520_964), ("sd15_inpaint", 859_535_364),
    ("sd2_base", 865_910_724), ("sd21", 865_910_724), ("sd2_inpaint", 865_925_124),
])
def test_every_key_and_shape_of_the_full_size_models(name, count):
    with torch.device("meta"):
        unet = UNet(PRESETS[name].unet)
    expected = dict(KEYS["unet1"])
    if name.startswith("sd2"):
        expected |= dict(KEYS["unet2_where_other"])
    if name.endswith("inpaint"):
        expected["conv_in.weight"] = [320, 9, 3, 3]
    assert {key: list(tensor.shape) for key, tensor in unet.state_dict().items()} == expected
    assert sum(p.numel() for p in unet.parameters()) == count


@pytest.mark.parametrize("name", ["sd15", "sd2_base", "sd15_inpaint"])
def test_the_full_size_models_run_on_meta_without_reading_a_value(name):
    # On the meta device there are no values: reading one, or mixing devices, would raise.
    config = PRESETS[name].unet
    with torch.device("meta"):
        unet = UNet(config)
        x, context = inputs(config, 64, 64)
        assert unet(x, torch.zeros(2), context).shape == (2, 4, 64, 64)
        features = unet.encode(x, unet.embed_time(0.5, x), context)
        assert [f.shape[1] for f in features] == unet.feature_channels
        assert unet(x, 981, context, residuals=features).shape == (2, 4, 64, 64)


def test_channels_of_stable_diffusions_skips():
    assert skip_channels(PRESETS["sd15"].unet) == [320] * 4 + [640] * 3 + [1280] * 5
    assert up_inputs(PRESETS["sd15"].unet) == [[2560] * 3, [2560, 2560, 1920], [1920, 1280, 960], [960, 640, 640]]


@pytest.mark.parametrize("name", CONFIGS)
def test_up_blocks_read_the_skip_and_the_output_of_the_level_below(name):
    config = CONFIGS[name]
    with torch.device("meta"), torch.no_grad():
        unet = UNet(config)
        x, context = torch.empty(1, config.in_channels, 9, 6), torch.empty(1, 3, config.context_dim)
        temb = torch.empty(1, 4 * config.channels[0])
        *skips, middle = unet.encode(x, temb, context)
        assert unet.decode([*skips, middle], temb, context).shape == (1, config.out_channels, 9, 6)
    assert [skip.shape[1] for skip in skips] == skip_channels(config)
    assert [[res.norm1.num_channels for res in block.resnets] for block in unet.up_blocks] == up_inputs(config)


def test_an_encoder_has_the_parameters_of_a_controlnets_copy():
    with torch.device("meta"):
        encoder = Encoder(PRESETS["sd15"].unet)
    shapes = {key: list(tensor.shape) for key, tensor in encoder.state_dict().items()}
    assert shapes == {key: shape for key, shape in KEYS["controlnet"] if not key.startswith("controlnet_")}
    zero_convs = [shape[0] for key, shape in KEYS["controlnet"]
                  if key.startswith(("controlnet_down", "controlnet_mid")) and key.endswith("weight")]
    assert zero_convs == encoder.feature_channels


# ---------------------------------------------------------------------------- residuals

def test_residuals_of_zeros_change_nothing():
    unet, _ = pair("sd1_small")
    x, context = inputs(SD1)
    plain = unet(x, 300, context)
    features = unet.encode(x, unet.embed_time(300, x), context)
    assert torch.equal(unet(x, 300, context, [torch.zeros_like(f) for f in features]), plain)
    assert torch.equal(unet(x, 300, context, [torch.zeros_like(f[:1]) for f in features]), plain)


def test_a_copied_encoder_with_zero_convolutions_changes_nothing_and_learns():
    class Control(Encoder):
        def __init__(self, config):
            super().__init__(config)
            self.zero_convs = nn.ModuleList(zero_conv(channels) for channels in self.feature_channels)

        def forward(self, x, t, context, hint):
            features = self.encode(x, self.embed_time(t, x), context, hint)
            return [conv(f) for conv, f in zip(self.zero_convs, features, strict=True)]

    unet, _ = pair("tiny")
    config = unet.config
    control = Control(config)
    x, context = inputs(config, 9, 7)
    hint = torch.randn(2, config.channels[0], 9, 7)
    residuals = control(x, 500, context, hint)
    out = unet(x, 500, context, residuals)
    assert torch.equal(out, unet(x, 500, context))
    out.square().mean().backward()
    assert all(conv.weight.grad.abs().max() > 0 for conv in control.zero_convs)
    # The hint is seen by every feature but only through the encoder.
    with torch.no_grad():
        other = control.encode(x, control.embed_time(500, x), context, 0 * hint)
        seen = control.encode(x, control.embed_time(500, x), context, hint)
    assert all(not torch.equal(a, b) for a, b in zip(other, seen, strict=True))


def test_each_residual_is_added_to_its_own_feature():
    unet, _ = pair("tiny")
    x, context = inputs(unet.config, 8, 8)
    features = unet.encode(x, unet.embed_time(1, x), context)
    plain = unet(x, 1, context)
    for i in range(len(features)):
        residuals = [torch.zeros_like(f) for f in features]
        residuals[i] += 1
        copies = [r.clone() for r in residuals]
        assert not torch.equal(unet(x, 1, context, residuals), plain), f"residual {i} has no effect"
        assert all(torch.equal(a, b) for a, b in zip(residuals, copies, strict=True))


@pytest.mark.parametrize(("change", "words"), [
    (lambda r: r[:-1], "4 residuals given, but this U-Net adds 5"),
    (lambda r: [*r, r[-1]], "6 residuals given, but this U-Net adds 5"),
    (lambda r: [], "0 residuals given"),
    (lambda r: r[::-1], "residual 0 is (2, 16, 4, 4), but must have its feature's shape (2, 8, 8, 8)"),
    (lambda r: [f[..., :1] for f in r], "residual 0 is (2, 8, 8, 1)"),
    (lambda r: [torch.cat([f, f]) for f in r], "residual 0 is (4, 8, 8, 8)"),
])
def test_residuals_of_wrong_shape_raise(change, words):
    unet, _ = pair("tiny")
    x, context = inputs(unet.config, 8, 8)
    residuals = change([torch.zeros_like(f) for f in unet.encode(x, unet.embed_time(1, x), context)])
    with pytest.raises(ValueError) as error:
        unet(x, 1, context, residuals)
    assert words in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------- behaviour

def test_samples_of_a_batch_are_independent():
    unet, _ = pair("sd1_small")
    x, context = inputs(SD1, 9, 12, batch=3)
    t = torch.tensor([5.0, 500.0, 999.0])
    together = unet(x, t, context)
    for i in range(3):
        same(unet(x[i:i + 1], t[i].item(), context[i:i + 1]), together[i:i + 1], 5e-6)
    same(unet(x, 500, context)[1:2], together[1:2], 5e-6)


def test_attention_maps_of_the_unet():
    unet, reference = pair("lower_two")
    x, context = inputs(unet.config, 13, 9, tokens=20)
    with record_attention(unet) as record:
        out = unet(x, 400, context)
    same(out, reference(x, 400, context).sample)
    # Levels of 7x5 and 4x3 cells; the level of 13x9 does not attend. 4 heads.
    shapes = {name: tuple(maps.shape) for name, maps in record.maps.items()}
    block = "transformer_blocks.0"
    assert shapes[f"down_blocks.1.attentions.0.{block}.attn2"] == (2, 4, 35, 20)
    assert shapes[f"mid_block.attentions.0.{block}.attn1"] == (2, 4, 12, 12)
    assert shapes[f"up_blocks.1.attentions.1.{block}.attn2"] == (2, 4, 35, 20)
    assert len(shapes) == 2 * (2 + 1 + 4) and not any("down_blocks.0" in name for name in shapes)
    for maps in record.maps.values():
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    torch.testing.assert_close(unet(x, 400, context), out, rtol=1e-4, atol=1e-5)


def test_channels_last_has_the_same_output_and_is_preserved():
    unet, _ = pair("sd2_small")
    x, context = inputs(SD2, 13, 9)
    plain = unet(x, 77, context)
    last = UNet(SD2)
    last.load_state_dict(unet.state_dict())
    last = last.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        out = last(x.to(memory_format=torch.channels_last), 77, context)
    same(out, plain)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("t", [500, torch.tensor([500.0, 20.0])], ids=["number", "tensor"])
def test_half_precision_is_preserved(t):
    unet, _ = pair("tiny")
    half = UNet(unet.config)
    half.load_state_dict(unet.state_dict())
    half = half.to(torch.bfloat16).eval()
    x, context = inputs(unet.config, 8, 8)
    with torch.no_grad():
        out = half(x.bfloat16(), t, context.bfloat16())
    assert out.dtype == torch.bfloat16
    same(out.float(), unet(x, t, context), 0.05)


def test_forward_is_one_graph():
    unet = UNet(replace(CONFIGS["tiny"], attention=(False, False))).eval().requires_grad_(False)
    nn.init.normal_(unet.conv_out.weight)
    x, context = inputs(unet.config, 9, 7)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    same(compiled(x, torch.tensor([3.0, 4.0]), context), unet(x, torch.tensor([3.0, 4.0]), context), 1e-6)


def test_an_untrained_model_outputs_zeros_and_every_weight_gets_a_gradient():
    unet = UNet(CONFIGS["tiny"])
    x, context = inputs(unet.config, 8, 8)
    out = unet(x, torch.tensor([10.0, 900.0]), context)
    assert torch.equal(out, torch.zeros_like(x))
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.5)
    for _ in range(4):      # what starts at zero learns first, what lies behind it a step later
        optimizer.zero_grad()
        (unet(x, torch.tensor([10.0, 900.0]), context) - x).square().mean().backward()
        optimizer.step()
    silent = [name for name, p in unet.named_parameters() if p.grad.abs().max() == 0]
    assert silent == []


def test_context_and_timestep_have_an_effect():
    unet, _ = pair("mini")
    x, context = inputs(unet.config, batch=1)
    out = unet(x, 500, context)
    assert not torch.allclose(unet(x, 500, context.flip(2)), out, atol=1e-3)
    assert not torch.allclose(unet(x, 400, context), out, atol=1e-3)
    # Cross-attention is invariant to the order of tokens: positions are encoded by the text encoder alone.
    same(unet(x, 500, context.flip(1)), out)


@pytest.mark.parametrize(("name", "make", "words"), [
    ("tiny", lambda x, t, c: (x[:, :3], t, c), "x is (2, 3, 8, 8), but this model takes (batch, 4, "),
    ("tiny", lambda x, t, c: (x[0], t, c), "x is (4, 8, 8)"),
    ("inpaint", lambda x, t, c: (x[:, :4], t, c), "reads latent, mask and masked latent, in that order"),
    ("tiny", lambda x, t, c: (x, t, c[..., :15]), "context is (2, 77, 15), but this model takes (2, tok"),
    ("tiny", lambda x, t, c: (x, t, c[:1]), "one text for each latent"),
    ("tiny", lambda x, t, c: (x, t, c[:0]), "context is (0, 77, 16)"),
    ("tiny", lambda x, t, c: (x[:0], t, c[:0]), "context is (0, 77, 16)"),
    ("tiny", lambda x, t, c: (x, t, torch.cat([c, c[:1]])), "context is (3, 77, 16)"),
    ("tiny", lambda x, t, c: (x, torch.zeros(2), torch.cat([c, c])), "4 texts for 2 latents need one timestep"),
    ("tiny", lambda x, t, c: (x, t, c[0]), "context is (77, 16)"),
    ("tiny", lambda x, t, c: (x, torch.zeros(3), c), "t is (3,), but must be a number or one timestep"),
    ("tiny", lambda x, t, c: (x, torch.zeros(2, 1), c), "t is (2, 1)"),
    ("tiny", lambda x, t, c: (x, torch.zeros(2, device="meta"), c), "t is on meta but x on cpu"),
])
def test_inputs_of_wrong_shape_raise(name, make, words):
    unet, _ = pair(name)
    x, context = inputs(unet.config, 8, 8)
    with pytest.raises(ValueError) as error:
        unet(*make(x, 1, context))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_several_contexts_for_a_latent_equal_a_repeated_batch(name, k):
    unet, _ = pair(name)
    x, context = inputs(unet.config, 13, 9)
    texts = torch.cat([context, *torch.randn(k - 1, *context.shape)])
    same(unet(x, 321, texts), unet(x.repeat(k, 1, 1, 1), 321, texts))
    same(unet(x, torch.tensor([321.0]), texts), unet(x.repeat(k, 1, 1, 1), 321, texts))
    # in any block of rows, and all the same where the texts are
    once = unet(x, 321, context)
    same(unet(x, 321, context.repeat(k, 1, 1)), once.repeat(k, 1, 1, 1))


@pytest.mark.parametrize("name", ["mini", "sd1_small"])
def test_layers_before_the_first_cross_attention_run_once_for_all_contexts(name):
    unet, _ = pair(name)
    (x, context), rows = inputs(unet.config, batch=1), {}

    def watch(name):
        return lambda module, given, output: rows.update({name: len(output)})
    hooks = [module.register_forward_hook(watch(name)) for name, module in unet.named_modules()
             if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm))]
    unet(x, 10, torch.cat([context, context]))
    for hook in hooks:
        hook.remove()
    level = unet.config.attention.index(True)
    once = [f"down_blocks.{level}.resnets.0.conv2", "conv_in", f"down_blocks.{level}.attentions.0.proj_in",
            f"down_blocks.{level}.attentions.0.transformer_blocks.0.attn1.to_out.0"]
    assert all(rows[name] == 1 for name in once)
    twice = [f"down_blocks.{level}.attentions.0.transformer_blocks.0.attn2.to_q", "conv_out",
             f"down_blocks.{level}.attentions.0.proj_out", "up_blocks.0.resnets.0.conv1"]
    assert all(rows[name] == 2 for name in twice)


@pytest.mark.parametrize(("preset", "cells", "share"), [("sd15", 64, 0.025), ("mini", 16, 0.065)])
def test_share_of_flops_that_both_halves_of_guidance_have_in_common(preset, cells, share):
    config = PRESETS[preset].unet
    with torch.device("meta"):
        unet, x, texts = UNet(config), torch.empty(1, 4, cells, cells), torch.empty(2, 77, config.context_dim)

    def flops(latents):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(latents, 5.0, texts)
        return counter.get_total_flops()

    assert 1 - flops(x) / flops(torch.cat([x, x])) == pytest.approx(share, abs=5e-4)


def test_residuals_of_several_texts_for_a_latent():
    unet, _ = pair("mini")
    x, context = inputs(unet.config, batch=2)
    texts = torch.cat([context, context.flip(1)])
    whole = [torch.randn_like(one) for one in unet.encode(x.repeat(2, 1, 1, 1), unet.embed_time(5, x), texts)]
    same(unet(x, 5, texts, whole), unet(x.repeat(2, 1, 1, 1), 5, texts, whole))
    for_all = [one[:1] for one in whole]
    same(unet(x, 5, texts, for_all), unet(x.repeat(2, 1, 1, 1), 5, texts, for_all))
    net = ControlNet.from_unet(unet, hint_widths=(4, 4))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.05)
    hint = torch.rand(2, 3, 32, 32)
    for guess in (False, True):
        network = add_control(unet, [Control(net, hint, guess_mode=guess)], batch=2)
        with torch.no_grad():
            same(network(x, 5, texts), network(x.repeat(2, 1, 1, 1), 5, texts))


@pytest.mark.parametrize("batch, texts, rows", [(3, 1, 2), (4, 1, 2), (2, 2, 3), (4, 2, 2)])
def test_residuals_have_one_row_or_one_for_each_latent_or_text(batch, texts, rows):
    """Other numbers of rows are refused, fewer ones too, even where they divide the batch."""
    unet, _ = pair("tiny")
    x, context = inputs(unet.config, 8, 8, batch, tokens=5)
    contexts = context.repeat(texts, 1, 1)
    zeros = [torch.zeros(1, *one.shape[1:]) for one in unet.encode(x, unet.embed_time(5, x), contexts)]
    assert torch.equal(unet(x, 5, contexts, zeros), unet(x, 5, contexts))
    for i, zero in enumerate(zeros):
        residuals = [*zeros[:i], zero.expand(rows, -1, -1, -1), *zeros[i + 1:]]
        with pytest.raises(ValueError, match=rf"residual {i} is \({rows}, .* must have its feature's shape"):
            unet(x, 5, contexts, residuals)
