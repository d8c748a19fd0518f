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

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from ..checkpoint import CheckpointError, Parts, load, load_embedding, load_lora
from ..checkpoint.shipped import list_shipped_models, load_shipped
from ..checks import check_whole
from ..controlnet import ControlNet
from ..finetune import Embedding, LoRA, MergedLoRAs, add_embedding
from ..guidance import predict_uncond_cond_shared, predict_x0
from ..images import to_images
from ..prompt import encode_prompts
from ..schedule import NoiseSchedule
from ..unet import UNet
from .cache import with_cache
from .inputs import Controls, PipelineInputs, make_control, validate
from .prompt_warnings import PromptWarning, prompt_warnings
from .sampling import SamplingState
from .settings import (
    MAX_SIDE,
    NotFinite,
    Settings,
    SettingsError,
    as_settings_error,
    document_settings,
    find_device,
    out_of_memory_as_error,
)
from .threads import fit_threads

if TYPE_CHECKING:
    from .compiled import CompiledUNet


@dataclass(frozen=True)
class SamplingStep:
    """One sampling step, as `StableDiffusion.iter_steps` yields it."""

    index: int                  # 0 ... of - 1
    of: int
    t: float                    # the timestep before the step
    latent: Tensor              # (B, C, h, w) after the step
    x0: Tensor                  # (B, C, h, w) the clean latent that the network predicted at t
    decode: Callable[[Tensor], list[Image.Image]]

    def images(self) -> list[Image.Image]:
        """The predicted x0, decoded by the VAE."""
        return self.decode(self.x0)

    def noisy_images(self) -> list[Image.Image]:
        """The latent after the step, with the noise still in it, decoded by the VAE."""
        return self.decode(self.latent)


