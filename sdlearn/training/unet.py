"""Training the U-Net on latents and text features that were computed beforehand.

The autoencoder and the text encoder are frozen, so a scene's latent and its caption's features never
change: they are computed once and kept on disk, and a few of them are exchanged for fresh scenes at
every step, so that the U-Net never waits and no scene is seen for ever.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import nn
from tqdm import tqdm

from ..clip import TextEncoder
from ..config import ModelConfig
from ..data import CORE, Scene, World, contact_sheet, draw_scene
from ..diffusion import diffusion_loss
from ..files import write_atomically
from ..guidance import predict_x0
from ..images import save_sheet, to_images, to_tensor
from ..samplers import SAMPLERS
from ..schedule import NoiseSchedule, make_timesteps
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE

SHOWN = 24                      # prompts on the sheet of samples
FIRST_PROMPT = "a red apple to the left of a cat on a yellow background"


def validation_prompts(count: int, world: World = CORE) -> list[str]:
    """Captions of unseen scenes, the same at every call: what progress is watched on."""
    return [FIRST_PROMPT, *(draw_scene(seed, "test", world).caption for seed in range(count - 1))]


@torch.no_grad()
def encode_scenes(drawn: list[Scene], vae: VAE, text: TextEncoder,
                  tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (B, C, h, w) and text features (B, L, D) of scenes."""
    device = next(vae.parameters()).device
    latents = torch.cat([vae.to_latent(to_tensor([s.image for s in drawn[i:i + 32]]).to(device))
                         for i in range(0, len(drawn), 32)])
    return latents, text(tokenizer([s.caption for s in drawn]).to(device)).hidden


def make_training_batch(latents: torch.Tensor, step: int, schedule: NoiseSchedule) -> tuple[torch.Tensor, ...]:
    """Latents with noise at one timestep, that timestep for each, and what a network should say of them. The noise
    is the same at every call, so that figures can be compared."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(latents)
    t = torch.full((len(latents),), step, device=latents.device)
    return schedule.add_noise(latents, noise, t), t, schedule.target(latents, noise, t)


@torch.no_grad()
def shuffled_caption_losses(unet, schedule: NoiseSchedule, latents: torch.Tensor,
                            contexts: torch.Tensor) -> dict[str, float]:
    """The loss at two timesteps with the right captions and with the captions of other scenes.

    The gap between the two says whether the prompt is heard, long before an image shows it.
    """
    figures = {}
    for step in (999, 700):
        noisy, t, target = make_training_batch(latents, step, schedule)
        for name, context in (("right", contexts), ("wrong", contexts.roll(1, dims=0))):
            figures[f"{name}@{step}"] = float(F.mse_loss(unet(noisy, t, context), target))
    return figures


@torch.no_grad()
def sample_images(network: Callable, context: torch.Tensor, empty: torch.Tensor, shape: tuple[int, ...],
            schedule: NoiseSchedule, vae: VAE, *, guidance: float, steps: int, first: int = 0) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] of texts (B, L, D) by DDIM, from latents of `shape` (C, h, w); image i is of
    the seed first + i. empty (1, L, D): the text "", for guidance."""
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(first + i))
                         for i in range(len(context))]).to(context.device)
    denoise = predict_x0(network, schedule, context, empty, guidance_scale=guidance)
    *_, last = SAMPLERS["ddim"](denoise, noise, make_timesteps(schedule, steps), schedule)
    return torch.cat([vae.to_pixels(part) for part in last.x.split(8)]).clamp(-1, 1)


