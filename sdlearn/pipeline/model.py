"""Stable Diffusion as one object: a prompt becomes images.

B  batch            C, h, w  channels, rows and columns of the latent
M, T  text tokens and their width            H, W  pixels

    prompt ── tokenizer ── text encoder ── context (B, M, T)
                                              │
    seed ── noise (B, C, h, w) ── sampler: U-Net, guidance, step ── latent ── VAE decoder ── images

`iter_steps` is the generator that does the work; `text2img` runs it to its end. Image i of a batch has a
random generator of its own, seeded with seed + i, so it is the image that this seed gives alone, up to
the rounding of arithmetic on a batch.
"""

import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from .. import prompt as prompt_room
from ..checkpoint import CheckpointError, Parts, load, load_embedding, load_lora
from ..checkpoint.shipped import list_shipped_models, load_shipped
from ..controlnet import ControlNet
from ..finetune import Embedding, LoRA, MergedLoRAs, add_embedding
from ..guidance import check_guidance, predict_uncond_cond_shared, predict_x0
from ..images import to_images
from ..samplers import make_timesteps_for
from ..schedule import NoiseSchedule, Timesteps
from ..unet import UNet
from .cache import with_cache
from .prompt_warnings import LongPromptWarning, PromptWarning, UnknownWordWarning, unknown_words
from .sampling import SamplingState, get_timesteps
from .settings import (
    MAX_SIDE,
    NotFinite,
    Settings,
    SettingsError,
    as_settings_error,
    find_device,
    out_of_memory_as_error,
    whole,
)
from .task import PipelineInputs, make_control, task_of
from .threads import fit_threads

if TYPE_CHECKING:
    from .compiled import CompiledUNet

TASK = ("image", "mask", "strength", "resample", "controls", "latent")   # what is given beside settings


@dataclass(frozen=True)
class SamplingStep:
    """One step on the way to the images."""

    index: int                  # 0 ... of - 1
    of: int
    t: float                    # the timestep that the step started from
    latent: Tensor              # (B, C, h, w) after the step
    x0: Tensor                  # (B, C, h, w) the clean latent that the network saw at t
    decode: Callable[[Tensor], list[Image.Image]]

    def images(self) -> list[Image.Image]:
        """What the network saw at this step, decoded when asked for: images of the predicted x0."""
        return self.decode(self.x0)

    def noisy_images(self) -> list[Image.Image]:
        """The latent itself as images, with the noise still in it."""
        return self.decode(self.latent)


