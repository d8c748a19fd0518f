"""Figures and widget of notebook 05: shapes and costs are the modules' own, reach is exact, what is lost comes back."""

import numpy as np
import pytest
import torch
from drawings import assert_shows
from matplotlib.text import Text
from models import ZERO_SNR, one_thread, tiny_parts  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from sdlearn import StableDiffusion
from sdlearn.config import PRESETS, UNetConfig
from sdlearn.data import draw_scene
from sdlearn.explore.figures import WIDTH
from sdlearn.explore.unet_figures import UNetBreaker, cost_bars, shaded_table, shape_ladder
from sdlearn.explore.unet_parts import (
    KINDS,
    altered,
    conv_reach,
    fixed_norms,
    kind_of,
    parts_of,
    rungs,
    total,
)
from sdlearn.pipeline.cache import with_cache
from sdlearn.unet import UNet, skip_channels, up_inputs

TINY = PRESETS["tiny"].unet
DEEP = UNetConfig(channels=(8, 12, 16), attention=(False, True, False), layers_per_block=2, heads=2, context_dim=16,
                  groups=4)


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(tiny_parts(ZERO_SNR))


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 8, 8, generator=generator), 300.0, torch.randn(2, 5, 16, generator=generator)


def words(drawing) -> list[str]:
    return [text.get_text() for text in drawing.findobj(Text) if text.get_text()]


# --- shapes and costs ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["tiny", "mini", "classroom", "sd15", "sd21"])
def test_rungs_hold_the_shapes_that_pass_through_the_module(name):
    config = PRESETS[name]
    steps, middle = rungs(config.unet, config.latent_size)
    assert [step.skip[0] for step in steps] == skip_channels(config.unet)
    assert [step.below + step.skip[0] for step in steps][::-1] == sum(up_inputs(config.unet), [])
    assert all(step.skip[1:] == step.out[1:] for step in steps)
    assert middle == (config.unet.channels[-1], *steps[-1].skip[1:])
    assert sum(step.upsampled for step in steps) == len(config.unet.channels) - 1


def test_stable_diffusion_attends_on_three_levels_and_enlarges_between_them():
    steps, _ = rungs(PRESETS["sd15"].unet, 64)
    assert [step.attends for step in steps] == [True] * 9 + [False] * 3
    assert [i for i, step in enumerate(steps) if step.upsampled] == [3, 6, 9]


@pytest.mark.parametrize("name, side", [("tiny", 16), ("mini", 16), ("sd15", 64)])
def test_the_parts_are_the_whole(name, side):
    config = PRESETS[name].unet
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = UNet(config)
        unet(torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 77, config.context_dim))
    parts = parts_of(config, side)
    assert total(parts, "parameters") == sum(one.numel() for one in unet.parameters())
    assert total(parts, "flops") == counter.get_total_flops()
    assert {part.kind for part in parts} == set(KINDS)
    assert {part.level for part in parts} == set(range(len(config.channels)))


def test_a_convolution_costs_what_arithmetic_says():
    by_name = {part.name: part for part in parts_of(PRESETS["sd15"].unet, 64)}
    conv = by_name["down_blocks.1.resnets.0.conv1"]
    assert conv.parameters == 9 * 320 * 640 + 640 and conv.flops == 2 * 9 * 320 * 640 * 32 * 32
    assert conv.level == 1 and by_name["up_blocks.0.resnets.0.conv1"].level == 3
    assert by_name["mid_block.resnets.0.conv1"].level == 3 and by_name["conv_out"].level == 0


@pytest.mark.parametrize("name, kind", [
    ("down_blocks.0.resnets.0.time_emb_proj", "time"), ("up_blocks.1.resnets.2.norm1", "norms"),
    ("up_blocks.1.upsamplers.0.conv", "down and up"), ("conv_norm_out", "norms"),
    ("mid_block.attentions.0.transformer_blocks.0.attn2", "cross-attention"),
    ("mid_block.attentions.0.transformer_blocks.0.ff.net.2", "feed-forward"),
    ("mid_block.attentions.0.proj_in", "into and out of tokens"), ("conv_in", "first and last convolution"),
])
def test_kinds(name, kind):
    assert kind_of(name) == kind


