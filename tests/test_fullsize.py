"""The full-size Stable Diffusion models, on random weights: the numbers of diffusers, transformers and OpenCLIP.

A learned weight is not needed for that: on the same random ones both sides must give the same. Every module
is made on the meta device, without memory, and both sides take the same tensors, so that there is never more
than one copy of one model: 3.5 GB. Images are small, 64 pixels a side. Presets of one shape share one run.
"""

import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from sdlearn.checkpoint import configs
from sdlearn.clip import CLIP, TextEncoder
from sdlearn.config import PRESETS, ControlNetConfig, NoiseConfig
from sdlearn.controlnet import Control, ControlNet, add_control
from sdlearn.guidance import predict_x0
from sdlearn.inpaint import blended_denoise, nine_channels, repaint
from sdlearn.samplers import SAMPLERS, ddpm, make_timesteps_for
from sdlearn.schedule import NoiseSchedule
from sdlearn.unet import UNet
from sdlearn.vae import VAE

FULL = ("sd15", "sd15_inpaint", "sd2_base", "sd21", "sd2_inpaint")
BOUND = 1e-5                # max |ours - theirs| / max |theirs|, in float32
CELLS, TOKENS = (8, 12), 77


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small images are bound by reading the weights; threads, on a busy machine, would wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def difference(ours, theirs):
    assert ours.shape == theirs.shape and theirs.abs().max() > 0.01, "a reference near zero would prove nothing"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def on_meta(make):
    with torch.device("meta"):
        return make().eval()


def random_weights(shapes, seed=0):
    """A random tensor for every (name, shape): norms near one, weights that keep the size of their input.

    Drawing 860 million numbers takes half a minute. A million are drawn, a prime number of them so that
    no two rows of a weight are alike, and repeated from another place for each tensor.
    """
    block = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))
    block, place, weights = block.repeat(2), 0, {}
    for name, shape in shapes.items():
        count, place = math.prod(shape), (place + 7919) % 1_000_003
        repeats = 1 + count // 1_000_003
        values = block[place:place + 1_000_003].repeat(repeats)[:count].reshape(shape)
        if "norm" in name or ".ln_" in name or name.startswith("ln_"):
            weights[name] = values.mul_(0.1) + (1 if name.endswith("weight") else 0)
        elif "embedding" in name and len(shape) < 3 and "time" not in name:
            weights[name] = values.mul_(0.5)
        else:
            weights[name] = values.mul_(math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1)
    return weights


def shapes(module, but="position_ids"):
    return {name: tensor.shape for name, tensor in module.state_dict().items() if but not in name}


def filled(module, weights, but=""):
    """The module with its own of these tensors, not copied; `but` begins the names it has in a spelling of its own."""
    own = {name: weights[name.removeprefix(but)] for name in module.state_dict()}
    module.load_state_dict(own, strict=True, assign=True)
    return module.requires_grad_(False)


def through_json(values):
    return json.loads(json.dumps(values))


# --- U-Nets and ControlNets -------------------------------------------------------------------------

@cache
@torch.no_grad()
def unet_differences(base):
    """Of the U-Net, the ControlNet, both together and the inpainting U-Net, which share all they can."""
    config = PRESETS[base].unet
    control = ControlNetConfig(config)
    nine = replace(config, in_channels=9)
    unet, net = on_meta(lambda: UNet(config)), on_meta(lambda: ControlNet(control))
    weights = random_weights(shapes(unet) | shapes(net))
    reference = filled(on_meta(lambda: UNet2DConditionModel.from_config(through_json(
        configs.unet_to_dict(config, 64)))), weights)
    net_reference = filled(on_meta(lambda: ControlNetModel.from_config(through_json(
        configs.controlnet_to_dict(control)))), weights)
    unet, net = filled(unet, weights), filled(net, weights)

    generator = torch.Generator().manual_seed(1)
    x, beside = (torch.randn(1, channels, *CELLS, generator=generator) for channels in (4, 5))
    context = torch.randn(1, TOKENS, config.context_dim, generator=generator)
    hint = torch.rand(1, 3, *(8 * side for side in CELLS), generator=generator)
    found = {"U-Net": difference(unet(x, 981, context), reference(x, 981, context).sample)}

    ours = net(x, 301, context, hint, conditioning_scale=0.8)
    skips, middle = net_reference(x, 301, context, hint, 0.8, return_dict=False)
    found["ControlNet"] = max(map(difference, ours, [*skips, middle]))
    theirs = reference(x, 301, context, down_block_additional_residuals=skips, mid_block_additional_residual=middle)
    made = add_control(unet, [Control(net, hint, 0.8)])(x, 301, context)
    found["controlled U-Net"] = difference(made, theirs.sample)
    found["what the control changes"] = difference(unet(x, 301, context), theirs.sample)
    del net, net_reference

    weights |= random_weights({"conv_in.weight": (config.channels[0], 9, 3, 3)}, seed=2)
    unet = filled(on_meta(lambda: UNet(nine)), weights)
    reference = filled(on_meta(lambda: UNet2DConditionModel.from_config(through_json(
        configs.unet_to_dict(nine, 64)))), weights)
    made = nine_channels(unet, beside[:, :1], beside[:, 1:])(x, 21.5, context)
    found["inpainting U-Net"] = difference(made, reference(torch.cat([x, beside], 1), 21.5, context).sample)
    return found


