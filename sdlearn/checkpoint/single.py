"""A whole model in one file, in the layout of the first Stable Diffusion code (LDM).

    model.diffusion_model.          the U-Net
    first_stage_model.              the autoencoder
    cond_stage_model.transformer.   SD 1.x' text encoder, under the names of transformers
    cond_stage_model.model.         SD 2.x' text encoder, under those of OpenCLIP
    control_model.                  a ControlNet, which also comes alone, with or without this prefix
    sdlearn.vision.                 ours: CLIP's image encoder, both projections and the logit scale

Published files are .safetensors or .ckpt; what is written is .safetensors, with the configs and the
tokenizer in its header. A file without that header is an SD 1.x or 2.x, whose config is read off the tensors.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..clip import CLIP, TextEncoder
from ..config import ModelConfig
from ..controlnet import ControlNet
from ..files import write_atomically
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from . import detect
from .errors import CheckpointError, first_line
from .files import PICKLES, Shape, check_shapes, copy_tensors, get_shapes, open_tensors, write_tensors
from .folder import Parts, check_prediction, check_vocabulary, without_text_encoder
from .header import read_header, write_header
from .hub import download
from .layouts import KeyMapping, map_open_clip_keys, map_unet_keys, map_vae_keys, to_single_file
from .tokenizer import load_tokenizer

SUFFIXES = (".safetensors", *PICKLES)
VISION = "sdlearn.vision."
TOKENIZER = "openai/clip-vit-large-patch14"     # where SD 1.x' and 2.x' tokenizer is published
Source = str | Path | Tokenizer | None


def load_single(file: str | Path, *, prediction: str | None = None, tokenizer: Source = None,
                device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Parts:
    """Every part of a single file, on `device`; tensors of any precision are cast to `dtype`.

    prediction: what an SD 2.x predicts, "epsilon" (2.0-base, 2.1-base, inpainting) or "v_prediction" (the
    models of 768 pixels); its tensors do not tell. tokenizer: a folder, or CLIP's own
    bpe_simple_vocab_16e6.txt.gz; without it CLIP's is taken from the hub. A file that `save_single` wrote
    needs neither. Names and shapes are checked before a tensor is read, and tensors are read one by one, so
    that there is never a second copy of a model. Raises CheckpointError, in one sentence that names the file,
    and TensorMismatch and TensorsNotFinite, which list the tensors.
    """
    file = Path(file)
    check_arguments(file, prediction)
    with open_tensors(file) as opened:
        header = read_header(file, opened.metadata)
        config, own, world = header or (detect.detect_config(file, opened.shapes, prediction), None, None)
        check_prediction(file, config.noise.prediction_type, prediction)
        found = {name: shape for name, shape in opened.shapes.items() if header or not detect.IGNORED.match(name)}
        modules = make_empty_modules(config)
        places = map_keys(modules, find_text_prefix(found))
        check_tensors(file, found, modules, places)
        if own is None or tokenizer is not None:
            own = find_tokenizer(file, tokenizer, config.text.pad_with_end)
            check_vocabulary(file, config.text, own)
        tensors = copy_tensors(file, ((key, mapping.name, mapping.ours(opened.read(mapping.name)))
                                for key, mapping in places.items()), device, dtype)
    for part, module in modules.items():
        mine = {name: tensor for (owner, name), tensor in tensors.items() if owner == part}
        if part == "clip":
            module.text_model = modules["text_encoder"]
            mine = {**module.state_dict(keep_vars=True), **mine}
        module.load_state_dict(mine, strict=True, assign=True)
        module.eval()
    return Parts(config, own, modules["text_encoder"], modules["vae"], modules["unet"], modules.get("clip"), world)


def save_single(file: str | Path, parts: Parts, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a .safetensors file that `load_single` and programs for SD 1.x and 2.x open.

    The text encoder is written as SD 1.x has it where it is one of SD 1.x (quick GELU, padded with the end
    token), else as SD 2.x has it, without the last layer of OpenCLIP's that Stable Diffusion does not run.
    Floating-point tensors are written in `dtype`. Raises OSError when it cannot be written.
    """
    file = Path(file).absolute()
    if file.suffix.lower() != ".safetensors":
        raise CheckpointError(f"{file} does not end in .safetensors; single files are written as such.")
    text, modules = parts.config.text, {"text_encoder": parts.text_encoder, "vae": parts.vae, "unet": parts.unet}
    if parts.clip is not None:
        modules["clip"] = parts.clip
    older = text.activation == "quick_gelu" and text.pad_with_end
    places = map_keys(modules, f"{detect.HF_TEXT}text_model." if older else detect.OPEN_CLIP_TEXT)
    tensors = {(part, name): tensor for part, module in modules.items()
               for name, tensor in module.state_dict().items() if (part, name) in places}
    with write_atomically(file) as temporary:
        write_tensors(temporary, to_single_file(tensors, places), dtype, metadata=write_header(parts), source=file.name)
    return file


