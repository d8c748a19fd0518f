"""Fine-tuning: textual inversion, DreamBooth, LoRA and ControlNet, on one training loop."""

from .controlnet import train_controlnet
from .dreambooth import dreambooth_loss, prior_preserved, train_dreambooth
from .loop import Diverged, LatentDiffusion, TrainStep, diffusion_loss, diffusion_losses, train
from .lora import LoRA, LoRALinear, LowRank, attached, lora_delta, new_lora, train_lora
from .merged import Merged, merged_weight
from .textual_inversion import (
    TEMPLATES,
    Embedding,
    add_embedding,
    embedding_like,
    exchanged,
    grow,
    read_embedding,
    train_embedding,
)

__all__ = ["TEMPLATES", "Diverged", "Embedding", "LatentDiffusion", "LoRA", "LoRALinear", "LowRank", "Merged",
           "TrainStep", "add_embedding", "attached", "diffusion_loss", "diffusion_losses", "dreambooth_loss",
           "embedding_like", "exchanged", "grow", "lora_delta", "merged_weight", "new_lora", "prior_preserved",
           "read_embedding", "train", "train_controlnet", "train_dreambooth", "train_embedding", "train_lora"]
