"""Where our tensors lie in the single files of the first Stable Diffusion code (LDM), as rules.

Our names are those of diffusers and transformers. Each function takes all names of one part and gives,
for each, its place in a single file, without the part's prefix. There is one set of rules, from our names
to theirs: turned around, the table is the way back. Rombach et al. 2022 numbered the blocks of a U-Net in
one row, so their arithmetic needs to know how many there are in a level, which it counts from the names.

    unet, controlnet    input_blocks.4.0.in_layers.2.weight     down_blocks.1.resnets.0.conv1.weight
    vae                 decoder.up.3.block.0.conv1.weight       decoder.up_blocks.0.resnets.0.conv1.weight
    text, OpenCLIP      transformer.resblocks.0.ln_1.weight     encoder.layers.0.layer_norm1.weight
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .files import Key, Shape

UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
               "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}
STACKED = ("q_proj", "k_proj", "v_proj")


class KeyMapping(NamedTuple):
    """Where a tensor of ours lies in a single file, and in which form."""

    name: str
    third: int | None = None    # one of three that are stacked there along their first axis
    pointwise: bool = False     # a linear layer here, a 1x1 convolution there

    def shape(self, ours: Shape) -> Shape:
        """The shape of the whole tensor there."""
        if self.third is not None:
            ours = (3 * ours[0], *ours[1:])
        return (*ours, 1, 1) if self.pointwise else ours

    def ours(self, stored: Tensor) -> Tensor:
        """Our tensor, a view of the one there. A file may hold a pointwise convolution as linear already."""
        if self.third is not None:
            return stored.chunk(3)[self.third]
        return stored[:, :, 0, 0] if self.pointwise and stored.ndim == 4 else stored


def to_single_file(tensors: Mapping[Key, Tensor], places: Mapping[Key, KeyMapping]) -> dict[str, Tensor]:
    """Our tensors under the names and in the forms of a single file. Nothing is copied but what is stacked."""
    stored: dict[str, list[Tensor]] = {}
    for key, mapping in sorted(places.items(), key=lambda item: (item[1].name, item[1].third or 0)):
        tensor = tensors[key]
        stored.setdefault(mapping.name, []).append(tensor[:, :, None, None] if mapping.pointwise else tensor)
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in stored.items()}


# --- the rules --------------------------------------------------------------------------------------

def map_unet_keys(names: Iterable[str]) -> dict[str, KeyMapping]:
    """Of a U-Net or a ControlNet with any number of levels and layers."""
    names = list(names)
    layers = count_numbers(names, r"down_blocks\.0\.resnets\.(\d+)\.")
    attending = {int(found[1]) for name in names if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    hints = count_numbers(names, r"controlnet_cond_embedding\.blocks\.(\d+)\.")

    def rename(name: str) -> str:
        match [int(part) if part.isdigit() else part for part in name.split(".")]:
            case ["time_embedding", "linear_1" | "linear_2" as linear, kind]:
                return f"time_embed.{0 if linear == 'linear_1' else 2}.{kind}"
            case ["conv_in", kind]:
                return f"input_blocks.0.0.{kind}"
            case ["conv_norm_out" | "conv_out" as last, kind]:
                return f"out.{0 if last == 'conv_norm_out' else 2}.{kind}"
            case ["down_blocks", b, "resnets", j, layer, kind]:
                return f"input_blocks.{1 + b * (layers + 1) + j}.0.{UNET_RESNET[layer]}.{kind}"
            case ["down_blocks", b, "attentions", j, *_]:
                return f"input_blocks.{1 + b * (layers + 1) + j}.1.{drop_parts(name, 4)}"
            case ["down_blocks", b, "downsamplers", 0, "conv", kind]:
                return f"input_blocks.{(b + 1) * (layers + 1)}.0.op.{kind}"
            case ["mid_block", "resnets", j, layer, kind]:
                return f"middle_block.{2 * j}.{UNET_RESNET[layer]}.{kind}"
            case ["mid_block", "attentions", 0, *_]:
                return f"middle_block.1.{drop_parts(name, 3)}"
            case ["up_blocks", b, "resnets", j, layer, kind]:
                return f"output_blocks.{b * (layers + 1) + j}.0.{UNET_RESNET[layer]}.{kind}"
            case ["up_blocks", b, "attentions", j, *_]:
                return f"output_blocks.{b * (layers + 1) + j}.1.{drop_parts(name, 4)}"
            case ["up_blocks", b, "upsamplers", 0, "conv", kind]:       # behind the attention, where there is one
                return f"output_blocks.{b * (layers + 1) + layers}.{2 if b in attending else 1}.conv.{kind}"
            case ["controlnet_cond_embedding", "conv_in", kind]:
                return f"input_hint_block.0.{kind}"
            case ["controlnet_cond_embedding", "blocks", i, kind]:
                return f"input_hint_block.{2 * i + 2}.{kind}"
            case ["controlnet_cond_embedding", "conv_out", kind]:
                return f"input_hint_block.{2 * hints + 2}.{kind}"
            case ["controlnet_down_blocks", i, kind]:
                return f"zero_convs.{i}.0.{kind}"
            case ["controlnet_mid_block", kind]:
                return f"middle_block_out.0.{kind}"
        raise ValueError(f"there is no rule for a tensor '{name}' of a U-Net")

    return {name: KeyMapping(rename(name)) for name in names}


def map_vae_keys(names: Iterable[str]) -> dict[str, KeyMapping]:
    """Of an autoencoder; its decoder's levels are counted from the finest there, from the coarsest here."""
    names = list(names)
    levels = count_numbers(names, r"decoder\.up_blocks\.(\d+)\.")

    def rename(name: str) -> KeyMapping:
        half, *rest = name.split(".")
        match rest:
            case ["down_blocks" | "up_blocks" as way, i, "resnets", j, *layer]:
                return KeyMapping(f"{half}.{level(way, i)}.block.{j}.{resnet(layer)}")
            case ["down_blocks" | "up_blocks" as way, i, "downsamplers" | "upsamplers" as sampler, "0", *layer]:
                return KeyMapping(f"{half}.{level(way, i)}.{sampler.removesuffix('rs')}.{'.'.join(layer)}")
            case ["mid_block", "resnets", j, *layer]:
                return KeyMapping(f"{half}.mid.block_{int(j) + 1}.{resnet(layer)}")
            case ["mid_block", "attentions", "0", layer, *_, kind]:
                pointwise = layer != "group_norm" and kind == "weight"
                return KeyMapping(f"{half}.mid.attn_1.{VAE_ATTENTION[layer]}.{kind}", pointwise=pointwise)
        return KeyMapping(name.replace("conv_norm_out", "norm_out"))

    def level(way: str, i: str) -> str:
        return f"down.{i}" if way == "down_blocks" else f"up.{levels - 1 - int(i)}"

    def resnet(layer: list[str]) -> str:
        return ".".join(layer).replace("conv_shortcut", "nin_shortcut")

    return {name: rename(name) for name in names}