class LatentCache:
    """Latents (N, C, H, W) and text features (N, L, D) of training scenes, half precision, on disk.

    Row i holds scene `seeds[i]`. `refresh` overwrites the oldest rows with scenes never seen before.
    """

    def __init__(self, folder: Path, vae: VAE, text: TextEncoder, tokenizer: Tokenizer, *, world: World,
                 image_size: int, capacity: int = 24_000, first: int = 4_000, offset: int = 0):
        self.vae, self.text_encoder, self.tokenizer, self.world = vae.eval(), text.eval(), tokenizer, world
        self.offset = offset                                    # of the seeds, so that processes see different scenes
        cells = image_size // vae.config.factor
        shapes = {"latents": (capacity, vae.config.latent_channels, cells, cells),
                  "contexts": (capacity, text.config.length, text.config.dim)}
        self.meta_file = folder / "cache.json"
        self.meta = {"made_by": self._fingerprint(), "capacity": capacity, "made": 0}
        if self.meta_file.exists() and (old := json.loads(self.meta_file.read_text())) | {"made": 0} == self.meta:
            self.meta, mode = old, "r+"
        else:
            folder.mkdir(parents=True, exist_ok=True)
            mode = "w+"
        self.arrays = {name: np.memmap(folder / f"{name}.f16", np.float16, mode, shape=shape)
                       for name, shape in shapes.items()}
        if not self._whole():
            self.meta["made"] = 0
        if (missing := min(first, capacity) - self.meta["made"]) > 0:
            for _ in tqdm(range(-(-missing // 50)), desc="latents", unit="scene", unit_scale=50,
                          disable=not PartialState().is_local_main_process):
                self.refresh(50)

    def __len__(self) -> int:
        return min(self.meta["made"], self.meta["capacity"])

    def _whole(self) -> bool:
        """Whether the arrays have all rows that were counted. The count is written at every step, the arrays when the
        system likes: where the machine went away in between, rows of zeros are left, and zeros are easily learnt."""
        made = len(self)
        return all(bool(array[:made].reshape(made, -1).any(axis=1).all()) for array in self.arrays.values() if made)

    def _fingerprint(self) -> str:
        """Of everything the rows depend on: the two frozen models, the world, and how its captions are worded."""
        captions = [draw_scene(seed, world=self.world).caption for seed in range(64)]
        digest = hashlib.sha256(repr((self.world, self.tokenizer.vocab_size, captions)).encode())
        for model in (self.vae.encoder, self.text_encoder):
            for parameter in model.parameters():
                digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def refresh(self, count: int):
        """Encode `count` new scenes and put them in the place of the oldest."""
        if count == 0:
            return
        drawn = [draw_scene(self.offset + self.meta["made"] + i, world=self.world) for i in range(count)]
        rows = np.arange(self.meta["made"], self.meta["made"] + count) % self.meta["capacity"]
        latents, contexts = encode_scenes(drawn, self.vae, self.text_encoder, self.tokenizer)
        self.arrays["latents"][rows] = latents.cpu().numpy()
        self.arrays["contexts"][rows] = contexts.cpu().numpy()
        self.meta["made"] += count
        # At every call, so that a kill leaves no row counted under another scene than it holds: the few that
        # were written and not counted are the next to be made, again.
        with write_atomically(self.meta_file) as path:
            path.write_text(json.dumps(self.meta))

    def draw(self, size: int, generator: torch.Generator) -> np.ndarray:
        """Rows at random, (size,)."""
        return torch.randint(len(self), (size,), generator=generator).numpy()

    def take(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, C, h, w) and text features (B, L, D) of rows (B,)."""
        return tuple(torch.from_numpy(self.arrays[name][rows]).float() for name in ("latents", "contexts"))

    def seeds(self, rows: np.ndarray) -> np.ndarray:
        """Seeds of the scenes that rows (B,) hold: whatever else of a scene is wanted is drawn from them."""
        made, capacity = self.meta["made"], self.meta["capacity"]
        return self.offset + rows + (made - 1 - rows) // capacity * capacity

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return self.take(self.draw(size, generator))


def draw_shifted_timesteps(count: int, steps: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """(count,) timesteps of 0...steps - 1, rising: one from each of `count` equally likely parts of the schedule, so
    that the loss is less noisy than with timesteps drawn one by one.

    With shift 1 all are as likely. With shift s a share u of the way becomes s u / (1 + (s - 1) u), so noisy ones come
    more often (Esser et al. 2024, section 5.3.2, who so make up for larger images). What stands where is decided
    there, on the first steps of sampling, by a small part of the loss.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (shift * u / (1 + (shift - 1) * u) * steps).long().clamp(max=steps - 1)


class LatentRecipe:
    """What every stage on cached latents has in common: its batches, its loss, its samples.

    A model that reads more than latent, timestep and text gives these in `extra_inputs` and passes them on in
    `network`; `loss` follows.
    """

    warmup = 300
    decay_share = 0.0           # the run has no end: it goes on in the next call

    def __init__(self, model: nn.Module, config: ModelConfig, vae: VAE, text: TextEncoder, tokenizer: Tokenizer,
                 folder: Path, *, world: World = CORE, batch_size: int = 32, learning_rate: float = 5e-4,
                 dropout: float = 0.1, fresh: int = 2, guidance: float = 3.0, shift: float = 1.0, **cache):
        """`dropout`: share of captions replaced by the empty one; `fresh`: new scenes at every step; `shift`: of the
        timesteps to the noisy end, see `draw_shifted_timesteps`."""
        self.model = model.to(memory_format=torch.channels_last)                 # some 8 % faster, on a CPU too
        self.schedule, self.tokenizer, self.text_encoder, self.vae = NoiseSchedule(config.noise), tokenizer, text, vae
        self.world, self.batch_size, self.learning_rate = world, batch_size, learning_rate
        self.dropout, self.fresh, self.guidance, self.shift = dropout, fresh, guidance, shift
        process = PartialState().process_index
        self.cache = LatentCache(folder / f"cache-{process}", vae, text, tokenizer, world=world,
                                 image_size=config.image_size, offset=process * 10**9, **cache)
        with torch.no_grad():
            self.empty = text(tokenizer("")).hidden                                     # 1 L D

    def batch(self, generator: torch.Generator):
        self.cache.refresh(self.fresh)
        rows = self.draw(generator)
        latents, contexts = self.cache.take(rows)
        dropped = torch.rand(self.batch_size, generator=generator) < self.dropout
        contexts[dropped] = self.empty.cpu()
        t = draw_shifted_timesteps(self.batch_size, self.schedule.num_train_timesteps, self.shift, generator)
        return latents, contexts, t, torch.randn(latents.shape, generator=generator), *self.extra_inputs(rows)

    def draw(self, generator: torch.Generator) -> np.ndarray:
        """Which rows of the cache make a batch, (B,)."""
        return self.cache.draw(self.batch_size, generator)

    def extra_inputs(self, rows: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Inputs of these rows beyond latents and text: none, for the plain U-Net."""
        return ()

    def network(self, model, *extra) -> Callable:
        """The model as a function (x, t, context) -> output."""
        return model

    def loss(self, model, latents, contexts, t, noise, *extra):
        return diffusion_loss(self.network(model, *extra), self.schedule, latents, contexts, t, noise), {}

    @torch.no_grad()
    def sample(self, network, prompts: list[str], steps: int = 20) -> np.ndarray:
        """Images of prompts, uint8 (B, H, W, 3), one seed for each place in the list."""
        context = self.text_encoder(self.tokenizer(prompts).to(self.empty.device)).hidden
        shape = self.cache.arrays["latents"].shape[1:]
        return to_images(sample_images(network, context, self.empty, shape, self.schedule, self.vae,
                                       guidance=self.guidance, steps=steps))

    @torch.no_grad()
    def probe(self, drawn: list[Scene], step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of scenes: latents with noise at a timestep, that timestep, text features, and what the model should say."""
        latents, contexts = encode_scenes(drawn, self.vae, self.text_encoder, self.tokenizer)
        noisy, t, target = make_training_batch(latents, step, self.schedule)
        return noisy, t, contexts, target


class UNetRecipe(LatentRecipe):
    name = "unet"

    def __init__(self, config: ModelConfig, *frozen, shift: float = 3.0, **options):
        """`frozen` and `options` as in `LatentRecipe`: autoencoder, text encoder, tokenizer, the run's folder."""
        super().__init__(UNet(config.unet), config, *frozen, shift=shift, **options)

    @torch.no_grad()
    def report(self, averaged, folder: Path, step: int) -> dict[str, float]:
        prompts = validation_prompts(SHOWN, self.world)
        images = self.sample(averaged, prompts)
        save_sheet(contact_sheet(images, prompts), folder / f"{self.name}-{step:07d}.png")
        return self.shuffled_caption_losses(averaged)

    def shuffled_caption_losses(self, unet, count: int = 128) -> dict[str, float]:
        drawn = [draw_scene(seed, "test", self.world) for seed in range(count)]
        latents, contexts = encode_scenes(drawn, self.vae, self.text_encoder, self.tokenizer)
        return shuffled_caption_losses(unet, self.schedule, latents, contexts)
