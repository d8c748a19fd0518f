"""Names of single files: rules equal to a table of names and to diffusers' converters; what shapes tell."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from ldm_names import (
    HF,
    NAMES,
    OPEN_CLIP,
    UNET,
    VAE,
    controlnet_shapes,
    ldm_open_clip,
    open_clip_names,
    unet_shapes,
    vae_shapes,
)
from models import one_thread  # noqa: F401

from sdlearn.checkpoint import CheckpointError, detect, get_shapes, layouts
from sdlearn.clip import TextEncoder
from sdlearn.config import PRESETS, ControlNetConfig, UNetConfig, VAEConfig
from sdlearn.unet import UNet
from sdlearn.vae import VAE as Autoencoder

DATA = Path(__file__).parent / "data"
OURS = json.loads((DATA / "keys_unet.json").read_text()) | json.loads((DATA / "keys_vae_text.json").read_text())
CONTROLNET = {name: tuple(shape) for name, shape in OURS["controlnet"]}


def meta(make, *arguments):
    with torch.device("meta"):
        return make(*arguments)


def placed(places, ours):
    """{name in the file: shape in the file} of tensors with our names and shapes."""
    return {place.name: place.shape(ours[name]) for name, place in places.items()}


# --- the rules against the table of all names -------------------------------------------------------

@pytest.mark.parametrize("name", ["sd15", "sd15_inpaint", "sd2_base", "sd21", "sd2_inpaint"])
def test_every_tensor_of_a_unet_has_its_published_name_and_shape(name):
    config = PRESETS[name].unet
    ours = get_shapes(meta(UNet, config))
    places = layouts.map_unet_keys(ours)
    assert {name: place.name for name, place in places.items()} == NAMES["unet"]
    assert placed(places, ours) == unet_shapes(config.context_dim == 1024, config.in_channels)


def test_every_tensor_of_a_controlnet_has_its_published_name_and_shape():
    places = layouts.map_unet_keys(CONTROLNET)
    assert placed(places, CONTROLNET) == controlnet_shapes()
    own = {name: place.name for name, place in places.items() if name.startswith("controlnet_")}
    assert own == NAMES["controlnet"]
    assert {name: place.name for name, place in places.items() if name not in own} == {
        name: NAMES["unet"][name] for name in CONTROLNET if name not in own}


def test_every_tensor_of_the_autoencoder_has_its_published_name_and_shape():
    ours = get_shapes(meta(Autoencoder, PRESETS["sd15"].vae))
    places = layouts.map_vae_keys(ours)
    assert {name: place.name for name, place in places.items()} == NAMES["vae"]
    assert placed(places, ours) == vae_shapes()
    assert sum(place.pointwise for place in places.values()) == 8


def test_every_tensor_of_open_clip_is_covered_once():
    ours = get_shapes(meta(TextEncoder, PRESETS["sd2_base"].text))
    places = layouts.map_open_clip_keys(ours)
    found = {}
    for name, place in sorted(places.items(), key=lambda item: item[1].third or 0):
        found.setdefault(place.name, []).append(name)
    assert found == open_clip_names(23)
    wanted = placed(places, ours)
    assert wanted["transformer.resblocks.22.attn.in_proj_weight"] == (3072, 1024)
    assert wanted["transformer.resblocks.22.attn.in_proj_bias"] == (3072,)


@pytest.mark.parametrize("rule, name", [
    (layouts.map_unet_keys, "down_blocks.0.motion_modules.0.weight"), (layouts.map_unet_keys, "class_embedding.weight"),
    (layouts.map_open_clip_keys, "encoder.pooler.weight")])
def test_a_name_without_a_rule_is_told(rule, name):
    with pytest.raises(ValueError, match=name):
        rule([name])


# --- models of other sizes, against diffusers' converters -------------------------------------------

def numbered(names):
    """A different tensor for every name, with as many axes as a converter may index."""
    return {name: torch.full((1, 1, 1, 1) if name.endswith("weight") else (1,), float(i))
            for i, name in enumerate(names)}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=2, max_size=5), st.integers(1, 3))
def test_unets_of_any_depth_are_named_as_diffusers_reads_them(attention, layers):
    config = UNetConfig(channels=(32,) * len(attention), attention=tuple(attention), layers_per_block=layers,
                        context_dim=8, groups=8)
    sizes = get_shapes(meta(UNet, config))
    ours = numbered(sizes)
    places = layouts.map_unet_keys(ours)
    assert len({place.name for place in places.values()}) == len(ours)
    there = {UNET + place.name: ours[name] for name, place in places.items()}
    values = {"layers_per_block": layers, "class_embed_type": None, "addition_embed_type": None}
    assert theirs.convert_ldm_unet_checkpoint(there, values) == ours
    # And what the names of the file tell is the config again.
    read = detect.detect_unet(Path("x.ckpt"), {place.name: sizes[name] for name, place in places.items()
                                               if "attn2.to_k" not in name and "attn2.to_v" not in name})
    assert (read.channels, read.attention, read.layers_per_block) == (config.channels, config.attention, layers)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3))
def test_autoencoders_of_any_depth_are_named_as_diffusers_reads_them(levels, layers):
    config = VAEConfig(channels=tuple(4 * (i + 1) for i in range(levels)), layers_per_block=layers, groups=2)
    sizes = get_shapes(meta(Autoencoder, config))
    ours = {name: torch.full((1,), float(i)) for i, name in enumerate(sizes)}
    places = layouts.map_vae_keys(ours)
    assert len({place.name for place in places.values()}) == len(ours)
    there = {VAE + place.name: ours[name][:, None, None, None] if place.pointwise else ours[name]
             for name, place in places.items()}
    kinds = {"down_block_types": [""] * levels, "up_block_types": [""] * levels}
    read = theirs.convert_ldm_vae_checkpoint(there, kinds)
    assert {name: tensor.flatten() for name, tensor in read.items()} == ours
    found = detect.detect_vae({place.name: sizes[name] for name, place in places.items()})
    assert replace(found, groups=2) == config


def test_open_clip_s_thirds_are_those_that_diffusers_takes():
    config = replace(PRESETS["tiny"].text, layers=3)
    encoder = TextEncoder(config)
    ours = encoder.state_dict()
    places = layouts.map_open_clip_keys(ours)
    there = layouts.to_single_file(ours, places)
    assert {f"x.{name}": tensor.shape for name, tensor in there.items()} == {
        name: tensor.shape for name, tensor in ldm_open_clip(ours, 3, "x.").items()}
    settings = type("", (), {"config": type("", (), {"hidden_size": config.dim})})
    read = theirs.convert_open_clip_checkpoint(settings, {OPEN_CLIP + name: one for name, one in there.items()})
    read = {name.removeprefix("text_model."): tensor for name, tensor in read.items()}
    assert read.keys() == ours.keys()
    assert all(torch.equal(read[name], ours[name]) for name in ours)
    assert all(torch.equal(place.ours(there[place.name]), ours[name]) for name, place in places.items())


def test_a_pointwise_convolution_is_a_linear_layer_in_both_forms():
    place, linear = layouts.KeyMapping("q", pointwise=True), torch.randn(4, 4)
    [there] = layouts.to_single_file({"to_q": linear}, {"to_q": place}).values()
    assert there.shape == place.shape((4, 4)) == (4, 4, 1, 1)
    assert torch.equal(place.ours(there), linear) and torch.equal(place.ours(linear), linear)


def test_early_spellings_of_the_autoencoder_are_ours():
    attention = "encoder.mid_block.attentions.0."
    for old, ours in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        assert layouts.rename_vae_key(f"{attention}{old}.weight") == f"{attention}{ours}.weight"
    for name, _ in OURS["vae"]:
        assert layouts.rename_vae_key(name) == name


# --- what shapes tell -------------------------------------------------------------------------------

def full_size(newer=False, in_channels=4):
    """Every tensor's name and shape of a published single file, without any data."""
    text = {name: tuple(shape) for name, shape in OURS["t2" if newer else "t1"]}
    if newer:
        text = {name: tuple(tensor.shape) for name, tensor in ldm_open_clip(
            {name: torch.empty(shape, device="meta") for name, shape in text.items()}, 23).items()}
    else:
        text = {HF + name: shape for name, shape in text.items()}
    return {**{UNET + name: shape for name, shape in unet_shapes(newer, in_channels).items()},
            **{VAE + name: shape for name, shape in vae_shapes().items()}, **text}