def map_open_clip_keys(names: Iterable[str]) -> dict[str, KeyMapping]:
    """Of SD 2.x' text encoder, where queries, keys and values are stacked in one tensor."""
    def rename(name: str) -> KeyMapping:
        match name.split("."):
            case ["embeddings", "position_embedding", "weight"]:
                return KeyMapping("positional_embedding")
            case ["embeddings", "token_embedding", kind]:
                return KeyMapping(f"token_embedding.{kind}")
            case ["final_layer_norm", kind]:
                return KeyMapping(f"ln_final.{kind}")
            case ["encoder", "layers", i, "self_attn", proj, kind] if proj in STACKED:
                return KeyMapping(f"transformer.resblocks.{i}.attn.in_proj_{kind}", third=STACKED.index(proj))
            case ["encoder", "layers", i, *layer, kind]:
                return KeyMapping(f"transformer.resblocks.{i}.{OPEN_CLIP['.'.join(layer)]}.{kind}")
        raise ValueError(f"there is no rule for a tensor '{name}' of a text encoder")

    return {name: rename(name) for name in names}


# --- spellings in model folders -----------------------------------------------------------------------

def rename_vae_key(name: str) -> str:
    """Our name of an autoencoder's tensor as early diffusers wrote it: `query` for `to_q` and so on."""
    head, attention, layer = name.rpartition("mid_block.attentions.0.")
    old, _, kind = layer.rpartition(".")
    return f"{head}{attention}{OLD_VAE_ATTENTION.get(old, old)}.{kind}" if attention else name


def rename_text_key(name: str) -> str | None:
    """transformers wrote text encoders with and without a prefix, and old ones with their positions 0...76."""
    return None if name.endswith("embeddings.position_ids") else name.removeprefix("text_model.")


def count_numbers(names: Iterable[str], pattern: str) -> int:
    """How many different numbers `pattern` finds at the start of names."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


def drop_parts(name: str, parts: int) -> str:
    return ".".join(name.split(".")[parts:])