# --- what an output cell depends on -------------------------------------------------------------------

@pytest.mark.parametrize("config", [TINY, DEEP])
def test_convolutions_reach_exactly_so_far(config):
    """A U-Net without attention, whose norms are held, depends on the cells of its reach and on no other."""
    torch.manual_seed(0)
    unet = UNet(config).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    first, last = conv_reach(config, 0)
    width = 2 * (last - first) // 8 * 8 + 16
    cell = -first // 8 * 8 + 8
    x = torch.randn(1, 4, 4, width, requires_grad=True)
    context = torch.randn(1, 3, config.context_dim)
    with altered(unet, silent=["attn1", "attn2"]), fixed_norms(unet):
        unet(x, 10.0, context)[0, :, 2, cell].sum().backward()
    touched = x.grad.abs().sum(dim=(0, 1, 2)).nonzero().flatten()
    assert (touched[0].item(), touched[-1].item()) == (cell + first, cell + last) == conv_reach(config, cell)


def test_held_norms_give_the_same_numbers(model, given):
    with torch.no_grad():
        before = model.unet(*given)
        with fixed_norms(model.unet):
            assert torch.allclose(model.unet(*given), before, atol=1e-5)
        assert torch.equal(model.unet(*given), before)


# --- something missing --------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("change", [{"time": 5}, {"silent": ["attn1"]}, {"silent": ["attn2"]}, {"skips": [0]},
                                    {"time": 5, "silent": ["attn1", "attn2"], "skips": [0, 3]}])
def test_what_is_altered_changes_the_output_and_comes_back(model, given, change):
    unet = model.unet
    before = unet(*given)
    with altered(unet, **change):
        assert not torch.allclose(unet(*given), before)
    assert torch.equal(unet(*given), before)
    with pytest.raises(KeyError), altered(unet, **change):
        raise KeyError
    assert torch.equal(unet(*given), before) and not {"encode", "embed_time"} & set(vars(unet))


@torch.no_grad()
def test_alterations_are_what_they_say(model, given):
    unet, (x, t, context) = model.unet, given
    with altered(unet, time=7):
        assert torch.equal(unet(x, t, context), unet(x, 900.0, context))
        with altered(unet, skips=[0]):
            assert not torch.equal(unet(x, t, context), unet(x + 1, t, context))
        told = unet(x, t, context)
    assert torch.equal(told, unet(x, 7.0, context))
    with altered(unet, silent=["attn2"]):
        assert torch.equal(unet(x, t, context), unet(x, t, -context))
    with altered(unet, skips=range(4)):
        features = unet.encode(x, unet.embed_time(t, x), context)
    assert all(not one.any() for one in features[:-1]) and features[-1].any()


def test_an_altered_time_holds_where_a_cache_embeds_all_timesteps_of_a_run(model, given):
    unet, (x, _, context) = model.unet, given
    with altered(unet, time=7):
        cached = with_cache(unet, [900.0, 500.0, 100.0])
        for other in (900.0, 500.0, 100.0):
            assert torch.allclose(cached(x, other, context), unet(x, 7.0, context), atol=1e-6)
        assert model.text2img("a cat", num_inference_steps=3, guidance_scale=2.0)


@pytest.mark.parametrize("change, said", [({"silent": ["attn3"]}, "attn3"), ({"skips": [4]}, "skips 0 to 3")])
def test_what_is_not_there_cannot_be_lost(model, change, said):
    with pytest.raises(ValueError, match=said), altered(model.unet, **change):
        pass