def family(preset):
    """The preset that stands for all with this one's shape, inpainting and v-prediction aside."""
    shape = replace(PRESETS[preset].unet, in_channels=4)
    return next(name for name in FULL if PRESETS[name].unet == shape)


@pytest.mark.parametrize("preset", FULL)
def test_the_unet_is_that_of_diffusers(preset):
    part = "inpainting U-Net" if PRESETS[preset].unet.in_channels == 9 else "U-Net"
    assert unet_differences(family(preset))[part] <= BOUND


@pytest.mark.parametrize("preset", FULL)
def test_the_controlnet_is_that_of_diffusers_alone_and_with_the_unet(preset):
    found = unet_differences(family(preset))
    assert found["ControlNet"] <= BOUND
    assert found["controlled U-Net"] <= BOUND < 1e-2 < found["what the control changes"]


# --- the autoencoder --------------------------------------------------------------------------------

@cache
@torch.no_grad()
def vae_differences(config):
    ours = on_meta(lambda: VAE(config))
    weights = random_weights(shapes(ours), seed=3)
    theirs = filled(on_meta(lambda: AutoencoderKL.from_config(through_json(configs.vae_to_dict(config, 512)))), weights)
    ours = filled(ours, weights)
    generator = torch.Generator().manual_seed(4)
    pixels, latent = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1, torch.randn(1, 4, 8, 8, generator=generator)
    mine, wanted = ours.encode(pixels), theirs.encode(pixels).latent_dist
    return {"mean": difference(mine.mean, wanted.mean), "logvar": difference(mine.logvar, wanted.logvar),
            "pixels": difference(ours.to_pixels(latent), theirs.decode(latent / theirs.config.scaling_factor).sample)}


@pytest.mark.parametrize("preset", FULL)
def test_the_autoencoder_is_that_of_diffusers(preset):
    found = vae_differences(PRESETS[preset].vae)
    assert max(found.values()) <= BOUND, found


# --- text -------------------------------------------------------------------------------------------

def sentence(config):
    """Ids (1, 77) of a sentence of twenty words, padded as the config has it."""
    start, end = config.vocab_size - 2, config.vocab_size - 1
    words = torch.randint(1, start, (20,), generator=torch.Generator().manual_seed(5)).tolist()
    return torch.tensor([[start, *words, end, *[end if config.pad_with_end else 0] * (TOKENS - 22)]])


@cache
@torch.no_grad()
def text_difference(config):
    ours = on_meta(lambda: TextEncoder(config))
    weights = random_weights(shapes(ours), seed=6)
    theirs = on_meta(lambda: CLIPTextModel(CLIPTextConfig(**configs.text_to_dict(config))))
    inner = getattr(theirs, "text_model", theirs)       # older versions of transformers have one level more
    inner.embeddings.position_ids = torch.arange(TOKENS)[None]
    theirs = filled(theirs, weights, but="text_model.")
    return difference(filled(ours, weights)(sentence(config)).hidden, theirs(sentence(config)).last_hidden_state)


@pytest.mark.parametrize("preset", FULL)
def test_the_text_encoder_is_that_of_transformers(preset):
    assert text_difference(PRESETS[preset].text) <= BOUND


class OpenCLIPBlock(nn.Module):
    """A block of OpenCLIP's text transformer, under the names of its checkpoints."""

    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, 4 * dim), "c_proj": nn.Linear(4 * dim, dim)})

    def forward(self, x, mask):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class OpenCLIPText(nn.Module):
    """Its encoder of 24 blocks, of which SD 2.x takes what the last but one says."""

    def __init__(self, dim=1024, blocks=24, heads=16, vocab_size=49408):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.positional_embedding = nn.Parameter(torch.empty(TOKENS, dim))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(
            OpenCLIPBlock(dim, heads) for _ in range(blocks))})
        self.ln_final = nn.LayerNorm(dim)

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((TOKENS, TOKENS), -math.inf).triu(1)
        for block in self.transformer["resblocks"][:-1]:
            x = block(x, mask)
        return self.ln_final(x)


def as_ours(weights):
    """OpenCLIP's tensors under the names of transformers; q, k and v lie stacked in in_proj."""
    singles = {"token_embedding.weight": "embeddings.token_embedding.weight", "ln_final.bias": "final_layer_norm.bias",
               "positional_embedding": "embeddings.position_embedding.weight",
               "ln_final.weight": "final_layer_norm.weight"}
    ours = {mine: weights[theirs] for theirs, mine in singles.items()}
    inside = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
              "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for layer in range(23):
        theirs, mine = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            ours |= {f"{mine}.{b}.{kind}": weights[f"{theirs}.{a}.{kind}"] for a, b in inside.items()}
            thirds = weights[f"{theirs}.attn.in_proj_{kind}"].chunk(3)
            ours |= {f"{mine}.self_attn.{which}_proj.{kind}": third
                     for which, third in zip("qkv", thirds, strict=True)}
    return ours


