"""Exercises of notebook 10: an image in two passes, decoding in tiles."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ... import tiles
from ...config import PRESETS
from ...pipeline.two_pass import two_pass as package_two_pass
from ...sizes import fit_size, size_multiple
from ..testing import randn, require, require_shape
from . import lesson

# --- 10.4 ---------------------------------------------------------------------------------------------

two_pass = lesson.exercise(
    4, package_two_pass, grade="supported", minutes=10,
    asks="Write `two_pass(model, prompt, size, negative_prompt=\"\", *, strength=0.5, **settings)`: draw at the "
         "model's own area in the shape of `size`, enlarge, and let `model.img2img` do the rest. Sizes of no more than "
         "the model's own area take one pass.",
    hints=["`size` may be one number, for a square: `model.size(size)` gives (width, height). "
           "`model.config.image_size` is the model's own side.",
           "`fit_size((width, height), side, size_multiple(model.config))` is the size of the first pass: pass it on "
           "as `size=...`, with all of `settings`.",
           "`image.resize((width, height), Image.Resampling.BICUBIC)` for each image of the list. `img2img` takes "
           "the whole list, the negative prompt, `strength` and, again, `settings`; the size is the images'."])


class Recorder:
    """In the place of a model: notes what it is asked for, and draws waves that depend on the seed."""

    def __init__(self, preset: str = "mini"):
        self.config, self.calls = PRESETS[preset], []

    def size(self, size) -> tuple[int, int]:
        size = self.config.image_size if size is None else size
        return tuple(size) if isinstance(size, (tuple, list)) else (size, size)

    def text2img(self, prompt, negative_prompt="", *, size=None, **settings):
        width, height = self.size(size)
        self.calls.append({"text2img": prompt, "not": negative_prompt, "width": width, "height": height, **settings})
        waves = np.sin(np.arange(width) / 2)[None] + np.sin(np.arange(height) / 2)[:, None]
        return [Image.fromarray((110 + 50 * waves + 2 * settings.get("seed", 0) + i).astype(np.uint8)[..., None].repeat(
            3, axis=2)) for i in range(settings.get("batch", 1))]

    def img2img(self, prompt, image, negative_prompt="", *, strength=0.8, size=None, **settings):
        images = image if isinstance(image, (list, tuple)) else [image]
        width, height = images[0].size
        require(size is None or self.size(size) == (width, height), f"The images are {width}x{height}, but img2img is "
                                                                    f"asked for {size}")
        self.calls.append({"img2img": prompt, "not": negative_prompt, "width": width, "height": height,
                           "strength": strength, "images": len(images), **settings})
        return [Image.fromarray(255 - np.asarray(one)) for one in images]


def calls_of(answer: Callable, size, *given, preset: str = "mini", **settings) -> list[str]:
    """The calls as text, so that a difference names its argument."""
    model = Recorder(preset)
    answer(model, "a star", size, *given, **settings)
    return [", ".join(f"{name} {value}" for name, value in call.items()) for call in model.calls]


def pixels(answer: Callable, size, **settings) -> Tensor:
    found = answer(Recorder(), "a star", size, **settings)
    return torch.from_numpy(np.stack([np.asarray(one) for one in found])).float()


@two_pass.test("shape")
def images_of_the_size(two_pass):
    found = two_pass(Recorder(), "a star", (256, 128))
    require(isinstance(found, list) and found and hasattr(found[0], "size"), "It must return a list of images")
    require(found[0].size == (256, 128), f"The images are {found[0].size[0]}x{found[0].size[1]} where they must be "
                                         "256x128")


@two_pass.test("value")
def two_network_calls(two_pass):
    two_pass.agrees(lambda answer: calls_of(answer, 256, "a cat", strength=0.6, num_inference_steps=8, seed=3),
                    what="For 256x256, what the model is asked for")


@two_pass.test("value")
def in_the_shape(two_pass):
    two_pass.agrees(lambda answer: calls_of(answer, (256, 128), num_inference_steps=8),
                    what="For 256x128, what the model is asked for")


@two_pass.test("value")
def the_images_themselves(two_pass):
    two_pass.agrees(lambda answer: pixels(answer, (256, 192), seed=1), tol=0.05, what="The image")


@two_pass.test("edge case")
def several_images(two_pass):
    two_pass.agrees(lambda answer: calls_of(answer, 192, batch=3), what="For three images, what the model is asked for")


@two_pass.test("edge case")
def small_and_other_models(two_pass):
    two_pass.agrees(lambda answer: calls_of(answer, (64, 128), num_inference_steps=8),
                    what="For 64x128, what the model is asked for")
    two_pass.agrees(lambda answer: calls_of(answer, (256, 64), num_inference_steps=8),
                    what="For 256x64, what the model is asked for")
    two_pass.agrees(lambda answer: calls_of(answer, (1024, 768), preset="sd15"),
                    what="For a model of 512 and 1024x768, what it is asked for")


def passes(first: Callable = lambda size, own, step: fit_size(size, own, step), filters=Image.Resampling.BICUBIC,
           large: Callable = lambda images, size: images, passed: Callable = lambda settings: settings,
           negative: Callable = lambda text: text, small: Callable = lambda w, h, own: w * h <= own * own,
           second: Callable = lambda strength: {"strength": strength},
           one: Callable = lambda w, h, own: (w, h)) -> Callable:
    def answer(model, prompt, size, negative_prompt="", *, strength=0.5, **settings):
        (width, height), own = model.size(size), model.config.image_size
        if small(width, height, own):
            return model.text2img(prompt, negative_prompt, size=one(width, height, own), **settings)
        images = model.text2img(prompt, negative_prompt, size=first((width, height), own, size_multiple(model.config)),
                                **settings)
        images = [image.resize((width, height), filters) for image in images]
        return model.img2img(prompt, large(images, (width, height)), negative(negative_prompt), **second(strength),
                             **passed(settings))
    return answer


for diagnosis, parts in [
    ("the first pass has the full size already, where things are drawn twice", {"first": lambda size, own, step: size}),
    ("the first pass is a square, whatever the shape: squeezing it into shape distorts it",
     {"first": lambda size, own, step: (own, own)}),
    ("the first pass has width and height exchanged",
     {"first": lambda size, own, step: fit_size(size[::-1], own, step)}),
    ("the first pass has half of the sides: it must have the area of the model's own images",
     {"first": lambda size, own, step: (size[0] // 2, size[1] // 2)}),
    ("`strength` is not passed on, so img2img takes its own", {"second": lambda strength: {}}),
    ("strength is the share that is run: this passes on 1 - strength",
     {"second": lambda strength: {"strength": 1 - strength}}),
    ("the second pass does not get `settings`: seed and steps belong to it as well", {"passed": lambda settings: {}}),
    ("the second pass does not get the negative prompt", {"negative": lambda text: ""}),
    ("only the first image is enlarged and passed on", {"large": lambda images, size: images[:1]}),
    ("compare areas: width * height with the square of the model's own side",
     {"small": lambda w, h, own: max(w, h) <= own}),
    ("a picture of no more than the model's own area needs no second pass", {"small": lambda w, h, own: False}),
    ("a small image is drawn at its own size, not at the model's",
     {"one": lambda w, h, own: (own, own)}),
    ("enlarged with NEAREST each pixel becomes a square, whose edges the second pass keeps: interpolate",
     {"filters": Image.Resampling.NEAREST}),
]:
    two_pass.mistake(diagnosis)(passes(**parts))


@two_pass.mistake("`size` may be one number, for a square: `model.size(size)` gives (width, height)")
def unpacked(model, prompt, size, negative_prompt="", *, strength=0.5, **settings):
    width, height = size
    return package_two_pass(model, prompt, (width, height), negative_prompt, strength=strength, **settings)


@two_pass.mistake("there is no second pass: the enlarged image is returned")
def enlarged_alone(model, prompt, size, negative_prompt="", *, strength=0.5, **settings):
    width, height = model.size(size)
    own = model.config.image_size
    if width * height <= own * own:
        return model.text2img(prompt, negative_prompt, size=(width, height), **settings)
    images = model.text2img(prompt, negative_prompt, size=fit_size((width, height), own, size_multiple(model.config)),
                            **settings)
    return [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]


# --- 10.6 ---------------------------------------------------------------------------------------------

decode_tiled = lesson.exercise(
    6, tiles.decode_tiled, grade="on your own", minutes=20, also=[tiles.tile_starts, tiles.tile_weights],
    asks="Write `decode_tiled(decode, latent, *, factor, tile=64, overlap=16)`: call `decode` on pieces of at most "
         "`tile` x `tile` cells, and put the pixels together. Neighbours share `overlap` cells, in which one fades "
         "into the other.",
    hints=["Two sums as large as the image: of pixels times weights, and of weights. In the end divide one by the "
           "other; then weights need not add up to 1.",
           "`tile_starts(length, tile, overlap)` says where tiles begin along an axis, in cells. A tile's pixels go to "
           "`top * factor` and on.",
           "`tile_weights(length, overlap * factor, first=..., last=...)` gives the weights along one axis, in pixels; "
           "the tile's weights are `down[:, None] * across`. `first` is `left == 0`, `last` is "
           "`left + tile >= columns`.",
           "`decode` may return fewer pixels than tile * factor, where the latent is smaller than a tile: take rows "
           "and columns from what it returns."])


def local(latent: Tensor) -> Tensor:
    """A decoder that knows no neighbours, of factor 2: each cell becomes a square."""
    return latent[:, :3].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def levelled(latent: Tensor) -> Tensor:
    """A decoder of factor 8 that gives a whole tile the mean of its latent, as a norm over the tile might."""
    mean = latent[:, :3].mean(dim=(2, 3), keepdim=True)                              # (B, 3, 1, 1)
    return mean.expand(-1, -1, 8 * latent.shape[2], 8 * latent.shape[3])


LATENT = randn(2, 4, 11, 18)
SLOPE = torch.linspace(0, 1, 18).expand(1, 4, 8, 18).contiguous()


@decode_tiled.test("shape")
def an_image(decode_tiled):
    require_shape(decode_tiled(local, LATENT, factor=2, tile=8, overlap=2), (2, 3, 22, 36))


@decode_tiled.test("value")
def tiles_of_the_size(decode_tiled):
    seen = []

    def watched(latent):
        seen.append(tuple(latent.shape[2:]))
        return local(latent)
    decode_tiled(watched, LATENT, factor=2, tile=8, overlap=2)
    require(max(max(one) for one in seen) <= 8, f"decode is given {max(seen)} cells at once, where tiles of 8 were "
                                                "asked for")
    require(len(seen) > 1, "decode is called once: the latent was not cut")


@decode_tiled.test("value")
def everything_in_its_place(decode_tiled):
    decode_tiled.agrees(lambda answer: answer(local, LATENT, factor=2, tile=8, overlap=2),
                        what="With a decoder of each cell alone, the image")


@decode_tiled.test("value")
def overlapping_tiles_are_blended(decode_tiled):
    """Any weights will do that are gentle: a straight line jumps by 1 / 32 of the difference from pixel to pixel."""
    found = decode_tiled(levelled, SLOPE, factor=8, tile=8, overlap=4)[0, 0, 0]
    require(bool(found.isfinite().all()), "The image has values that are not finite: is something divided by a sum "
                                          "of weights that is 0?")
    whole = float(found[-1] - found[0])
    require(whole > 0.3, "With a decoder that gives each tile its mean, left and right end must differ")
    jump = float(found.diff().abs().max())
    require(jump < 0.035, f"At a border of tiles the image jumps by {jump:.2f} from one pixel to the next, of "
                         f"{whole:.2f} from its left to its right end: over the {4 * 8} pixels that two tiles share, "
                         "one has to fade out while the other fades in")


@decode_tiled.test("edge case")
def what_fits_at_once(decode_tiled):
    decode_tiled.agrees(lambda answer: answer(local, LATENT[:, :, :5, :7], factor=2, tile=8, overlap=2),
                        what="Of a latent smaller than a tile, the image")


@decode_tiled.test("edge case")
def without_overlap(decode_tiled):
    decode_tiled.agrees(lambda answer: answer(local, LATENT, factor=2, tile=4, overlap=0),
                        what="Without overlap, the image")


def faded(length: int, overlap: int) -> Tensor:
    """Weights from 0 to 1 and back to 0, on both sides of every tile."""
    weights = torch.ones(length)
    if overlap:
        weights[:overlap] = torch.linspace(0, 1, overlap)
        weights[-overlap:] = torch.minimum(weights[-overlap:], torch.linspace(1, 0, overlap))
    return weights


def tiling(starts: Callable = tiles.tile_starts, scale: bool = True, divided: bool = True,
           fade: Callable = tiles.tile_weights, whole: bool = False) -> Callable:
    def answer(decode, latent, *, factor, tile=64, overlap=16):
        batch, _, rows, columns = latent.shape
        total = torch.zeros(batch, 3, rows * factor, columns * factor)
        weight = torch.zeros(rows * factor, columns * factor)
        for top in starts(rows, tile, overlap):
            for left in starts(columns, tile, overlap):
                part = decode(latent[:, :, top:top + tile, left:left + tile])
                height, width = (tile * factor, tile * factor) if whole else part.shape[2:]
                share = (fade(height, overlap * factor, first=top == 0, last=top + tile >= rows)[:, None]
                         * fade(width, overlap * factor, first=left == 0, last=left + tile >= columns))
                y, x = (one * (factor if scale else 1) for one in (top, left))
                total[:, :, y:y + height, x:x + width] += part * share
                weight[y:y + height, x:x + width] += share
        return total / weight if divided else total
    return answer


for diagnosis, parts in [
    ("tiles overlap, but their sum is not divided by the sum of their weights",
     {"divided": False, "fade": lambda length, overlap, first, last: torch.ones(length)}),
    ("two tiles that share more than `overlap`, as the last two may, have weights of more than 1 together: divide by "
     "the sum of weights", {"divided": False}),
    ("tiles begin at cells, but pixels are `factor` times as many: multiply", {"scale": False}),
    ("the last rows and columns are missing: the last tile has to end where the latent does",
     {"starts": lambda length, tile, overlap: list(range(0, max(1, length - tile + 1), tile - overlap))}),
    ("the latent may be smaller than a tile: take rows and columns from what `decode` returns", {"whole": True}),
    ("at the image's own border no other tile adds to a weight that falls to 0: there a tile counts whole",
     {"fade": lambda length, overlap, first, last: faded(length, overlap)}),
]:
    decode_tiled.mistake(diagnosis)(tiling(**parts))