# --- drawings -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["tiny", "mini", "sd15"])
def test_a_ladder_tells_every_shape(name):
    drawing = shape_ladder(PRESETS[name])
    told = "\n".join(words(drawing))
    steps, _ = rungs(PRESETS[name].unet, PRESETS[name].latent_size)
    for i, step in enumerate(steps):
        assert f"skip {i}" in told and f"{step.below} + {step.skip[0]} = {step.below + step.skip[0]}" in told
    assert drawing.width <= WIDTH and len(drawing.png()) < 120_000


def test_bars_tell_both_models():
    drawing = cost_bars([PRESETS["tiny"], PRESETS["mini"]])
    assert {"tiny, parameters", "mini, FLOPs", "time", "level 0"} <= set(words(drawing))
    assert drawing.width <= WIDTH


def test_a_table_writes_its_numbers():
    drawing = shaded_table(torch.tensor([[0.5, 1.25]]), ["all"], ["50", "999"], title="Losses", x="t", y="")
    assert {"0.50", "1.25", "all", "999"} <= set(words(drawing))
    with pytest.raises(ValueError, match="2 rows"):
        shaded_table(torch.zeros(1, 2), ["a", "b"], ["c", "d"], title="", x="", y="")


# --- the widget ---------------------------------------------------------------------------------------

def test_the_widget_shows_what_is_set(model):
    widget = UNetBreaker(model, [draw_scene(0, "test"), draw_scene(1, "test")])
    before = widget.image.value
    widget.controls["time"].value = 50
    told = widget.image.value
    assert told != before
    widget.controls["skips"].value = tuple(range(widget.skip_count))
    widget.controls["attn2"].value = False
    assert widget.image.value != told
    assert widget.settings() == {"scene": 0, "t": 500, "time": 50, "skips": (0, 1, 2, 3), "silent": ["attn2"]}
    images, captions = widget.look(1, 100, time=50)
    assert len(images) == len(captions) == 4 and captions[0] == draw_scene(1, "test").caption
    still = widget.still()
    assert still.width <= WIDTH and sum("no skips" in one for one in words(still)) == 3
    with pytest.raises(ValueError, match="no scenes"):
        UNetBreaker(model, [])


def losses(captions) -> list[str]:
    return [caption.rpartition("loss ")[2] for caption in captions]


def test_only_what_the_altered_u_net_predicts_depends_on_the_change(model):
    """Of four images and captions the last one is the altered U-Net's, and the third the whole one's."""
    widget = UNetBreaker(model, [draw_scene(0, "test")])
    change = {"skips": (0, 1, 2, 3), "silent": ["attn1", "attn2"]}
    images, captions = widget.look(0, 900, **change)
    same_images, same_captions = widget.look(0, 900)
    with altered(model.unet, **change):
        broken_images, broken_captions = widget.look(0, 900)
    assert np.array_equal(images[0], draw_scene(0, "test").image)
    for i in range(3):
        assert np.array_equal(images[i], same_images[i])
    assert np.array_equal(same_images[2], same_images[3]) and not np.array_equal(images[2], images[3])
    assert np.array_equal(images[3], broken_images[2])
    whole, broken = losses(same_captions[2:]), losses(broken_captions[2:])
    assert whole[0] == whole[1] and broken[0] == broken[1] and whole != broken
    assert losses(captions[2:]) == [whole[0], broken[0]]
    assert captions[2].startswith("whole") and captions[3].startswith("altered")


def test_the_still_shows_what_each_altered_u_net_predicts(model):
    widget = UNetBreaker(model, [draw_scene(0, "test")])
    changes = ({"time": 50}, {"skips": (0, 1, 2, 3)}, {"silent": ["attn1"]}, {"silent": ["attn2"]})
    expected, figures = [], []
    for t in (100, 500, 900):
        images, captions = widget.look(0, t)
        expected += images[1:3]
        figures += losses(captions[2:3])
        for change in changes:
            images, captions = widget.look(0, t, **change)
            expected.append(images[3])
            figures += losses(captions[3:])
    still = widget.still()
    assert_shows(still, expected)
    assert losses(one.replace("\n", " ") for one in words(still) if "loss" in one) == figures