@pytest.mark.parametrize("name, newer, in_channels, prediction", [
    ("sd15", False, 4, None), ("sd15", False, 4, "epsilon"), ("sd15_inpaint", False, 9, None),
    ("sd2_base", True, 4, "epsilon"), ("sd21", True, 4, "v_prediction"), ("sd2_inpaint", True, 9, "epsilon")])
def test_full_size_files_are_told_by_their_shapes(name, newer, in_channels, prediction):
    found = detect.detect_config(Path("model.safetensors"), full_size(newer, in_channels), prediction)
    wanted = replace(PRESETS[name], name="model", vision=None)
    assert found == wanted


def test_a_controlnet_s_shapes_tell_its_config():
    assert detect.detect_controlnet(Path("x"), controlnet_shapes()) == ControlNetConfig(PRESETS["sd15"].unet)


def test_one_damaged_tensor_does_not_change_what_is_read():
    there = full_size()
    wanted = detect.detect_config(Path("model.ckpt"), there)
    for name in list(there)[::60]:
        changed = {key: shape for key, shape in there.items() if key != name}
        assert detect.detect_config(Path("model.ckpt"), changed) == wanted, name
        assert detect.detect_config(Path("model.ckpt"), there | {name: (7, 7)}) == wanted, name


@pytest.mark.parametrize("in_channels", [4, 9])
def test_what_an_sd_2_predicts_must_be_given(in_channels):
    with pytest.raises(CheckpointError, match='prediction="epsilon" for 2.0-base.*inpainting, "v_prediction" for'):
        detect.detect_config(Path("model.ckpt"), full_size(True, in_channels))


