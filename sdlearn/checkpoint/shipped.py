"""The models that come with the package, and what was trained on top of them.

    weights/<model>/                    a model folder, see `folder`
    weights/<model>/control-<name>/     a ControlNet: config.json, difference.safetensors
    weights/<model>/inpaint/            the nine-channel U-Net: config.json, difference.safetensors
    weights/<model>/concept/            one new thing that it was taught: word.safetensors, lora.safetensors, told.json

The second and the third hold differences to the model's own U-Net, see `difference`; loaded they are plain modules.
Wherever a model is asked for, the path of any folder of this kind serves as well as a shipped name.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..clip import TextEncoder
from ..controlnet import ControlNet
from ..files import write_atomically
from ..finetune import Embedding, LoRA
from ..unet import UNet
from .configs import controlnet_from_dict, controlnet_to_dict, text_from_dict, unet_from_dict, unet_to_dict
from .difference import Tensors, check_base, compute_difference, fingerprint_file, restore_tensors, write_difference
from .embedding import load_embedding, save_embedding
from .errors import CheckpointError
from .files import get_shapes, read_tensors, write_json
from .folder import DIFFUSERS_FILE, TRANSFORMERS_FILE, Parts, find_weights_file, load_folder, read_part_config
from .lora import load_lora, save_lora

SHIPPED = Path(__file__).parents[1] / "weights"
CONCEPT, WORD_FILE, LORA_FILE, INFO_FILE = "concept", "word.safetensors", "lora.safetensors", "told.json"
CONTROL, INPAINT = "control-", "inpaint"        # folders; the second is also what an inpainting model's name ends in
DIFFERENCE_FILE = "difference.safetensors"
EVALUATION, EVALUATION_TEXT = "evaluation.json", "EVALUATION.md"


def list_shipped_models() -> list[str]:
    """Names that `load_shipped` takes: "mini", and "mini-inpaint" where the model has one for inpainting."""
    folders = sorted(file.parent for file in SHIPPED.glob("*/model_index.json"))
    return [name for folder in folders for name in
            [folder.name, *([f"{folder.name}-{INPAINT}"] if (folder / INPAINT / DIFFERENCE_FILE).exists() else [])]]


def list_shipped_controlnets(model: str | Path = "mini") -> list[str]:
    """Names of a model's ControlNets, as `load_shipped_controlnet` takes them."""
    return sorted(file.parent.name.removeprefix(CONTROL)
                  for file in find_model_folder(model).glob(f"{CONTROL}*/{DIFFERENCE_FILE}"))


