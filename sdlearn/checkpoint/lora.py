"""LoRA files, in the three spellings that are in use.

    kohya       lora_unet_<layer with _ for .>.lora_down.weight, .lora_up.weight, .alpha; lora_te_... for text
    diffusers   unet.<layer>.lora.down.weight, .lora.up.weight
                text_encoder.<layer>.lora_linear_layer.down.weight, .up.weight
                older: <attention>.processor.to_q_lora.down.weight ..., with or without unet. before it
    PEFT        unet.<layer>.lora_A.weight (down), .lora_B.weight (up); text_encoder.<layer>.lora_A.weight ...

Layers of the text encoder carry "text_model." before their name, which newer files may leave out. A layer
without an alpha has a scale of 1. Every key of a file must be understood, and belong to a layer of the model
that it is read for.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import write_atomically
from ..finetune.lora import LoRA, LowRank, check_fit, find_lora_layers
from .embedding import check_file
from .errors import CheckpointError
from .files import open_tensors, write_tensors

SPELLINGS = ("diffusers", "kohya", "peft")
# What a key ends with: the layer before it, and which of down, up and alpha the tensor is.
KOHYA = re.compile(r"lora_(?P<part>unet|te)_(?P<layer>\w+)\.(?P<what>lora_down\.weight|lora_up\.weight|alpha)")
PEFT = re.compile(r"(?P<layer>.+)\.(?P<what>lora_[AB]|lora\.down|lora\.up|lora_linear_layer\.down|"
                  r"lora_linear_layer\.up)\.weight")
OLD = re.compile(r"(?P<layer>.+?)(?:\.processor)?\.to_(?P<target>q|k|v|out)_lora\.(?P<what>down|up)\.weight")
ALPHA = re.compile(r"(?P<layer>.+)\.(?P<what>alpha)")
OLD_TARGETS = {"unet": {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"},
               "text_encoder": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}}
DOWN = ("lora_down.weight", "lora_A", "lora.down", "lora_linear_layer.down", "down")
METADATA = "lora_adapter_metadata"      # in a header: PEFT's settings, as JSON


def load_lora(file: str | Path, unet: nn.Module, text: nn.Module) -> LoRA:
    """A LoRA file of any spelling, in float32, for a U-Net and a text encoder.

    .safetensors, or a pickle (.bin, .pt), of which nothing is run. Raises CheckpointError, in a sentence
    that names the file, for one that is missing or damaged, keys that are no LoRA's, a LoRA for layers that
    this model does not have, and shapes that do not fit.
    """
    file = Path(file)
    check_file(file)
    modules = {"unet": unet, "text_encoder": text}
    with open_tensors(file) as opened:
        keys = _understood(file, list(opened.shapes), modules)
        tensors = {key: _copied(file, key, opened.read(key), what) for key, (_, _, what) in keys.items()}
        settings = _settings(file, opened.metadata)
    grouped: dict[str, dict[str, dict[str, Tensor]]] = {"unet": defaultdict(dict), "text_encoder": defaultdict(dict)}
    for key, (part, layer, what) in keys.items():
        if what in grouped[part][layer]:
            raise CheckpointError(f"{file} holds two {what} for layer '{layer}', the second being '{key}'; "
                                  "use a file that was written once, in one spelling.")
        grouped[part][layer][what] = tensors[key]
    lora = LoRA(*({layer: _low_rank(file, part, layer, found, settings) for layer, found in grouped[part].items()}
                  for part in modules))
    for part, module in modules.items():
        try:
            check_fit(getattr(lora, part), module)
        except ValueError as error:
            raise CheckpointError(f"{file} cannot be used: {error}.") from error
    return lora


def _copied(file: Path, key: str, tensor: Tensor, what: str) -> Tensor:
    """A tensor as read is a view of the file, which may be replaced on disk. An alpha may be a whole number."""
    if what != "alpha" and not tensor.is_floating_point():
        raise CheckpointError(f"{file} has '{key}' as {tensor.dtype}, where floating-point numbers are needed; "
                              "use a file that is not quantised.")
    tensor = tensor.detach().to(torch.float32, copy=True)
    if not tensor.isfinite().all():
        raise CheckpointError(f"{file} has NaN or infinity in '{key}'; use another copy of the LoRA.")
    return tensor


def _understood(file: Path, keys: list[str], modules: dict[str, nn.Module]) -> dict[str, tuple[str, str, str]]:
    """(part, layer, "down" | "up" | "alpha") of every key."""
    if not keys:
        raise CheckpointError(f"{file} is empty: it holds no tensors.")
    by_underscores = {part: {name.replace(".", "_"): name for name in find_lora_layers(module)}
                      for part, module in modules.items()}
    known, unknown = {}, []
    for key in keys:
        if match := KOHYA.fullmatch(key):
            part = "unet" if match["part"] == "unet" else "text_encoder"
            layer = match["layer"].removeprefix("text_model_") if part == "text_encoder" else match["layer"]
            known[key] = part, by_underscores[part].get(layer, layer), _kind(match["what"])
        elif match := OLD.fullmatch(key) or PEFT.fullmatch(key) or ALPHA.fullmatch(key):
            part, layer = _place(match["layer"])
            target = match.groupdict().get("target")
            layer = f"{layer}.{OLD_TARGETS[part][target]}" if target else layer
            known[key] = part, layer, _kind(match["what"])
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(f"{file} holds {len(unknown)} keys that are no LoRA's for Stable Diffusion 1.x or 2.x, "
                              f"the first being '{unknown[0]}'; what other methods (LoHa, LoKr, DoRA) or other "
                              "models make cannot be read.")
    return known


def _kind(what: str) -> str:
    return "alpha" if what == "alpha" else "down" if what in DOWN else "up"


def _place(path: str) -> tuple[str, str]:
    """Part and layer of a path with dots; without a part's name it is the U-Net's."""
    path = path.removeprefix("base_model.model.")
    if path.startswith("text_encoder."):
        return "text_encoder", path.removeprefix("text_encoder.").removeprefix("text_model.")
    return "unet", path.removeprefix("unet.")


def _low_rank(file: Path, part: str, layer: str, found: dict[str, Tensor], settings: dict) -> LowRank:
    for what in ("down", "up"):
        if what not in found:
            raise CheckpointError(f"{file} has no {what} for layer '{layer}'; the file is not whole.")
    down, up, alpha = found["down"], found["up"], found.get("alpha")
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or 0 in down.shape:
        raise CheckpointError(f"{file} has down {list(down.shape)} and up {list(up.shape)} for layer '{layer}'; "
                              "a LoRA has two dimensions, or four for a convolution.")
    if alpha is not None and alpha.numel() != 1:
        raise CheckpointError(f"{file} has an alpha of shape {list(alpha.shape)} for layer '{layer}', "
                              "where one number is needed.")
    return LowRank(down, up, alpha.item() if alpha is not None else _alpha(settings, part, layer, len(down)))


def _settings(file: Path, metadata: dict[str, str]) -> dict:
    """PEFT's settings from a header, which hold the alpha that its keys do not; none in most files."""
    try:
        settings = json.loads(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{file} has {METADATA} in its header that is no JSON ({error}).") from error
    return settings if isinstance(settings, dict) else {}


def _alpha(settings: dict, part: str, layer: str, rank: int) -> float | None:
    """The alpha that PEFT's settings give a layer, or None. With its use_rslora the scale is alpha / sqrt(r)."""
    prefix = "text_encoder." if part == "text_encoder" else "unet."
    patterns = settings.get(f"{prefix}alpha_pattern") or {}
    own = [alpha for name, alpha in patterns.items() if f".{layer}".endswith(f".{name.removeprefix('text_model.')}")]
    alpha = own[0] if own else settings.get(f"{prefix}lora_alpha")
    if alpha is None:
        return None
    return float(alpha) * rank**0.5 if settings.get(f"{prefix}use_rslora") else float(alpha)


def save_lora(file: str | Path, lora: LoRA, *, spelling: str = "diffusers") -> Path:
    """Write a LoRA as safetensors in float32, spelled as "diffusers", "kohya" or "peft".

    Only kohya's spelling has a place for alpha; in the others alpha / r is multiplied into up, so that the
    file means the same to everyone. Raises CheckpointError for another spelling or
    ending and for values that are not finite, OSError where the file cannot be written.
    """
    file = Path(file)
    if spelling not in SPELLINGS:
        raise CheckpointError(f"there is no spelling '{spelling}'; choose one of {', '.join(SPELLINGS)}.")
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} does not end in .safetensors, the only format that LoRAs are written in.")
    tensors = {}
    for part, changes in (("unet", lora.unet), ("text_encoder", lora.text_encoder)):
        for layer, change in changes.items():
            tensors |= _spelled(part, layer, change, spelling)
    if not tensors:
        raise CheckpointError(f"{file} was not written: the LoRA has no layers.")
    with write_atomically(file) as temporary:
        # Clones, since safetensors refuses tensors that share memory.
        write_tensors(temporary, {key: tensor.detach().clone() for key, tensor in tensors.items()}, source=file.name)
    return file


def _spelled(part: str, layer: str, change: LowRank, spelling: str) -> dict[str, Tensor]:
    path = f"text_model.{layer}" if part == "text_encoder" else layer
    if spelling == "kohya":
        name = ("lora_te_" if part == "text_encoder" else "lora_unet_") + path.replace(".", "_")
        alpha = torch.tensor(float(change.rank if change.alpha is None else change.alpha))
        return {f"{name}.lora_down.weight": change.down, f"{name}.lora_up.weight": change.up, f"{name}.alpha": alpha}
    name = ("text_encoder." if part == "text_encoder" else "unet.") + path
    if spelling == "peft":
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    else:
        middle = "lora_linear_layer" if part == "text_encoder" else "lora"
        down, up = f"{name}.{middle}.down.weight", f"{name}.{middle}.up.weight"
    return {down: change.down, up: change.scale * change.up}
