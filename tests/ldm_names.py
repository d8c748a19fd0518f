"""Names of LDM single files for tests, from a table of names: they share no rule with the package.

`data/keys_ldm.json` lists every tensor of Stable Diffusion's parts as [name there, shape there, name of
diffusers]; a U-Net of SD 2.x has the same names, its other shapes stand beside. Of OpenCLIP's text encoder it
lists what stands outside the layers and the first layer, with three names where three are stacked.
"""

import json
from pathlib import Path

import torch

KEYS = json.loads((Path(__file__).parent / "data" / "keys_ldm.json").read_text(encoding="utf-8"))
UNET, VAE = "model.diffusion_model.", "first_stage_model."
HF, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."

NAMES = {part: {ours: there for there, _, ours in KEYS[part]} for part in ("unet", "vae", "controlnet")}
POINTWISE = {there for there, shape, _ in KEYS["vae"] if len(shape) == 4 and ".attn_1." in there}


def unet_shapes(newer: bool = False, in_channels: int = 4) -> dict[str, tuple[int, ...]]:
    """Of the full-size U-Nets, without their prefix."""
    shapes = {there: tuple(shape) for there, shape, _ in KEYS["unet"]}
    if newer:
        shapes |= {there: tuple(shape) for there, shape in KEYS["unet2_where_other"]}
    return shapes | {"input_blocks.0.0.weight": (320, in_channels, 3, 3)}


def controlnet_shapes() -> dict[str, tuple[int, ...]]:
    """Of the full-size ControlNet of SD 1.x: the U-Net's first half, and what it has of its own."""
    own = {there: tuple(shape) for there, shape, _ in KEYS["controlnet"]}
    return own | {there: shape for there, shape in unet_shapes().items() if not there.startswith(("out",))}


def vae_shapes() -> dict[str, tuple[int, ...]]:
    return {there: tuple(shape) for there, shape, _ in KEYS["vae"]}


def open_clip_names(layers: int) -> dict[str, list[str]]:
    """{name there: our names}, for an encoder of so many layers."""
    names = {}
    for there, ours in KEYS["open_clip"]:
        for i in range(layers if ".resblocks." in there else 1):
            names[there.replace(".0.", f".{i}.")] = [name.replace(".layers.0.", f".layers.{i}.") for name in ours]
    return names


def ldm_unet(tensors: dict, prefix: str = UNET) -> dict:
    return {prefix + NAMES["unet"][ours]: tensor for ours, tensor in tensors.items()}


def ldm_vae(tensors: dict, prefix: str = VAE) -> dict:
    names = {ours: NAMES["vae"][ours] for ours in tensors}
    return {prefix + there: tensors[ours][:, :, None, None] if there in POINTWISE else tensors[ours]
            for ours, there in names.items()}


def ldm_open_clip(tensors: dict, layers: int, prefix: str = OPEN_CLIP) -> dict:
    return {prefix + there: torch.cat([tensors[name] for name in ours])
            for there, ours in open_clip_names(layers).items()}
