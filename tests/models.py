"""Small models with random weights, whole, for tests of everything that is built on a model."""

from dataclasses import replace

import pytest
import torch

from sdlearn.checkpoint import Parts
from sdlearn.clip import CLIP
from sdlearn.config import PRESETS, ModelConfig, NoiseConfig
from sdlearn.tokenizer import Tokenizer
from sdlearn.unet import UNet
from sdlearn.vae import VAE

# No real captions, so that no scene needs to be drawn for a tokenizer.
CAPTIONS = ("a red apple to the left of a cat on a yellow background", "two small green cars",
            "a picture of a large blue star above a tree", "3 balloons with a pink background")
WORLD = {"objects": ["apple", "cat", "car", "star", "tree", "balloon"],
         "words": sorted({word for caption in CAPTIONS for word in caption.split()})}
EPSILON = NoiseConfig()
ZERO_SNR = NoiseConfig(prediction_type="v_prediction", zero_terminal_snr=True)


def tiny_config(noise: NoiseConfig = EPSILON) -> ModelConfig:
    return replace(PRESETS["tiny"], noise=noise)


def tiny_parts(noise: NoiseConfig = EPSILON, vision: bool = True, config: ModelConfig | None = None) -> Parts:
    """A model of the `tiny` preset (or `config`) whose every tensor is random: a fresh U-Net outputs zeros."""
    config = config or tiny_config(noise)
    generator = torch.Generator().manual_seed(0)
    clip = CLIP(config.text, config.vision)
    parts = Parts(config, Tokenizer.train(CAPTIONS, config.text.vocab_size), clip.text_model, VAE(config.vae),
                  UNet(config.unet), clip if vision else None, WORLD)
    if not vision:
        parts.config = replace(config, vision=None)
    for module in (clip, parts.vae, parts.unet):
        randomise(module.eval(), generator)
    return parts


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For the test modules that import it: so small a model gains nothing from threads, and loses by waiting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def randomise(module: torch.nn.Module, generator: torch.Generator):
    """Random values of a size that keeps the signal's: 1/sqrt(inputs) for weights, norms near one."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
        elif parameter.ndim > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(0.1 * noise)
