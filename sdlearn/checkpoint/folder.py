"""A whole model as a folder, in the layout of diffusers' StableDiffusionPipeline.

    model_index.json        which library reads which part
    unet/                   config.json, diffusion_pytorch_model.safetensors
    vae/                    config.json, diffusion_pytorch_model.safetensors
    text_encoder/           config.json, model.safetensors
    tokenizer/              vocab.json, merges.txt and what transformers wants beside them
    scheduler/              scheduler_config.json: the noise schedule and what the U-Net predicts
    vision/                 ours: CLIP's image encoder, both projections and the logit scale
    sampling.json           ours: {"num_inference_steps": n, "guidance_scale": w}, the default sampling settings
    world.json              ours: {"objects": [...], "words": [...]}, what the model was taught

The last three may be missing; diffusers passes over them. Without sampling.json the settings are Stable Diffusion's.
Nothing about a model's size is assumed: every module is built from the config.json that lies beside its tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..clip import CLIP, TextEncoder
from ..config import ModelConfig, SamplingConfig, TextConfig
from ..files import write_atomically
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from . import configs
from .errors import CheckpointError
from .files import get_shapes, missing_file_error, read_json, read_tensors, write_json, write_tensors
from .layouts import rename_text_key, rename_vae_key
from .tokenizer import load_tokenizer, save_tokenizer

DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
SAMPLING_FILE = "sampling.json"
PARTS = {"unet": DIFFUSERS_FILE, "vae": DIFFUSERS_FILE, "text_encoder": TRANSFORMERS_FILE}
OPTIONAL = ("vision/config.json", f"vision/{TRANSFORMERS_FILE}", SAMPLING_FILE, "world.json",
            "tokenizer/tokenizer.json")
DIFFUSERS_VERSION = "0.36.0"        # the oldest whose classes take all the keys that are written here


@dataclass
class Parts:
    """The parts of a model, in memory. `clip` shares `text_encoder`."""

    config: ModelConfig
    tokenizer: Tokenizer
    text_encoder: TextEncoder
    vae: VAE
    unet: UNet
    clip: CLIP | None = None
    world: dict[str, list[str]] | None = None


def load_folder(folder: str | Path, *, prediction: str | None = None, tokenizer: Tokenizer | None = None,
                device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Parts:
    """Every part of a model folder, on `device`; files of any precision are cast to `dtype`.

    `prediction`, where it is given, must be what the folder says; `tokenizer` takes the place of the folder's
    own. Folders of the hub are read as they are: half-precision
    variants where there is nothing else, older spellings, schedulers of any kind on the same noise schedule.
    Raises CheckpointError, in one sentence that names the file, for whatever is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no model_index.json; "
                              "give a folder that diffusers or sdlearn has written.")
    tokenizer = tokenizer or load_tokenizer(folder / "tokenizer")
    config = read_config(folder, tokenizer)
    check_prediction(folder, config.noise.prediction_type, prediction)
    options = {"device": device, "dtype": dtype}
    for part, file in PARTS.items():
        find_weights_file(folder / part / file)   # raises for a missing one before any is read
    text = load_module(lambda: TextEncoder(config.text), folder / "text_encoder" / TRANSFORMERS_FILE,
                       rename=rename_text_key, **options)
    vae = load_module(lambda: VAE(config.vae), folder / "vae" / DIFFUSERS_FILE,
                      rename=rename_vae_key, **options)
    unet = load_module(lambda: UNet(config.unet), folder / "unet" / DIFFUSERS_FILE, **options)
    clip = load_clip(config, text, folder / "vision" / TRANSFORMERS_FILE, **options) if config.vision else None
    return Parts(config, tokenizer, text, vae, unet, clip, read_world(folder))


