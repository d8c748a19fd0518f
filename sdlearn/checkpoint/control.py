"""A ControlNet as a folder, in the layout of diffusers' ControlNetModel.

    config.json                                 the shape
    diffusion_pytorch_model.safetensors         the tensors; or, from the hub, in half precision as
    diffusion_pytorch_model.fp16.safetensors
"""

from pathlib import Path

import torch

from ..controlnet import ControlNet
from ..files import write_atomically
from .configs import controlnet_from_dict, controlnet_to_dict
from .errors import CheckpointError
from .files import write_json, write_tensors
from .folder import DIFFUSERS_FILE, load_module, read_part_config

HALF_FILE = "diffusion_pytorch_model.fp16.safetensors"


def load_controlnet_folder(folder: str | Path, *, device: str | torch.device = "cpu",
                    dtype: torch.dtype = torch.float32) -> ControlNet:
    """The ControlNet of a folder, on `device`; a file of any precision is cast to `dtype`.

    The half-precision file is read where it is the only one. Raises CheckpointError, in one sentence
    that names the file, for whatever is missing, damaged or not a ControlNet.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not the folder of a ControlNet: it has no config.json; "
                              "give one that diffusers or sdlearn has written.")
    config = read_part_config(folder / "config.json", controlnet_from_dict)
    whole, half = folder / DIFFUSERS_FILE, folder / HALF_FILE
    file = half if half.is_file() and not whole.exists() else whole
    return load_module(lambda: ControlNet(config), file, device=device, dtype=dtype)


def save_controlnet(folder: str | Path, net: ControlNet, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a folder that `load_controlnet_folder` and diffusers open; floating-point tensors in `dtype`.

    The write is atomic; other files in a folder that exists are preserved. Raises OSError when it cannot be written.
    """
    folder = Path(folder).absolute()
    with write_atomically(folder) as temporary:
        write_json(temporary / "config.json", controlnet_to_dict(net.control_config))
        write_tensors(temporary / DIFFUSERS_FILE, net.state_dict(), dtype)
    (folder / HALF_FILE).unlink(missing_ok=True)        # of another ControlNet that the folder held before
    return folder
