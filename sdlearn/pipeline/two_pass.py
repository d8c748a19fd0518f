"""An image larger than those of training, in two passes: its composition at the usual size, its details at the full.

The remedy that user interfaces call high-resolution fix. The second pass is SDEdit's (Meng et al. 2022).
"""

from typing import TYPE_CHECKING

from PIL import Image

from ..sizes import fit_size, size_multiple

if TYPE_CHECKING:
    from .model import StableDiffusion


def two_pass(model: "StableDiffusion", prompt: str, size: int | tuple[int, int], negative_prompt: str = "", *,
             strength: float = 0.5, **settings) -> list[Image.Image]:
    """Images of `size`, a side or (width, height): drawn at the model's own size, enlarged, then partly drawn anew.

    The first pass has the shape of `size` and the area of the model's own images, in sides that halve evenly at every
    level of the U-Net. strength: the share of the steps that the second pass runs, as in `img2img`; near 1 it forgets
    the first. settings: `Settings`, for both passes. A size no larger than the model's own is drawn in one pass.
    Errors as in `text2img`.
    """
    width, height = model.size(size)
    own = model.config.image_size
    if width * height <= own * own:
        return model.text2img(prompt, negative_prompt, size=(width, height), **settings)
    first = model.text2img(prompt, negative_prompt, size=fit_size((width, height), own, size_multiple(model.config)),
                           **settings)
    enlarged = [image.resize((width, height), Image.Resampling.BICUBIC) for image in first]
    return model.img2img(prompt, enlarged, negative_prompt, strength=strength, **settings)