@cache
@torch.no_grad()
def openclip_difference(config):
    theirs = on_meta(OpenCLIPText)
    weights = random_weights(shapes(theirs), seed=7)
    theirs = filled(theirs, weights)
    mine = on_meta(lambda: TextEncoder(config))
    mine.load_state_dict(as_ours(weights), strict=True, assign=True)
    return difference(mine(sentence(config)).hidden, theirs(sentence(config)))


@pytest.mark.parametrize("preset", [name for name in FULL if name.startswith("sd2")])
def test_the_text_encoder_of_sd_2_is_that_of_openclip(preset):
    assert openclip_difference(PRESETS[preset].text) <= BOUND


@torch.no_grad()
def test_the_vision_encoder_of_vit_l_14_is_that_of_transformers():
    config = PRESETS["sd15"].vision
    ours = on_meta(lambda: CLIP(PRESETS["sd15"].text, config))
    weights = random_weights({name: shape for name, shape in shapes(ours).items() if name.startswith("vis")}, seed=8)
    theirs = on_meta(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**configs.vision_to_dict(config))))
    places = (config.image_size // config.patch_size) ** 2 + 1
    theirs.vision_model.embeddings.position_ids = torch.arange(places)[None]
    theirs = filled(theirs, weights)
    encoder = filled(ours.vision_model,
                     {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()})
    pixels = torch.randn(1, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(9))
    made = encoder(pixels).pooled @ weights["visual_projection.weight"].T
    assert difference(made, theirs(pixels).image_embeds) <= BOUND


# --- whole runs, without a value --------------------------------------------------------------------

@cache
def meta_model(preset):
    config = PRESETS[preset].unet
    control = ControlNetConfig(replace(config, in_channels=4))
    return (on_meta(lambda: UNet(config)).requires_grad_(False).half(),
            on_meta(lambda: ControlNet(control)).requires_grad_(False).half())


@pytest.mark.parametrize("preset, name, way", [
    *[("sd15", name, "plain") for name in SAMPLERS],
    *[("sd2_inpaint", name, "all at once") for name in SAMPLERS],       # nine channels, controls, known cells
    *[(preset, "dpmpp_2m", "all at once") for preset in FULL if preset != "sd2_inpaint"],
])
def test_a_guided_run_asks_no_tensor_for_its_value(preset, name, way):
    """On the meta device there are no values: whoever asked for one, or mixed devices, would raise.

    On a GPU each such question waits for all that was asked of it before.
    """
    unet, net = meta_model(preset)
    schedule = NoiseSchedule(PRESETS[preset].noise)
    grid, side = make_timesteps_for(name, schedule, 2), PRESETS[preset].latent_size
    half = {"device": "meta", "dtype": torch.float16}
    x = torch.empty(2, 4, side, side, device="meta")
    context, uncond = torch.empty(2, 2, TOKENS, unet.config.context_dim, **half)
    mask, known = torch.empty(1, 1, side, side, device="meta"), torch.empty(1, 4, side, side, device="meta")
    run = unet if unet.config.in_channels == 4 else nine_channels(unet, mask, known)
    if way == "all at once":
        hint = torch.empty(1, 3, 8 * side, 8 * side, **half)
        controls = [Control(net, hint, 0.5, end=0.5, guess_mode=True), Control(net, hint)]
        run = add_control(run, controls, grid=grid, batch=2)
    denoise = predict_x0(run, schedule, context, uncond, guidance_scale=7.5, guidance_rescale=0.7)
    if way == "all at once":
        denoise = blended_denoise(denoise, known, mask, torch.empty_like(known), schedule)
    *_, last = SAMPLERS[name](denoise, x, grid, schedule, generator=torch.Generator())
    assert last.x.shape == x.shape and last.x.dtype == torch.float32 and last.x.device.type == "meta"


@pytest.mark.parametrize("asks", [lambda x: x.max().item(), lambda x: bool((x > 0).any()), lambda x: x[x > 0],
                                  lambda x: x + torch.ones(3)], ids=["item", "bool", "indices", "another device"])
def test_the_meta_device_would_tell(asks):
    schedule = NoiseSchedule(NoiseConfig())

    def network(x, t, context):
        asks(x)
        return x
    denoise = predict_x0(network, schedule, torch.empty(1, 7, 3, device="meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        list(ddpm(denoise, torch.empty(1, 4, 2, 3, device="meta"), make_timesteps_for("ddpm", schedule, 2), schedule))


def test_repaint_asks_no_tensor_for_its_value():
    unet, _ = meta_model("sd15")
    schedule = NoiseSchedule(NoiseConfig())
    x, mask = torch.empty(1, 4, 64, 64, device="meta"), torch.empty(1, 1, 64, 64, device="meta")
    context = torch.empty(1, TOKENS, 768, dtype=torch.float16, device="meta")
    sample = repaint(ddpm, x, mask, times=2)
    *_, last = sample(predict_x0(unet, schedule, context), x, make_timesteps_for("ddpm", schedule, 2), schedule)
    assert last.x.device.type == "meta"
