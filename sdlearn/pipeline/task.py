"""What a run starts from and keeps to, beside its prompts and settings: an image, a mask, control, noise."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..controlnet import Control, ControlNet, check_version
from .inputs import to_hint, to_mask, to_pixels
from .settings import MAX_RESAMPLE, Settings, SettingsError, as_settings_error, check_strength, whole


@dataclass(frozen=True, kw_only=True)
class PipelineInputs:
    """B is the batch, or 1 where one image serves all of it."""

    image: Tensor | None = None         # (B, 3, H, W) pixels in [-1, 1]
    mask: Tensor | None = None          # (B, 1, H, W) of 0 and 1, 1 where the image is made anew
    strength: float = 1.0               # share of the noise that the image is given
    resample: int = 1                   # times that each step of blended inpainting is done
    controls: tuple[Control, ...] = ()  # hints (B, 3, H, W) in [0, 1]
    latent: Tensor | None = None        # (B, C, h, w) noise in place of the seed's


def task_of(model, chosen: Settings, *, image=None, mask=None, strength: float | None = None, resample: int = 1,
            controls: Control | Sequence[Control] = (), latent: Tensor | None = None) -> tuple[PipelineInputs,
                                                                                               Settings]:
    """What the caller gave, checked against the model and as tensors; the settings with the size that results.

    Raises SettingsError, in a sentence, for whatever cannot be; nothing is computed with the networks.
    """
    check_strength(1.0 if strength is None else strength)
    if not whole(resample, 1, MAX_RESAMPLE):
        raise SettingsError(f"resample is {resample}; give a whole number from 1, off, to {MAX_RESAMPLE}")
    check_inputs(model, image, mask, strength, resample)
    pixels = None if image is None else to_pixels(image)
    controls = [controls] if isinstance(controls, Control) else list(controls)
    if pixels is not None:
        chosen = replace(chosen, size=size_of(model, pixels, chosen))
    elif chosen.size is None and controls and isinstance(controls[0], Control):
        chosen = replace(chosen, size=tuple(controls[0].hint.shape[:1:-1]))
    width, height = model.size(chosen.size)
    controls = tuple(checked_control(model, control, (width, height), chosen.batch) for control in controls)
    if mask is not None:
        mask = to_mask(mask, (width, height))
    for what, given in (("image", pixels), ("mask", mask)):
        check_batch(what, given, chosen.batch)
    if latent is not None and latent.shape != (shape := model.latent_shape(chosen)):
        raise SettingsError(f"the latent is {tuple(latent.shape)}; {chosen.batch} of {width}x{height} "
                            f"pixels need {shape}")
    return PipelineInputs(image=pixels, mask=mask, strength=1.0 if strength is None else strength, resample=resample,
                controls=controls, latent=latent), chosen


def check_inputs(model, image, mask, strength, resample):
    """What goes together: an image with a strength, a mask with an image, nine channels with a mask."""
    name, nine = model.config.name, model.inpaints
    if nine and mask is None:
        raise SettingsError(f"'{name}' is an inpainting model: its U-Net reads a mask and a masked image beside the "
                            "latent; call inpaint with both, or load a model that is not for inpainting")
    if mask is not None and image is None:
        raise SettingsError("there is a mask but no image to inpaint; give the image, too")
    if image is None and strength not in (None, 1):
        raise SettingsError(f"strength is {strength}, but there is no image to start from; give one, or leave "
                            "strength out")
    if resample > 1 and (mask is None or nine):
        raise SettingsError(f"resample is {resample}, but resampling belongs to inpainting with a U-Net that is "
                            "not made for it; leave resample out")


def size_of(model, pixels: Tensor, chosen: Settings) -> tuple[int, int]:
    """The image's size (width, height), which must be the one asked for and one that the model can make."""
    found = tuple(pixels.shape[:1:-1])
    if chosen.size is not None and model.size(chosen.size) != found:
        width, height = model.size(chosen.size)
        raise SettingsError(f"the image is {found[0]}x{found[1]}, but size is {width}x{height}; resize the image, "
                            "or leave size out")
    return model.size(found)


def make_control(net: ControlNet, hint, *, strength: float = 1.0, start: float = 0.0, end: float = 1.0,
                 guess: bool = False) -> Control:
    """A `controlnet.Control` whose hint may be any image: see `inputs`. Raises SettingsError."""
    return as_settings_error(Control, net, to_hint(hint), strength, start, end, guess)


def checked_control(model, control: Control, size: tuple[int, int], batch: int) -> Control:
    """The control on the model's device. Raises SettingsError where it does not fit model, size or batch."""
    if not isinstance(control, Control):
        raise SettingsError(f"controls holds a {type(control).__name__}; give what make_control(net, hint) makes")
    as_settings_error(check_version, control.net.config, model.config.unet)
    if (found := tuple(control.hint.shape[:1:-1])) != size:
        raise SettingsError(f"the hint is {found[0]}x{found[1]} pixels, but the image {size[0]}x{size[1]}; resize "
                            "the hint")
    check_batch("hint", control.hint, batch)
    return control


def check_batch(what: str, given: Tensor | None, batch: int):
    if given is not None and len(given) not in (1, batch):
        raise SettingsError(f"there are {len(given)} {what}s for a batch of {batch}; give one for all, or one for each")
