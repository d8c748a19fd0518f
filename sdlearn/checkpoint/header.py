"""What tensors cannot tell of a model, as JSON in the header of its single file, under the name "sdlearn".

The configs stand as those of a model folder do. A file from elsewhere has no such header.
"""

import json
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..tokenizer import Tokenizer
from . import configs
from .errors import CheckpointError
from .folder import Parts, check_vocabulary, check_world

KEY = "sdlearn"
World = dict[str, list[str]] | None


def write_header(parts: Parts) -> dict[str, str]:
    """The metadata of a safetensors file: texts by name."""
    config, tokenizer = parts.config, parts.tokenizer
    values = {
        "image_size": config.image_size,
        "unet": configs.unet_to_dict(config.unet, config.latent_size),
        "vae": configs.vae_to_dict(config.vae, config.image_size),
        "text": configs.text_to_dict(config.text, tokenizer.start, tokenizer.end),
        "vision": configs.vision_to_dict(config.vision) if parts.clip is not None else None,
        "noise": configs.noise_to_dict(config.noise),
        "sampling": configs.sampling_to_dict(config.sampling),
        "tokenizer": tokenizer_to_dict(tokenizer),
        "world": parts.world,
    }
    return {KEY: json.dumps(values, ensure_ascii=False, separators=(",", ":"))}


def read_header(file: Path, metadata: dict[str, str]) -> tuple[ModelConfig, Tokenizer, World] | None:
    """What `write_header` wrote, or None for a file that has none. The config is named after the file."""
    if KEY not in metadata:
        return None
    part: Any = "JSON"
    try:
        values = json.loads(metadata[KEY])
        part = "tokenizer"
        tokenizer = tokenizer_from_dict(values[part])
        read = {"unet": configs.unet_from_dict, "vae": configs.vae_from_dict, "noise": configs.noise_from_dict,
                "text": lambda text: configs.text_from_dict(text, tokenizer.pad_with_end)}
        found = {}
        for part, from_dict in read.items():
            found[part] = from_dict(values[part])
        part = "vision"
        vision = configs.vision_from_dict(values[part]) if values[part] else None
        part = "sampling"
        if part in values:                          # older files have none
            found[part] = configs.sampling_from_dict(values[part])
        part = "image_size"
        config = ModelConfig(file.stem, vision=vision, image_size=int(values[part]), **found)
        part = "world"
        world = values[part]
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} has a damaged header: its {part} cannot be read ({type(error).__name__}: "
                              f"{error}); copy or save it again.") from error
    if world is not None:
        check_world(f"the header of {file}", world)
    check_vocabulary(file, config.text, tokenizer)
    return config, tokenizer, world


def tokenizer_to_dict(tokenizer: Tokenizer) -> dict:
    return {"vocab": tokenizer.vocab, "merges": [" ".join(pair) for pair in tokenizer.merges],
            "pad_with_end": tokenizer.pad_with_end,
            "added": [[symbol, len(tokenizer.added[symbol])] for symbol in tokenizer.symbols
                      if symbol in tokenizer.added]}


def tokenizer_from_dict(values: dict) -> Tokenizer:
    """Raises KeyError, TypeError or ValueError for values that are none."""
    merges = [tuple(pair.split(" ")) for pair in values["merges"]]
    if not all(len(pair) == 2 for pair in merges):
        raise ValueError("a merge is not a pair")
    tokenizer = Tokenizer(merges, values["vocab"], bool(values["pad_with_end"]))
    for word, n in values["added"]:
        if word not in tokenizer.added:         # the second, third ... of a word's ids came with the first
            tokenizer.add_token(word, n)
    return tokenizer
