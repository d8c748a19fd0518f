"""Fine-tuning: textual inversion, DreamBooth, LoRA and ControlNet, on one training loop."""

from .controlnet import train_controlnet
from .dreambooth import dreambooth_loss, prior_preservation_loss, train_dreambooth
from .loop import Diverged, LatentDiffusion, TrainStep, diffusion_loss, diffusion_losses, train
from .lora import LoRA, LoRALinear, LowRank, attach_lora, lora_delta, new_lora, train_lora
from .merged import MergedLoRAs, merge_weight
from .textual_inversion import (
    TEMPLATES,
    Embedding,
    add_embedding,
    grow_token_embedding,
    init_embedding,
    read_embedding,
    replace_token_embedding,
    train_embedding,
)

__all__ = ["Diverged", "Embedding", "LatentDiffusion", "LoRA", "LoRALinear", "LowRank", "MergedLoRAs", "TEMPLATES",
           "TrainStep", "add_embedding", "attach_lora", "diffusion_loss", "diffusion_losses", "dreambooth_loss",
           "grow_token_embedding", "init_embedding", "lora_delta", "merge_weight", "new_lora",
           "prior_preservation_loss", "read_embedding", "replace_token_embedding", "train", "train_controlnet",
           "train_dreambooth", "train_embedding", "train_lora"]
