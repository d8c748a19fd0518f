"""What a caller gives, validated once: settings, image, mask, conditioning and noise as the model takes them.

An image may be a PIL image of any mode, bytes (H, W, 3) or (H, W), a batch of either, or a tensor that is
ready: (B, 3, H, W), pixels in [-1, 1], condition images in [0, 1], masks (B, 1, H, W) of 0 and 1. One
image serves the whole batch; a batch of images gives one to each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import check_whole
from ..controlnet import Control, ControlNet, check_version
from ..guidance import check_guidance
from ..inpaint import binary_mask
from ..samplers import make_timesteps_for
from ..schedule import Timesteps
from .settings import MAX_RESAMPLE, Settings, SettingsError, as_settings_error

Controls = Control | Sequence[Control]


@dataclass(frozen=True, kw_only=True)
class PipelineInputs(Settings):
    """The resolved inputs of a run: no setting but guidance_interval and timestep_spacing is None.

    B is the batch, or 1 where one image serves all of it.
    """

    timesteps: Timesteps                     # pairs (t, t_prev), from noise to image
    image: Tensor | None                # (B, 3, H, W) pixels in [-1, 1]
    mask: Tensor | None                 # (B, 1, H, W) of 0 and 1, 1 where the image is inpainted
    strength: float                     # share of the steps that are run, above 0 to 1
    resample: int                       # times that each step of blended inpainting is run
    controls: tuple[Control, ...]       # hints (B, 3, H, W) in [0, 1]
    latent: Tensor | None               # (B, C, h, w) noise in place of the seeds'


def validate(model, *, image=None, mask=None, strength: float | None = None, resample: int = 1,
             controls: Controls = (), latent: Tensor | None = None, **settings) -> PipelineInputs:
    """Check all inputs of a run against the model and fill in its defaults; no network is run.

    settings: the fields of `Settings`. Raises SettingsError, in one sentence, for whatever no image can be made with.
    """
    default, settings = model.config.sampling, Settings(**settings)
    for name in ("num_inference_steps", "guidance_scale"):
        if getattr(settings, name) is None:
            settings = replace(settings, **{name: getattr(default, name)})
    model.size(settings.size)
    timesteps = as_settings_error(make_timesteps_for, settings.sampler, model.schedule, settings.num_inference_steps,
                                  settings.timestep_spacing)
    as_settings_error(check_guidance, model.schedule, settings.guidance_scale, settings.guidance_rescale,
                      settings.guidance_interval)
    check_combination(model, image, mask, strength, resample)
    strength = 1.0 if strength is None else strength
    image = None if image is None else to_pixels(image)
    controls = (controls,) if isinstance(controls, Control) else tuple(controls)
    size = resolve_size(model, settings.size, image, controls)
    mask = None if mask is None else to_mask(mask, size)
    for control in controls:
        check_control(model, control, size, settings.batch)
    for what, given in (("image", image), ("mask", mask)):
        check_batch(what, given, settings.batch)
    settings = replace(settings, size=size)
    if latent is not None and latent.shape != (shape := model.latent_shape(settings)):
        raise SettingsError(f"the latent is {tuple(latent.shape)}; {settings.batch} of {size[0]}x{size[1]} "
                            f"pixels need {shape}")
    return PipelineInputs(**{one.name: getattr(settings, one.name) for one in fields(Settings)},
                          timesteps=get_timesteps(timesteps, strength), image=image, mask=mask, strength=strength,
                          resample=resample, controls=controls, latent=latent)


def check_combination(model, image, mask, strength: float | None, resample: int):
    """Raises SettingsError unless these go together: an image with a strength, a mask with an image, nine channels
    with a mask, resampling with blended inpainting."""
    name, nine = model.config.name, model.inpaints
    if strength is not None and (not isinstance(strength, Real) or not 0 < strength <= 1):
        raise SettingsError(f"strength is {strength}; give a number above 0, which would change nothing, "
                            "up to 1, which keeps nothing of the image")
    as_settings_error(check_whole, "resample", resample, 1, MAX_RESAMPLE)
    if nine and mask is None:
        raise SettingsError(f"'{name}' is an inpainting model: its U-Net reads a mask and a masked image with the "
                            "latent; call inpaint with both, or load a model that is not for inpainting")
    if mask is not None and image is None:
        raise SettingsError("there is a mask but no image to inpaint; give the image, too")
    if image is None and strength not in (None, 1):
        raise SettingsError(f"strength is {strength}, but there is no image to start from; give one, or leave "
                            "strength out")
    if resample > 1 and (mask is None or nine):
        raise SettingsError(f"resample is {resample}, but resampling belongs to inpainting with a U-Net that is "
                            "not made for it; leave resample out")


def resolve_size(model, size, image: Tensor | None, controls: tuple[Control, ...]) -> tuple[int, int]:
    """(width, height) in pixels: of the image, else the size asked for, else the first hint's, else the model's."""
    if image is None:
        if size is None and controls and isinstance(controls[0], Control):
            size = tuple(controls[0].hint.shape[:1:-1])
        return model.size(size)
    found = tuple(image.shape[:1:-1])
    if size is not None and (asked := model.size(size)) != found:
        raise SettingsError(f"the image is {found[0]}x{found[1]}, but size is {asked[0]}x{asked[1]}; resize the "
                            "image, or leave size out")
    return model.size(found)


def get_timesteps(grid: Timesteps, strength: float) -> Timesteps:
    """The last steps of a grid: the share `strength` of them, rounded down, as in diffusers. Raises SettingsError."""
    count = int(len(grid) * strength)
    if count < 1:
        raise SettingsError(f"strength {strength:g} of {len(grid)} steps is less than one step; give more steps, or "
                            "more strength")
    return grid[len(grid) - count:]


def make_control(net: ControlNet, hint, *, conditioning_scale: float = 1.0, start: float = 0.0, end: float = 1.0,
                 guess_mode: bool = False) -> Control:
    """A `controlnet.Control` whose hint may be any image, see above. Raises SettingsError."""
    return as_settings_error(Control, net, to_hint(hint), conditioning_scale, start, end, guess_mode)


def check_control(model, control: Control, size: tuple[int, int], batch: int):
    """Raises SettingsError where a control does not fit the model, the size or the batch."""
    if not isinstance(control, Control):
        raise SettingsError(f"controls holds a {type(control).__name__}; give what make_control(net, hint) makes")
    as_settings_error(check_version, control.net.config, model.config.unet)
    if (found := tuple(control.hint.shape[:1:-1])) != size:
        raise SettingsError(f"the hint is {found[0]}x{found[1]} pixels, but the image {size[0]}x{size[1]}; resize "
                            "the hint")
    check_batch("hint", control.hint, batch)


def check_batch(what: str, given: Tensor | None, batch: int):
    """Raises SettingsError unless there is one for all images, or one for each."""
    if given is not None and len(given) not in (1, batch):
        raise SettingsError(f"there are {len(given)} {what}s for a batch of {batch}; give one for all, or one for each")


def to_pixels(image, what: str = "image") -> Tensor:
    """An image as (B, 3, H, W) in [-1, 1]. Raises SettingsError for what is no image."""
    if isinstance(image, Tensor):
        return _check_pixels(image, what, -1.0)
    return _to_bytes(image, "RGB", what).float() / 127.5 - 1


def to_hint(image, what: str = "hint") -> Tensor:
    """A condition image as (B, 3, H, W) in [0, 1]. Raises SettingsError for what is no image."""
    if isinstance(image, Tensor):
        return _check_pixels(image, what, 0.0)
    return _to_bytes(image, "RGB", what).float() / 255


def to_mask(mask, size: tuple[int, int]) -> Tensor:
    """A mask as (B, 1, H, W) of 0 and 1, 1 where the image is inpainted; `size` is the image's (width, height).

    Raises SettingsError for a mask of another size, one that is not binary, and one that is 0 everywhere.
    """
    values = mask if isinstance(mask, Tensor) else _to_bytes(mask, "L", "mask")
    if (found := tuple(values.shape[:-3:-1])) != size:
        raise SettingsError(f"the mask is {found[0]}x{found[1]} pixels, but the image {size[0]}x{size[1]}; "
                            "make both of one size")
    return as_settings_error(binary_mask, values)


def _check_pixels(image: Tensor, what: str, low: float) -> Tensor:
    image = image[None] if image.ndim == 3 else image
    if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
        raise SettingsError(f"the {what} is a tensor {image.dtype} {tuple(image.shape)}; give floating-point "
                            "numbers (batch, 3, height, width)")
    if not bool(((image >= low - 1e-3) & (image <= 1 + 1e-3)).all()):     # NaN is neither
        raise SettingsError(f"the {what} has values outside of [{low:g}, 1]; scale it, or give a PIL image")
    return image.detach().float().cpu()


def _to_bytes(image, mode: str, what: str) -> Tensor:
    """(B, channels of `mode`, H, W), uint8."""
    batch = image if isinstance(image, Sequence) or getattr(image, "ndim", 0) == 4 else [image]
    arrays = [np.asarray(_to_pil(item, what).convert(mode)) for item in batch]
    if not arrays or len({array.shape for array in arrays}) > 1:
        raise SettingsError(f"the {what}s must be of one size, but are "
                            f"{', '.join(f'{a.shape[1]}x{a.shape[0]}' for a in arrays) or 'none'}")
    stacked = torch.from_numpy(np.stack(arrays).reshape(*np.shape(arrays)[:3], -1))  # (B, H, W, channels)
    return stacked.permute(0, 3, 1, 2).contiguous()         # another layout would round otherwise in GroupNorm


def _to_pil(image, what: str) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise SettingsError(f"the {what} is {array.dtype} {array.shape}; give a PIL image, or bytes "
                            "(height, width) or (height, width, 3)")
    return Image.fromarray(array)