def load_single_controlnet(file: str | Path, *, device: str | torch.device = "cpu",
                           dtype: torch.dtype = torch.float32) -> ControlNet:
    """The ControlNet of a single file, on `device`, cast to `dtype`; a model that is in it too is passed over.

    Its config is read off the tensors. Raises as `load_single` does.
    """
    file = Path(file)
    check_arguments(file, None)
    with open_tensors(file) as opened:
        prefix = detect.CONTROL if any(name.startswith(detect.CONTROL) for name in opened.shapes) else ""
        with torch.device("meta"):
            net = ControlNet(detect.detect_controlnet(file, detect.select_part(opened.shapes, prefix)))
        found = {name: shape for name, shape in opened.shapes.items() if name.startswith(prefix)}
        places = {("controlnet", name): mapping._replace(name=prefix + mapping.name)
                  for name, mapping in map_unet_keys(net.state_dict()).items()}
        check_tensors(file, found, {"controlnet": net}, places)
        tensors = copy_tensors(file, ((name, mapping.name, opened.read(mapping.name))
                                for (_, name), mapping in places.items()), device, dtype)
    net.load_state_dict(tensors, strict=True, assign=True)
    return net.eval()


# --- where the parts lie ----------------------------------------------------------------------------

def make_empty_modules(config: ModelConfig) -> dict[str, nn.Module]:
    """The parts without any weights, on the meta device."""
    with torch.device("meta"):
        modules = {"text_encoder": TextEncoder(config.text), "vae": VAE(config.vae), "unet": UNet(config.unet)}
        return modules | ({"clip": CLIP(config.text, config.vision)} if config.vision else {})


def map_keys(modules: dict[str, nn.Module], text: str) -> dict[tuple[str, str], KeyMapping]:
    """The place of each tensor by (part, our name), when the text encoder lies under the prefix `text`."""
    tables = {
        "unet": (detect.UNET, map_unet_keys), "vae": (detect.VAE, map_vae_keys),
        "text_encoder": (text, map_open_clip_keys if text == detect.OPEN_CLIP_TEXT else map_same_keys),
        "clip": (VISION, lambda names: map_same_keys(without_text_encoder(dict.fromkeys(names)))),
    }
    return {(part, name): mapping._replace(name=tables[part][0] + mapping.name)
            for part, module in modules.items()
            for name, mapping in tables[part][1](module.state_dict()).items()}


def map_same_keys(names: Iterable[str]) -> dict[str, KeyMapping]:
    return {name: KeyMapping(name) for name in names}


def find_text_prefix(names: Iterable[str]) -> str:
    """Told by the names, not by the version: some SD 2.x files have the names of transformers."""
    prefixes = (detect.OPEN_CLIP_TEXT, f"{detect.HF_TEXT}text_model.", detect.HF_TEXT)
    return next((one for one in prefixes if any(name.startswith(one) for name in names)), prefixes[1])


# --- checks -----------------------------------------------------------------------------------------

def check_arguments(file: Path, prediction: str | None):
    if file.suffix.lower() not in SUFFIXES:
        raise CheckpointError(f"{file} does not end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, so it is no "
                              "checkpoint in a single file; give one that is.")
    if prediction not in (None, *detect.PREDICTIONS):
        raise CheckpointError(f"prediction is '{prediction}'; choose one of {', '.join(detect.PREDICTIONS)}.")


def check_tensors(file: Path, found: Mapping[str, Shape], modules: dict[str, nn.Module],
            places: dict[tuple[str, str], KeyMapping]):
    """Raises TensorMismatch unless the file has every tensor, in its shape, and none beside."""
    wanted = {}
    for part, module in modules.items():
        for name, shape in get_shapes(module).items():
            if mapping := places.get((part, name)):
                flat = mapping.pointwise and found.get(mapping.name) == shape       # linear there already
                wanted[mapping.name] = shape if flat else mapping.shape(shape)
    check_shapes(file, found, wanted, against="the model that most of its tensors describe",
                 advice="the file is damaged, or not a Stable Diffusion 1.x or 2.x: use another copy")


def find_tokenizer(file: Path, source: Source, pad_with_end: bool) -> Tokenizer:
    """The one given, or CLIP's from the hub."""
    if isinstance(source, Tokenizer):
        return source
    if source is not None:
        return load_tokenizer(Path(source), pad_with_end)
    try:
        folder = [download(TOKENIZER, file=name) for name in ("vocab.json", "merges.txt")][0].parent
    except CheckpointError as error:
        raise CheckpointError(f"{file} has no tokenizer in it, and CLIP's cannot be had from the hub; give "
                              "tokenizer= a folder with vocab.json and merges.txt, or CLIP's "
                              f"bpe_simple_vocab_16e6.txt.gz ({first_line(error).rstrip('.')}).") from error
    return load_tokenizer(folder, pad_with_end)