def load_shipped(name: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Parts:
    """Every part of a shipped model. Raises CheckpointError for a name that is none of `list_shipped_models`."""
    if name not in list_shipped_models():
        known = ", ".join(list_shipped_models()) or "none: the package was installed without its weights"
        raise CheckpointError(f"there is no shipped model '{name}'; there are {known}.")
    if (SHIPPED / name).is_dir():
        return load_folder(SHIPPED / name, device=device, dtype=dtype)
    return load_shipped_inpaint(name.removesuffix(f"-{INPAINT}"), device=device, dtype=dtype)


def load_shipped_controlnet(model: str | Path, name: str, *, device: str | torch.device = "cpu",
                         dtype: torch.dtype = torch.float32) -> ControlNet:
    """A ControlNet of a model, by the name of its hint: load_shipped_control("mini", "edges").

    Raises CheckpointError, in a sentence, for one that the model does not have, that is damaged, or that
    belongs to another base.
    """
    folder = find_model_folder(model)
    place = folder / f"{CONTROL}{name}"
    if not (place / DIFFERENCE_FILE).exists():
        known = ", ".join(list_shipped_controlnets(model)) or "none"
        raise CheckpointError(f"{folder} has no ControlNet '{name}'; it has {known}.")
    config = read_part_config(place / "config.json", controlnet_from_dict)
    with torch.device("meta"):
        net = ControlNet(config)
    return _filled(net, place, folder).to(device, dtype)


def load_shipped_inpaint(model: str | Path, *, device: str | torch.device = "cpu",
                 dtype: torch.dtype = torch.float32) -> Parts:
    """A model with its nine-channel U-Net in the place of the base's. Errors as in `load_shipped_controlnet`."""
    folder = find_model_folder(model)
    place = folder / INPAINT
    if not (place / DIFFERENCE_FILE).exists():
        raise CheckpointError(f"{folder} has no U-Net for inpainting; ask for the model itself, which inpaints by "
                              "blending.")
    config = read_part_config(place / "config.json", unet_from_dict)
    with torch.device("meta"):
        unet = UNet(config)
    unet = _filled(unet, place, folder).to(device, dtype)
    parts = load_folder(folder, device=device, dtype=dtype)
    return replace(parts, unet=unet, config=replace(parts.config, name=f"{folder.name}-{INPAINT}", unet=config))


def save_shipped_controlnet(model: Path, name: str, net: ControlNet, *, budget: int,
                            moments: Tensors | None = None) -> Path:
    """Store a ControlNet as its difference to the U-Net of a model folder, in about `budget` bytes.

    moments: see `compute_difference`. Raises OSError when it cannot be written, ValueError for a budget that is
    too small.
    """
    return _save(model, f"{CONTROL}{name}", net.state_dict(), controlnet_to_dict(net.control_config), budget,
                 moments)


def save_shipped_inpaint(model: Path, unet: UNet, *, budget: int, moments: Tensors | None = None) -> Path:
    """Store a nine-channel U-Net as its difference to that of a model folder; as `save_shipped_controlnet`."""
    side = read_part_config(model / "unet" / "config.json", lambda values: int(values["sample_size"]))
    return _save(model, INPAINT, unet.state_dict(), unet_to_dict(unet.config, side), budget, moments)


@dataclass(frozen=True, eq=False)
class Concept:
    """One new thing that a model was taught at full length, in two ways, and what is known about it.

    `info` holds what the thing is called in prompts, how long it was trained, and how alike it is drawn.
    """

    word: Embedding
    lora: LoRA
    info: dict


def save_concept(model: Path, concept: Concept) -> Path:
    """Store what a model folder's base has been taught, beside it. Raises OSError when it cannot be written."""
    with write_atomically(Path(model).absolute() / CONCEPT) as temporary:
        temporary.mkdir(exist_ok=True)
        save_embedding(temporary / WORD_FILE, concept.word)
        save_lora(temporary / LORA_FILE, concept.lora)
        write_json(temporary / INFO_FILE, {**concept.info, **_base_of(Path(model))})
    return Path(model) / CONCEPT


def load_concept(model: str | Path = "mini") -> Concept:
    """What a model has been taught at full length. Raises CheckpointError, in a sentence, where there is nothing, where
    it is damaged, or where it belongs to another base."""
    folder = find_model_folder(model)
    place = folder / CONCEPT
    if not (place / INFO_FILE).exists():
        raise CheckpointError(f"{folder} has been taught nothing new; train the stages word and lora, and ship.")
    info = read_part_config(place / INFO_FILE, dict)
    if changed := [part for part, mark in _base_of(folder).items() if info.get(part) != mark]:
        raise CheckpointError(f"{place} was taught to another base than the one in {folder}: the {changed[0]} is not "
                              "the same. Train word and lora on this one, and ship again.")
    with torch.device("meta"):
        unet = UNet(read_part_config(folder / "unet" / "config.json", unet_from_dict))
        text = TextEncoder(read_part_config(folder / "text_encoder" / "config.json", text_from_dict))
    return Concept(load_embedding(place / WORD_FILE), load_lora(place / LORA_FILE, unet, text), info)


def _base_of(model: Path) -> dict[str, str]:
    """What a concept is good with: fingerprints of U-Net and text encoder."""
    text = find_weights_file(model / "text_encoder" / TRANSFORMERS_FILE)
    return {"U-Net": fingerprint_file(find_base_file(model)), "text encoder": fingerprint_file(text)}


def remove_incompatible(model: Path) -> list[str]:
    """Remove what belongs to another base than the U-Net that a model folder holds now; the names of what went."""
    removed = []
    for file in sorted([*model.glob(f"{CONTROL}*/{DIFFERENCE_FILE}"), *model.glob(f"{INPAINT}/{DIFFERENCE_FILE}")]):
        try:
            check_base(file, find_base_file(model))
        except CheckpointError:
            shutil.rmtree(file.parent)
            removed.append(file.parent.name)
    if (model / CONCEPT).exists():
        try:
            load_concept(model)
        except CheckpointError:
            shutil.rmtree(model / CONCEPT)
            removed.append(CONCEPT)
    return removed


def write_evaluation(model: Path, figures: dict, text: str):
    """Write an evaluation beside the weights that were measured, with the fingerprint of the U-Net."""
    with write_atomically(model) as temporary:
        write_json(temporary / EVALUATION, {**figures, "U-Net": fingerprint_file(find_base_file(model))})
        (temporary / EVALUATION_TEXT).write_text(text, encoding="utf-8")


def read_evaluation(model: str | Path = "mini") -> dict | None:
    """The figures of the last evaluation of a model's weights, None where there is none of these weights."""
    folder = find_model_folder(model)
    file = folder / EVALUATION
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found if found.get("U-Net") == fingerprint_file(find_base_file(folder)) else None


def remove_old_evaluation(model: Path) -> bool:
    """Remove the evaluation of other weights than a model folder holds now; whether there was one."""
    if not (model / EVALUATION).exists() or read_evaluation(model) is not None:
        return False
    for name in (EVALUATION, EVALUATION_TEXT):
        (model / name).unlink(missing_ok=True)
    return True


# --- where things are -------------------------------------------------------------------------------

def find_model_folder(model: str | Path) -> Path:
    """The folder of a shipped model, by name, or of any other, by path."""
    for folder in (SHIPPED / model, Path(model)):
        if (folder / "model_index.json").is_file():
            return folder
    raise CheckpointError(f"there is no model '{model}'; give a shipped one "
                          f"({', '.join(list_shipped_models()) or 'none'}) or the path of a model folder.")


def find_base_file(model: Path) -> Path:
    return find_weights_file(model / "unet" / DIFFUSERS_FILE)


def read_base_tensors(model: Path) -> Tensors:
    """The U-Net's tensors as they are stored, in float32."""
    with torch.device("meta"):
        unet = UNet(read_part_config(model / "unet" / "config.json", unet_from_dict))
    return read_tensors(find_base_file(model), get_shapes(unet))


def _filled(module: torch.nn.Module, place: Path, model: Path):
    """A module on the meta device, filled with the base's tensors plus the differences in `place`."""
    file = place / DIFFERENCE_FILE
    check_base(file, find_base_file(model))                          # before the base is read
    tensors = restore_tensors(file, module, read_base_tensors(model))
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval()


def _save(model: Path, name: str, tensors: Tensors, config: dict, budget: int, moments: Tensors | None) -> Path:
    stored = compute_difference(tensors, read_base_tensors(model), budget, moments)
    with write_atomically(Path(model).absolute() / name) as temporary:
        write_json(temporary / "config.json", config)
        write_difference(temporary / DIFFERENCE_FILE, stored, find_base_file(model))
    return model / name