class StableDiffusion:
    """A text encoder, a U-Net, a VAE and a noise schedule that were trained for one another.

    The parts are attributes, to be looked at and exchanged: `tokenizer`, `text_encoder`, `unet`, `vae`,
    `schedule`, `config`; `clip` and `world`, what the model was taught, are None where a folder has none.
    """

    def __init__(self, parts: Parts):
        self.config, self.world = parts.config, parts.world
        self.tokenizer, self.text_encoder, self.clip = parts.tokenizer, parts.text_encoder, parts.clip
        self.unet, self.vae = parts.unet, parts.vae
        self.schedule = NoiseSchedule(parts.config.noise)
        self._loras = self._compiled = None

    @classmethod
    def load(cls, source: str | Path = "mini", *, device: str | torch.device | None = None,
             dtype: torch.dtype = torch.float32, prediction_type: str | None = None,
             tokenizer: str | Path | None = None,
             revision: str | None = None) -> "StableDiffusion":
        """A model: shipped, by name; a folder, or a single .safetensors or .ckpt file, by path; or from the hub.

            StableDiffusion.load()
            StableDiffusion.load("stable-diffusion-v1-5/stable-diffusion-v1-5", dtype=torch.bfloat16)
            StableDiffusion.load("v2-1_768-ema-pruned.safetensors", prediction_type="v_prediction")

        `device` is a GPU where there is one and the CPU elsewhere, unless given. In the default float32
        a seed gives the same image on every machine, up to rounding. prediction_type: of a single file of SD 2.x,
        which does not tell: "epsilon" or "v_prediction". tokenizer: a folder or CLIP's vocabulary file, for a
        single file. revision: of a repository on the hub. The U-Net's weights are laid out channels last, as
        convolutions read them; PyTorch gets no more threads than the CPUs that it may use, see `threads`.
        Raises CheckpointError, in one sentence, for a model that is unknown, missing or damaged, SettingsError
        for a missing device.
        """
        place = {"device": find_device(device), "dtype": dtype}
        if place["device"].type == "cpu":
            fit_threads()
        if source in list_shipped_models():
            parts = load_shipped(source, **place)
        elif not Path(source).exists() and "/" not in str(source) and "." not in str(source):
            known = ", ".join(list_shipped_models()) or "none: the package was installed without its weights"
            raise CheckpointError(f"there is no model '{source}'; give the path of a model folder or file, a name on "
                                  f"the hub as owner/name, or the name of a shipped model ({known})")
        else:
            parts = load(source, prediction=prediction_type, tokenizer=tokenizer, revision=revision, **place)
        parts.unet.to(memory_format=torch.channels_last)
        return cls(parts)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def parts(self) -> Parts:
        """The model as `checkpoint.save_folder` writes it, with added words and merged LoRAs."""
        config = replace(self.config, text=self.text_encoder.config)        # its vocabulary may have grown
        return Parts(config, self.tokenizer, self.text_encoder, self.vae, self.unet, self.clip, self.world)

    def compile(self) -> "StableDiffusion":
        """Run the U-Net compiled from now on: the same images up to rounding, sooner; gives the model itself.

        Each size and batch is compiled when it first comes, which takes a minute or so on a CPU and pays for many
        images. With weights that have changed since, by a LoRA for instance, it is compiled anew. On a CPU this
        needs a C++ compiler; PyTorch says so where there is none.
        """
        from .compiled import CompiledUNet  # with PyTorch's compiler, which takes a second to load

        self._compiled = CompiledUNet(self.unet)
        return self

    @property
    def network(self) -> "UNet | CompiledUNet":
        """The U-Net as runs call it: compiled where that was asked for, anew where weights have changed."""
        if self._compiled is None:
            return self.unet
        if self._compiled.unet is not self.unet or not self._compiled.fresh:
            torch.compiler.reset()                  # it would find the old constants again
            self.compile()
        return self._compiled

    @property
    def loras(self) -> MergedLoRAs:
        """What LoRAs have been merged into the U-Net and the text encoder that are there now."""
        if self._loras is None or (self._loras.unet, self._loras.text_encoder) != (self.unet, self.text_encoder):
            self._loras = MergedLoRAs(self.unet, self.text_encoder)
        return self._loras

    def add_lora(self, source: str | Path | LoRA, strength: float = 1.0) -> LoRA:
        """Merge a LoRA into the weights: a file in any of the usual spellings, or one that `finetune` made.

        Several add up. The result is what `remove_lora` takes, after which the weights have their bits back.
        Raises CheckpointError for a file that cannot be used, SettingsError for a LoRA that does not fit.
        """
        lora = source if isinstance(source, LoRA) else load_lora(source, self.unet, self.text_encoder)
        as_settings_error(self.loras.add, lora, strength)
        return lora

    def remove_lora(self, lora: LoRA):
        """Take a LoRA out of the weights again. Raises SettingsError for one that is not there."""
        as_settings_error(self.loras.remove, lora)

    def add_embedding(self, source: str | Path | Embedding, token: str | None = None) -> str:
        """Teach the model a word from a textual-inversion file or from `finetune`; gives the word to write in prompts.

        Raises CheckpointError for a file that cannot be read, SettingsError for vectors of another width and for a
        word that is there already.
        """
        embedding = source if isinstance(source, Embedding) else load_embedding(source)
        embedding = replace(embedding, token=token or embedding.token)
        as_settings_error(add_embedding, self.tokenizer, self.text_encoder, embedding)
        return embedding.token

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net was made for inpainting: it reads latent 4, mask 1 and masked latent 4."""
        return self.config.unet.in_channels == 9

    def text2img(self, prompt: str, negative_prompt: str = "", **given) -> list[Image.Image]:
        """Images of a prompt; arguments and errors as in `iter_steps`.

            model.text2img("a red apple on a yellow background", num_inference_steps=20, guidance_scale=5, seed=0)
        """
        return last(self._start(prompt, negative_prompt, given))

    def img2img(self, prompt: str, image, negative_prompt: str = "", *, strength: float = 0.8,
                **given) -> list[Image.Image]:
        """Images of a prompt that start from an image with noise added: the last `strength` of the steps are run.

        image: see `inputs`; strength above 0 (as it is) up to 1 (nothing of it left). Meng et al. 2022, SDEdit.
        The image's latent is a sample, as in diffusers: drawn first from a seed, the noise second.
        """
        return last(self._start(prompt, negative_prompt, {"image": image, "strength": strength, **given}))

    def inpaint(self, prompt: str, image, mask, negative_prompt: str = "", *, strength: float = 1.0,
                **given) -> list[Image.Image]:
        """Images in which the white part of `mask` is made anew and the rest is the image's, up to the VAE's error.

        A U-Net with nine channels reads the mask and the masked image; any other is held to the image by
        blending: the known region is put back at every step, and `resample` times each step is repeated so that
        the new part can follow the old (Lugmayr et al. 2022).
        """
        return last(self._start(prompt, negative_prompt, {"image": image, "mask": mask, "strength": strength, **given}))

    def control(self, prompt: str, net: ControlNet, hint, negative_prompt: str = "", *, strength: float = 1.0,
                start: float = 0.0, end: float = 1.0, guess: bool = False, **given) -> list[Image.Image]:
        """Images of a prompt that follow a condition image, `hint`, in the way that `net` has learnt.

        strength, start, end, guess: see `controlnet.Control`. Several at once, or together with an image or a mask:
        `controls=[make_control(net, hint), ...]` in the other methods.
        """
        one = make_control(net, hint, strength=strength, start=start, end=end, guess=guess)
        return last(self._start(prompt, negative_prompt, {"controls": one, **given}))

    def iter_steps(self, prompt: str, negative_prompt: str = "", **given) -> Iterator[SamplingStep]:
        """The steps of a run, one by one, for whoever wants to watch.

        prompt: any text; "" is the unconditional model; "(red:1.4)" is heard more, "(red:0.6)" less.
        negative_prompt: what to go away from. given, all of it by name:

        the fields of `Settings`
        image, strength     start from an image, as in `img2img`
        image, mask, resample   make the white part of the mask anew, as in `inpaint`
        controls            follow condition images, as in `control`; goes with all of these
        latent              the noise, (B, C, h, w) of variance 1, in place of the seed's

        Warns of words the model was never taught (UnknownWordWarning) and of a prompt that is cut
        (LongPromptWarning). Raises, in a sentence each, SettingsError before anything is computed, and
        NotFinite and MemoryError.
        """
        return self._start(prompt, negative_prompt, given)

    def _start(self, prompt: str, negative_prompt: str, given: dict) -> Iterator[SamplingStep]:
        task = {name: given[name] for name in given if name in TASK}
        chosen = self.validate(**{name: given[name] for name in given if name not in TASK})
        task, chosen = task_of(self, chosen, **task)
        grid = get_timesteps(make_timesteps_for(chosen.sampler, self.schedule, chosen.num_inference_steps,
                                                chosen.timestep_spacing), task.strength)
        for kind, message in self.prompt_warnings(prompt, negative_prompt, long_prompts=chosen.long_prompts):
            warnings.warn(message, kind, stacklevel=3)
        return self._run([prompt, negative_prompt], task, grid, chosen)

    @torch.no_grad()        # not inference_mode: steps hand out tensors, with which a learner may want gradients
    def _run(self, prompts: list[str], task: PipelineInputs, grid: Timesteps,
             chosen: Settings) -> Iterator[SamplingStep]:
        generators = [torch.Generator().manual_seed(chosen.seed + i) for i in range(chosen.batch)]
        with out_of_memory_as_error("{} of {}x{}".format(chosen.batch, *self.size(chosen.size))):
            start = SamplingState(self, task, grid, generators, self.latent_shape(chosen))
            context, uncond = self.encode(prompts, long=chosen.long_prompts)[:, None]        # each (1, M, T)
            unet = with_cache(start.unet, [t for t, _ in grid])
            denoise = predict_x0(unet, self.schedule, context.expand(chosen.batch, -1, -1), uncond,
                                 guidance_scale=chosen.guidance_scale,
                                 guidance_rescale=chosen.guidance_rescale,
                                 guidance_interval=chosen.guidance_interval, predict_pair=predict_uncond_cond_shared)
            for step in start.sample(denoise, chosen.sampler):
                if step.index == len(grid) - 1:
                    step = step._replace(x=start.composite(step.x))
                    if not bool(step.x.isfinite().all()):
                        raise NotFinite(f"the latent became NaN or infinite (sampler {chosen.sampler}, guidance "
                                        f"{chosen.guidance_scale}); lower the guidance, or load the model in float32")
                yield SamplingStep(step.index, len(grid), step.t, step.x, step.x0, self.decode)

    def validate(self, **settings) -> Settings:
        """Settings that this model can make images with, the model's defaults filled in, or SettingsError; nothing is
        computed."""
        known = [field.name for field in fields(Settings)]
        if strange := sorted(settings.keys() - set(known)):
            raise SettingsError(f"there is no setting '{strange[0]}'; the settings are {', '.join([*known, *TASK])}")
        chosen, default = Settings(**settings), self.config.sampling
        for name in ("num_inference_steps", "guidance_scale"):
            if getattr(chosen, name) is None:
                chosen = replace(chosen, **{name: getattr(default, name)})
        self.size(chosen.size)
        as_settings_error(make_timesteps_for, chosen.sampler, self.schedule, chosen.num_inference_steps,
                          chosen.timestep_spacing)
        as_settings_error(check_guidance, self.schedule, chosen.guidance_scale, chosen.guidance_rescale,
                          chosen.guidance_interval)
        return chosen

    def size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """(width, height) in pixels, both multiples of the VAE's factor: the U-Net takes odd latents too."""
        factor = self.config.vae.factor
        size = self.config.image_size if size is None else size
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        shown = "x".join(map(str, sides))
        if len(sides) != 2 or not all(whole(side, factor, MAX_SIDE) for side in sides):
            raise SettingsError(f"size {shown} cannot be made; give sides of {factor} to {MAX_SIDE} pixels")
        if any(side % factor for side in sides):
            near = "x".join(str(max(1, round(side / factor)) * factor) for side in sides)
            raise SettingsError(f"size {shown} is not a multiple of {factor} pixels; the nearest is {near}")
        return sides

    def latent_shape(self, settings: Settings) -> tuple[int, int, int, int]:
        """(B, C, h, w)"""
        width, height = self.size(settings.size)
        factor, channels = self.config.vae.factor, self.config.unet.out_channels
        return settings.batch, channels, height // factor, width // factor

    @torch.no_grad()
    def encode(self, prompts: list[str], *, long: str = "cut") -> Tensor:
        """What the U-Net attends to: (B, M, T). long: what becomes of prompts past M tokens, see `Settings`."""
        return as_settings_error(prompt_room.encode_prompts, prompts, self.tokenizer, self.text_encoder, long=long)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> list[Image.Image]:
        """Scaled latents (B, C, h, w) as PIL images. Raises NotFinite, MemoryError."""
        with out_of_memory_as_error(f"{len(latent)} at once"):
            pixels = self.vae.to_pixels(latent.to(self.dtype), at_once=1)           # (B, 3, H, W)
        if not bool(pixels.isfinite().all()):
            raise NotFinite("the VAE decoded to NaN or infinity, which would be a black image; "
                            "load the model in float32")
        return [Image.fromarray(image) for image in to_images(pixels.float())]

    def prompt_warnings(self, *prompts: str, long_prompts: str = "cut") -> Iterator[tuple[type[PromptWarning], str]]:
        """What of the prompts will not be heard: pairs of a warning's kind and its sentence."""
        for prompt in prompts:
            lost = as_settings_error(prompt_room.get_truncated_text, prompt, self.tokenizer, self.config.text.length)
            if lost and long_prompts == "cut":
                yield LongPromptWarning, (
                    f"the prompt is longer than {self.config.text.length} tokens; its end is cut off: "
                    f"\"{textwrap.shorten(lost, 200, placeholder=' ...')}\"; long_prompts=\"chunks\" reads all of it")
        text = " ".join(map(prompt_room.remove_weights, prompts)).lower()
        for word in sorted(self.tokenizer.added, key=len, reverse=True):      # learnt since, the longest first
            text = text.replace(word, " ")
        if self.world is not None and (unknown := unknown_words(text, self.world["words"])):
            yield UnknownWordWarning, (
                f"the model was never taught {', '.join(unknown)}; it will guess. "
                f"It knows {len(self.world['objects'])} objects, listed in model.world")


def last(steps: Iterator[SamplingStep]) -> list[Image.Image]:
    """The images that a run ends with."""
    for step in steps:
        final = step
    return final.noisy_images()         # the latent after the last step: its noise is gone