def test_parts_that_do_not_fit_together_are_told():
    mixed = full_size() | {name: shape for name, shape in full_size(True).items() if name.startswith(UNET)}
    with pytest.raises(CheckpointError, match="1024 wide.*768 wide"):
        detect.detect_config(Path("model.ckpt"), mixed, "epsilon")
    depth = full_size(True, 5)
    with pytest.raises(CheckpointError, match="5 input channels"):
        detect.detect_config(Path("model.ckpt"), depth, "epsilon")
    narrow = {name: shape for name, shape in full_size().items() if not name.startswith(UNET)}
    ours = get_shapes(meta(UNet, PRESETS["mini"].unet))
    narrow |= placed({name: place._replace(name=UNET + place.name)
                      for name, place in layouts.map_unet_keys(ours).items()}, ours)
    with pytest.raises(CheckpointError, match="192 wide"):
        detect.detect_config(Path("model.ckpt"), narrow)


@pytest.mark.parametrize("names, told", [
    (["conditioner.embedders.0.x", UNET + "input_blocks.0.0.weight", VAE + "x"], "Stable Diffusion XL"),
    ([UNET + "joint_blocks.0.x"], "diffusion transformer"), (["double_blocks.0.img_attn.x"], "diffusion transformer"),
    (["lora_unet_down_blocks_0.lora_up.weight"], "LoRA"), (["unet.conv.lora.down.weight"], "LoRA"),
    (["control_model.zero_convs.0.0.weight"], "ControlNet"), (["controlnet_down_blocks.0.weight"], "ControlNet"),
    (["down_blocks.0.resnets.0.conv1.weight"], "one part"), (["encoder.down.0.block.0.conv1.weight"], "one part"),
    (["text_model.final_layer_norm.weight"], "one part"), (["<toy>"], "embedding"),
    ([UNET + "x", VAE + "x"], "no text encoder"), ([HF + "x"], "no U-Net and no autoencoder"), ([], "no U-Net"),
])
def test_files_of_other_kinds_are_told_what_they_are(names, told):
    with pytest.raises(CheckpointError, match=f"model.ckpt .*{told}") as caught:
        detect.detect_config(Path("model.ckpt"), dict.fromkeys(names, (1,)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [
    "model_ema.diffusion_modelinput_blocks00weight", "model_ema.decay", "betas", "alphas_cumprod",
    "alphas_cumprod_prev", "sqrt_recip_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "posterior_variance", "posterior_mean_coef1", "scale_factor", "logvar",
    "cond_stage_model.transformer.text_model.embeddings.position_ids", "cond_stage_model.model.attn_mask",
    "first_stage_model.loss.logvar", "cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale",
    "cond_stage_model.model.transformer.resblocks.23.ln_1.weight"])
def test_what_training_left_behind_is_passed_over(name):
    assert detect.IGNORED.match(name)


def test_nothing_that_is_read_is_passed_over():
    for there in (full_size(), full_size(True)):
        assert not [name for name in there if detect.IGNORED.match(name)]
    for name in ("betas.weight", "cond_stage_model.model.transformer.resblocks.22.ln_1.weight", "my_betas",
                 "cond_stage_model.logit_scale", "scale_factors"):
        assert not detect.IGNORED.match(name)