def save_folder(folder: str | Path, parts: Parts, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model folder that `load_folder` and diffusers open; floating-point tensors in `dtype`.

    The write is atomic. A folder that exists is updated: files in it that are no part of a model, such as a model
    card, are preserved. Raises OSError when it cannot be written.
    """
    folder = Path(folder).absolute()
    with write_atomically(folder) as temporary:
        _write_configs(temporary, parts)
        write_tensors(temporary / "unet" / DIFFUSERS_FILE, parts.unet.state_dict(), dtype)
        write_tensors(temporary / "vae" / DIFFUSERS_FILE, parts.vae.state_dict(), dtype)
        # With the prefix, which every version of transformers reads; without it, only the newest.
        text = {f"text_model.{name}": tensor for name, tensor in parts.text_encoder.state_dict().items()}
        write_tensors(temporary / "text_encoder" / TRANSFORMERS_FILE, text, dtype)
        if parts.clip is not None:
            vision = without_text_encoder(parts.clip.state_dict())
            write_tensors(temporary / "vision" / TRANSFORMERS_FILE, vision, dtype)
        save_tokenizer(temporary / "tokenizer", parts.tokenizer)
        written = {path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()}
    for name in OPTIONAL:
        if Path(name) not in written:               # of another model that the folder held before
            (folder / name).unlink(missing_ok=True)
    return folder


def _write_configs(folder: Path, parts: Parts):
    config, tokenizer = parts.config, parts.tokenizer
    noise = configs.noise_to_dict(config.noise)
    write_json(folder / "model_index.json", make_model_index(noise["_class_name"], config.unet.in_channels == 9))
    write_json(folder / "scheduler" / "scheduler_config.json", noise)
    write_json(folder / "unet" / "config.json", configs.unet_to_dict(config.unet, config.latent_size))
    write_json(folder / "vae" / "config.json", configs.vae_to_dict(config.vae, config.image_size))
    write_json(folder / "text_encoder" / "config.json",
               configs.text_to_dict(config.text, tokenizer.start, tokenizer.end))
    write_json(folder / SAMPLING_FILE, configs.sampling_to_dict(config.sampling))
    if parts.clip is not None:
        write_json(folder / "vision" / "config.json", configs.vision_to_dict(config.vision))
    if parts.world is not None:
        write_json(folder / "world.json", parts.world)


# --- the parts --------------------------------------------------------------------------------------

def read_config(folder: Path, tokenizer: Tokenizer) -> ModelConfig:
    """The configs of all parts, as one; the name is the folder's."""
    noise = read_part_config(folder / "scheduler" / "scheduler_config.json", configs.noise_from_dict)
    vae = read_part_config(folder / "vae" / "config.json", configs.vae_from_dict)
    unet_file, text_file = folder / "unet" / "config.json", folder / "text_encoder" / "config.json"
    unet = read_part_config(unet_file, configs.unet_from_dict)
    text = read_part_config(text_file, lambda values: configs.text_from_dict(values, tokenizer.pad_with_end))
    vision_file = folder / "vision" / "config.json"
    vision = read_part_config(vision_file, configs.vision_from_dict) if vision_file.exists() else None
    if unet.context_dim != text.dim:
        raise CheckpointError(f"{unet_file} asks for text {unet.context_dim} wide, but the text encoder "
                              f"beside it is {text.dim} wide; the parts must come from one model.")
    check_vocabulary(text_file, text, tokenizer)
    side = read_part_config(unet_file, lambda values: int(values["sample_size"])) * vae.factor
    sampling_file = folder / SAMPLING_FILE
    sampling = SamplingConfig()
    if sampling_file.exists():
        sampling = read_part_config(sampling_file, configs.sampling_from_dict)
    return ModelConfig(folder.resolve().name, unet, vae, text, vision, noise, side, sampling)


def check_prediction(source: Path, predicted: str, wanted: str | None):
    """Raises CheckpointError for a `wanted` prediction type that is not the one in the model's config."""
    if wanted not in (None, predicted):
        raise CheckpointError(f"{source} says that it predicts '{predicted}', not '{wanted}'; leave prediction out.")


def check_vocabulary(file: Path, text: TextConfig, tokenizer: Tokenizer):
    if tokenizer.vocab_size > text.vocab_size:
        raise CheckpointError(f"{file} has room for {text.vocab_size} tokens, but the tokenizer beside "
                              f"it knows {tokenizer.vocab_size}; the parts must come from one model.")


def read_world(folder: Path) -> dict[str, list[str]] | None:
    """What the model was taught, or None for a model that does not say."""
    file = folder / "world.json"
    if not file.exists():
        return None
    return check_world(file, read_json(file))


def check_world(file: Path, world: dict) -> dict[str, list[str]]:
    for key in ("objects", "words"):
        if not isinstance(world.get(key), list) or not all(isinstance(word, str) for word in world[key]):
            raise CheckpointError(f"{file} has no list of {key}; copy or save it again.")
    return world


def load_module(make: Callable[[], nn.Module], file: Path, *, rename=lambda name: name, **options) -> nn.Module:
    """A module without its random first weights (it is made on the meta device), filled from a file."""
    with torch.device("meta"):
        module = make()
    tensors = read_tensors(find_weights_file(file), get_shapes(module), rename=rename, **options)
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval()


def load_clip(config: ModelConfig, text: TextEncoder, file: Path, **options) -> CLIP:
    """CLIP around a text encoder that is there already."""
    with torch.device("meta"):
        clip = CLIP(config.text, config.vision)
    rest = read_tensors(file, without_text_encoder(get_shapes(clip)), **options)
    clip.text_model = text
    clip.load_state_dict({**clip.state_dict(keep_vars=True), **rest}, strict=True, assign=True)
    return clip.eval()


def without_text_encoder(tensors: dict) -> dict:
    """CLIP's tensors without those of its text encoder."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("text_model.")}


def find_weights_file(file: Path) -> Path:
    """`file`, or its half-precision variant where a folder of the hub holds only that."""
    variant = file.with_suffix(f".fp16{file.suffix}")
    if file.exists() or variant.exists():
        return file if file.exists() else variant
    pickles = sorted(path.name for path in file.parent.glob("*.bin"))
    if pickles:
        raise CheckpointError(f"{file} is missing: of the {file.parent.name} there is only {pickles[0]}, a pickle; "
                              "get the model's safetensors files, or save it as such with diffusers.")
    raise missing_file_error(file)


def make_model_index(scheduler: str, inpaint: bool = False) -> dict:
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if inpaint else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def read_part_config(file: Path, read: Callable):
    """A config file through one of `configs`' functions; its errors name the file."""
    values = read_json(file)
    try:
        return read(values)
    except KeyError as error:
        raise CheckpointError(f"{file} has no {error}; it is not the config of this part.") from error
    except (CheckpointError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
