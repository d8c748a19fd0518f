"""Small Stable Diffusions made by diffusers and transformers, and their single files, named by a table.

All four levels, two layers in each, and the real widths of text, so that a file looks like a published one;
few channels and a small vocabulary.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from ldm_names import HF, ldm_open_clip, ldm_unet, ldm_vae
from models import CAPTIONS, randomise
from transformers import CLIPTextConfig, CLIPTextModel

from sdlearn.tokenizer import Tokenizer

TEXT_LAYERS, VOCABULARY = 2, 600
ATTENDING = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]


@dataclass
class Theirs:
    """Modules of the libraries; `tensors` is the single file."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tensors: dict[str, torch.Tensor]

    def states(self):
        """Names and tensors of each part, in the spelling of ours."""
        return {"unet": self.unet.state_dict(), "vae": self.vae.state_dict(),
                "text_encoder": text_state(self.text_encoder)}


def text_state(text):
    return {name.removeprefix("text_model."): tensor for name, tensor in text.state_dict().items()
            if not name.endswith("position_ids")}


def small(newer: bool = False, in_channels: int = 4, dtype: torch.dtype = torch.float32) -> Theirs:
    """An SD 1.x or 2.x with random weights that `dtype` holds exactly."""
    width, heads = (1024, [1, 2, 2, 2]) if newer else (768, 8)
    unet = UNet2DConditionModel(
        in_channels=in_channels, block_out_channels=[64, 128, 128, 128] if newer else [32, 64, 64, 64],
        down_block_types=ATTENDING, up_block_types=[name.replace("Down", "Up") for name in reversed(ATTENDING)],
        cross_attention_dim=width, attention_head_dim=heads, use_linear_projection=newer)
    vae = AutoencoderKL(block_out_channels=[32, 32, 32, 32], down_block_types=["DownEncoderBlock2D"] * 4,
                        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=4)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=48, num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=width // 64, hidden_act="gelu" if newer else "quick_gelu", projection_dim=width,
        bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1, pad_token_id=0 if newer else VOCABULARY - 1))
    for module in (unet, vae, text):
        randomise(module.eval(), torch.Generator().manual_seed(0))
        module.load_state_dict({name: tensor.to(dtype).to(tensor.dtype)
                                for name, tensor in module.state_dict().items()})
    state = text_state(text)
    words = ldm_open_clip(state, TEXT_LAYERS) if newer else {HF + name: one for name, one in state.items()}
    whole = {**ldm_unet(unet.state_dict()), **ldm_vae(vae.state_dict()), **words}
    return Theirs(unet, vae, text, {name: tensor.to(dtype).contiguous() for name, tensor in whole.items()})


def tokenizer(pad_with_end: bool = True) -> Tokenizer:
    return Tokenizer.train(CAPTIONS, VOCABULARY, pad_with_end)