class StableDiffusion:
    """A text encoder, a U-Net, a VAE and a noise schedule that were trained for one another.

    The parts are attributes, which may be replaced: `tokenizer`, `text_encoder`, `unet`, `vae`, `schedule`, `config`.
    `clip`, and `world`, the objects and words of the training captions, are None where a folder has none.
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
             tokenizer: str | Path | None = None, revision: str | None = None) -> "StableDiffusion":
        """Load a model: shipped, by name; a folder, or a single .safetensors or .ckpt file, by path; or from the hub.

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
        """Compile the U-Net with torch.compile: the same images up to rounding, in less time. Returns the model itself.

        Each size and batch is compiled at its first use, which takes about a minute on a CPU and pays for many
        images; so is a U-Net whose weights have changed since, by a LoRA for instance. On a CPU this needs a C++
        compiler; PyTorch says so where there is none.
        """
        from .compiled import CompiledUNet  # with PyTorch's compiler, which takes a second to load

        self._compiled = CompiledUNet(self.unet)
        return self

    @property
    def network(self) -> "UNet | CompiledUNet":
        """The U-Net as runs call it: after `compile` the compiled one, recompiled where weights have changed."""
        if self._compiled is None:
            return self.unet
        if self._compiled.unet is not self.unet or not self._compiled.fresh:
            torch.compiler.reset()                  # its cache holds the old weights as constants
            self.compile()
        return self._compiled

    @property
    def loras(self) -> MergedLoRAs:
        """The LoRAs that are merged into the current U-Net and text encoder."""
        if self._loras is None or (self._loras.unet, self._loras.text_encoder) != (self.unet, self.text_encoder):
            self._loras = MergedLoRAs(self.unet, self.text_encoder)
        return self._loras

    def add_lora(self, source: str | Path | LoRA, strength: float = 1.0) -> LoRA:
        """Merge a LoRA into the weights: a file in any of the usual key formats, or one that `finetune` trained.

        Several add up. Returns the LoRA, for `remove_lora`, which restores the weights bit for bit.
        Raises CheckpointError for a file that cannot be used, SettingsError for a LoRA that does not fit.
        """
        lora = source if isinstance(source, LoRA) else load_lora(source, self.unet, self.text_encoder)
        as_settings_error(self.loras.add, lora, strength)
        return lora

    def remove_lora(self, lora: LoRA):
        """Restore the weights without a LoRA. Raises SettingsError for one that is not merged."""
        as_settings_error(self.loras.remove, lora)

    def add_embedding(self, source: str | Path | Embedding, token: str | None = None) -> str:
        """Add a textual inversion, from a file or from `finetune`; returns the word that stands for it in prompts.

        Raises CheckpointError for a file that cannot be read, SettingsError for vectors of another width and for a
        word that is in the vocabulary already.
        """
        embedding = source if isinstance(source, Embedding) else load_embedding(source)
        embedding = replace(embedding, token=token or embedding.token)
        as_settings_error(add_embedding, self.tokenizer, self.text_encoder, embedding)
        return embedding.token

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net has nine input channels: latent 4, mask 1 and latent of the masked image 4."""
        return self.config.unet.in_channels == 9

    @document_settings
    def text2img(self, prompt: str, negative_prompt: str = "", *,
                 num_inference_steps: int | None = None, sampler: str = "dpmpp_2m",
                 guidance_scale: float | None = None, guidance_rescale: float = 0.0,
                 guidance_interval: tuple[float, float] | None = None, timestep_spacing: str | None = None,
                 size: int | tuple[int, int] | None = None, batch: int = 1, seed: int = 0, long_prompts: str = "cut",
                 controls: Controls = (), latent: Tensor | None = None) -> list[Image.Image]:
        """Text to image: `batch` PIL images of a prompt.

            model.text2img("a red apple on a yellow background", num_inference_steps=20, guidance_scale=5, seed=0)

        prompt: any text; "" is the unconditional model; "(red:1.4)" weighs a word more, "(red:0.6)" less.
        negative_prompt: takes the place of the empty prompt in guidance, which leads away from it. controls: one or
        several of `make_control(net, hint)`. latent: noise (B, C, h, w) of variance 1, in place of the seeds'.
        Warnings and errors as in `iter_steps`.
        """
        return last_images(self._start(**arguments(locals())))

    @document_settings
    def img2img(self, prompt: str, image, negative_prompt: str = "", *, strength: float = 0.8,
                num_inference_steps: int | None = None, sampler: str = "dpmpp_2m",
                guidance_scale: float | None = None, guidance_rescale: float = 0.0,
                guidance_interval: tuple[float, float] | None = None, timestep_spacing: str | None = None,
                size: int | tuple[int, int] | None = None, batch: int = 1, seed: int = 0, long_prompts: str = "cut",
                controls: Controls = (), latent: Tensor | None = None) -> list[Image.Image]:
        """Image to image, SDEdit (Meng et al. 2022): noise is added to an image, then removed with a prompt.

        image: PIL, bytes or a tensor, one or a batch, see `pipeline.inputs`. strength: share of the steps that are
        run, the last ones, above 0 (the image as it is) up to 1 (nothing of it left). The image's latent is sampled
        from the VAE's posterior, as in diffusers: drawn first from a seed, the noise second. The other arguments,
        warnings and errors as in `text2img`.
        """
        return last_images(self._start(**arguments(locals())))

    @document_settings
    def inpaint(self, prompt: str, image, mask, negative_prompt: str = "", *, strength: float = 1.0, resample: int = 1,
                num_inference_steps: int | None = None, sampler: str = "dpmpp_2m",
                guidance_scale: float | None = None, guidance_rescale: float = 0.0,
                guidance_interval: tuple[float, float] | None = None, timestep_spacing: str | None = None,
                size: int | tuple[int, int] | None = None, batch: int = 1, seed: int = 0, long_prompts: str = "cut",
                controls: Controls = (), latent: Tensor | None = None) -> list[Image.Image]:
        """Inpainting: new content where `mask` is white; elsewhere the image's own, up to the VAE's error.

        A U-Net with nine channels takes the mask and the masked image as input. Any other is blended: the known
        region replaces its part of the latent at every step, and each step is run `resample` times, 1 to 100, as in
        RePaint (Lugmayr et al. 2022). mask: of the image's size, 0 and 1 or black and white. strength: as in
        `img2img`. The other arguments, warnings and errors as in `text2img`.
        """
        return last_images(self._start(**arguments(locals())))

    @document_settings
    def control(self, prompt: str, net: ControlNet, hint, negative_prompt: str = "", *,
                conditioning_scale: float = 1.0, start: float = 0.0, end: float = 1.0, guess_mode: bool = False,
                num_inference_steps: int | None = None, sampler: str = "dpmpp_2m",
                guidance_scale: float | None = None, guidance_rescale: float = 0.0,
                guidance_interval: tuple[float, float] | None = None, timestep_spacing: str | None = None,
                size: int | tuple[int, int] | None = None, batch: int = 1, seed: int = 0, long_prompts: str = "cut",
                latent: Tensor | None = None) -> list[Image.Image]:
        """ControlNet (Zhang et al. 2023): images of a prompt with the layout of a condition image, `hint`.

        conditioning_scale, start, end, guess_mode: see `controlnet.Control`. Several controls at once, or together
        with an image or a mask: `controls=[make_control(net, hint), ...]` in the other methods. The other
        arguments, warnings and errors as in `text2img`.
        """
        given = arguments(locals())
        names = ("net", "hint", "conditioning_scale", "start", "end", "guess_mode")
        control = make_control(**{name: given.pop(name) for name in names})
        return last_images(self._start(**given, controls=control))

    @document_settings
    def iter_steps(self, prompt: str, negative_prompt: str = "", *, image=None, mask=None,
                   strength: float | None = None, resample: int = 1,
                   num_inference_steps: int | None = None, sampler: str = "dpmpp_2m",
                   guidance_scale: float | None = None, guidance_rescale: float = 0.0,
                   guidance_interval: tuple[float, float] | None = None, timestep_spacing: str | None = None,
                   size: int | tuple[int, int] | None = None, batch: int = 1, seed: int = 0, long_prompts: str = "cut",
                   controls: Controls = (), latent: Tensor | None = None) -> Iterator[SamplingStep]:
        """A generator of the sampling steps, for text, image, mask and controls alike.

        Arguments as in `text2img`; image and strength as in `img2img`; image, mask, strength and resample as in
        `inpaint`. Warns of words that are not in the training captions (UnknownWordWarning) and of a prompt that is
        truncated (LongPromptWarning). Raises, in a sentence each, SettingsError before anything is computed, and
        NotFinite and MemoryError.
        """
        return self._start(**arguments(locals()))

    def _start(self, prompt: str, negative_prompt: str, **given) -> Iterator[SamplingStep]:
        inputs = self.validate(**given)
        for kind, message in self.prompt_warnings(prompt, negative_prompt, long_prompts=inputs.long_prompts):
            warnings.warn(message, kind, stacklevel=3)
        return self._run([prompt, negative_prompt], inputs)

    @torch.no_grad()        # not inference_mode: steps hold tensors, with which a learner may want gradients
    def _run(self, prompts: list[str], inputs: PipelineInputs) -> Iterator[SamplingStep]:
        generators = [torch.Generator().manual_seed(inputs.seed + i) for i in range(inputs.batch)]
        with out_of_memory_as_error("{} of {}x{}".format(inputs.batch, *inputs.size)):
            state, total = SamplingState(self, inputs, generators), len(inputs.timesteps)
            context, uncond = self.encode(prompts, long=inputs.long_prompts)[:, None]       # each (1, M, T)
            unet = with_cache(state.unet, [t for t, _ in inputs.timesteps])
            denoise = predict_x0(unet, self.schedule, context.expand(inputs.batch, -1, -1), uncond,
                                 guidance_scale=inputs.guidance_scale, guidance_rescale=inputs.guidance_rescale,
                                 guidance_interval=inputs.guidance_interval, predict_pair=predict_uncond_cond_shared)
            for step in state.sample(denoise):
                if step.index == total - 1:
                    step = step._replace(x=state.composite(step.x))
                    if not bool(step.x.isfinite().all()):
                        raise NotFinite(f"the latent became NaN or infinite (sampler {inputs.sampler}, guidance "
                                        f"{inputs.guidance_scale}); lower the guidance, or load the model in float32")
                yield SamplingStep(step.index, total, step.t, step.x, step.x0, self.decode)

    def validate(self, **given) -> PipelineInputs:
        """The resolved inputs of a run: settings with the model's defaults, size, timesteps, images as tensors.

        given: the keyword arguments of `iter_steps`. Raises SettingsError; no network is run.
        """
        return validate(self, **given)

    def prompt_warnings(self, *texts: str, long_prompts: str = "cut") -> Iterator[tuple[type[PromptWarning], str]]:
        """Pairs of a warning's class and its message, for prompts of which a part has no effect."""
        return prompt_warnings(self, *texts, long_prompts=long_prompts)

    def size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """(width, height) in pixels, both multiples of the VAE's factor: the U-Net takes odd latents, too.

        size: a side, both, or None for the model's own. Raises SettingsError.
        """
        factor = self.config.vae.factor
        size = self.config.image_size if size is None else size
        sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        shown = "x".join(map(str, sides))
        try:
            width, height = sides
            check_whole("width", width, factor, MAX_SIDE)
            check_whole("height", height, factor, MAX_SIDE)
        except ValueError as error:
            raise SettingsError(f"size {shown} cannot be made; give sides of {factor} to {MAX_SIDE} pixels") from error
        if any(side % factor for side in sides):
            near = "x".join(str(max(1, round(side / factor)) * factor) for side in sides)
            raise SettingsError(f"size {shown} is not a multiple of {factor} pixels; the nearest is {near}")
        return sides

    def latent_shape(self, settings: Settings) -> tuple[int, int, int, int]:
        """(B, C, h, w) of the latents of a run."""
        width, height = self.size(settings.size)
        factor, channels = self.config.vae.factor, self.config.unet.out_channels
        return settings.batch, channels, height // factor, width // factor

    @torch.no_grad()
    def encode(self, prompts: list[str], *, long: str = "cut") -> Tensor:
        """The context of cross-attention, (B, M, T), for B prompts. long: see long_prompts in `Settings`."""
        return as_settings_error(encode_prompts, prompts, self.tokenizer, self.text_encoder, long=long)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> list[Image.Image]:
        """Decode scaled latents (B, C, h, w) to PIL images, one at a time. Raises NotFinite, MemoryError."""
        with out_of_memory_as_error(f"{len(latent)} at once"):
            pixels = self.vae.to_pixels(latent.to(self.dtype), at_once=1)           # (B, 3, H, W)
        if not bool(pixels.isfinite().all()):
            raise NotFinite("the VAE decoded to NaN or infinity, which would be a black image; "
                            "load the model in float32")
        return [Image.fromarray(image) for image in to_images(pixels.float())]


def arguments(names: dict) -> dict:
    """The arguments of a method, from `locals()` before anything is assigned."""
    return {name: value for name, value in names.items() if name != "self"}


def last_images(steps: Iterator[SamplingStep]) -> list[Image.Image]:
    """The images after the last step."""
    for step in steps:
        final = step
    return final.noisy_images()         # the latent after the last step: its noise is gone
