"""A run's folder at small size, for tests of what is trained on top of a base."""

from dataclasses import replace
from pathlib import Path

import torch
from models import randomise

from sdlearn.clip import CLIP
from sdlearn.config import PRESETS, ModelConfig, VAEConfig
from sdlearn.training import stages
from sdlearn.training.loop import save_state
from sdlearn.unet import UNet


def scene_config() -> ModelConfig:
    """`tiny`, at the size of a scene."""
    tiny = PRESETS["tiny"]
    vae = VAEConfig(channels=(4, 4, 8, 8), layers_per_block=1, groups=2, scaling_factor=1.0)
    return replace(tiny, vae=vae, vision=replace(tiny.vision, image_size=128, patch_size=32), image_size=128)


def untrained_base(config: ModelConfig, folder: Path) -> Path:
    """A run that has a base, untrained: random weights, whose U-Net does not output zeros."""
    stages.train_tokenizer(config, folder, captions=500)
    generator = torch.Generator().manual_seed(0)
    for stage, module in (("clip", CLIP(config.text, config.vision)), ("unet", UNet(config.unet)),
                          ("vae", stages.make_vae(config, folder).model)):
        if stage != "vae":
            randomise(module, generator)
        weights = module.state_dict()
        progress = {"step": 5, "samples": 50, "seconds": 1.0}
        save_state(folder / f"{stage}-state.pt", {"model": weights, "average": weights, "progress": progress})
    return folder
