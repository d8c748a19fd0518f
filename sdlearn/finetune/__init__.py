"""Fine-tuning: textual inversion, DreamBooth, LoRA and ControlNet, on one training loop."""

from .controlnet import train_controlnet
from .dreambooth import train_dreambooth
from .loop import Diverged, LatentDiffusion, TrainStep, diffusion_loss, diffusion_losses, train
from .lora import LoRA, LowRank, attached, new_lora, train_lora
from .merged import Merged
from .textual_inversion import (
    TEMPLATES,
    Embedding,
    add_embedding,
    embedding_like,
    grow,
    read_embedding,
    train_embedding,
)

__all__ = ["TEMPLATES", "Diverged", "Embedding", "LatentDiffusion", "LoRA", "LowRank", "Merged", "TrainStep",
           "add_embedding", "attached", "diffusion_loss", "diffusion_losses", "embedding_like", "grow", "new_lora",
           "read_embedding", "train", "train_controlnet", "train_dreambooth", "train_embedding", "train_lora"]
