"""Images from images: img2img, inpainting and ControlNet, the same as diffusers'; and what cannot be."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from models import EPSILON, one_thread, randomise, tiny_parts  # noqa: F401
from PIL import Image

from sdlearn.checkpoint import load_folder, save_folder
from sdlearn.checkpoint.control import save_controlnet
from sdlearn.controlnet import Control, ControlNet
from sdlearn.images import to_tensor
from sdlearn.pipeline import SHIPPED, SettingsError, StableDiffusion, make_control, shipped
from sdlearn.schedule import ALMOST_ZERO, NoiseSchedule
from sdlearn.unet import UNet

PROMPT, NEGATIVE = "a red apple to the left of a cat", "two cars"
SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}
WIDTH, HEIGHT = 24, 32                  # of the tiny model's images


def widened(unet: UNet) -> UNet:
    """The U-Net with nine channels: five more, random, beside the four that it has."""
    config = replace(unet.config, in_channels=9)
    nine = UNet(config)
    state = unet.state_dict()
    more = torch.randn(len(state["conv_in.weight"]), 5, 3, 3, generator=torch.Generator().manual_seed(1)) / 6
    nine.load_state_dict({**state, "conv_in.weight": torch.cat([state["conv_in.weight"], more], dim=1)})
    return nine.eval()


class World:
    """A model, its nine-channel sister and a ControlNet, here and as folders for diffusers."""

    def __init__(self, parts, folder, side):
        self.parts, self.folder, self.side = parts, folder, side
        self.net = ControlNet.from_unet(parts.unet, hint_widths=(4, 8) if parts.config.vae.factor == 2
                                        else (8, 16, 16, 32)).eval()
        self.net.requires_grad_(False)
        for module in (self.net.controlnet_cond_embedding, self.net.controlnet_down_blocks,
                       self.net.controlnet_mid_block):
            randomise(module, torch.Generator().manual_seed(2))
        nine = widened(parts.unet)
        self.nine = replace(parts, unet=nine, config=replace(parts.config, unet=nine.config), clip=None)
        self.nine.config = replace(self.nine.config, vision=None)
        save_folder(folder / "plain", parts)
        save_folder(folder / "nine", self.nine)
        save_controlnet(folder / "net", self.net)

    def pipe(self, kind, name="plain", sampler="ddim", **parts):
        pipe = kind.from_pretrained(self.folder / name, safety_checker=None, **parts)
        pipe.set_progress_bar_config(disable=True)
        theirs, _ = self.spacing(sampler)
        pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config, timestep_spacing=theirs)
        return pipe

    def model(self, name="plain", sampler="ddim") -> StableDiffusion:
        model = StableDiffusion(self.parts if name == "plain" else self.nine)
        if sampler != "ddim":       # diffusers' Euler and DPM++ put a small abar in place of the last one, if it is 0
            model.schedule = NoiseSchedule(model.config.noise, floor=ALMOST_ZERO)
        return model

    def spacing(self, sampler):
        if self.parts.config.noise.zero_terminal_snr:
            return "trailing", "trailing"
        return ("linspace", "linspace_open") if sampler == "dpmpp_2m" else ("leading", "leading")

    def settings(self, sampler):
        return {"num_inference_steps": 5, "guidance_scale": 4.0, "seed": 7, "sampler": sampler,
                "timestep_spacing": self.spacing(sampler)[1]}

    def image(self, seed=0, mode="RGB"):
        """Something smooth with an edge in it."""
        width, height = (WIDTH, HEIGHT) if self.side == 32 else (self.side, self.side)
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width] / max(width, height)
        planes = [np.sin(rng.uniform(3, 9) * x + rng.uniform(3, 9) * y) > 0.2 for _ in mode if mode == "RGB"]
        array = np.stack(planes, axis=-1) if mode == "RGB" else (x + y > 0.6)
        return Image.fromarray((array * 255).astype(np.uint8))

    def mask(self):
        image = self.image()
        mask = Image.new("L", image.size, 0)
        mask.paste(255, (image.width // 4, image.height // 4, image.width, 3 * image.height // 4))
        return mask


needs_weights = pytest.mark.skipif("mini" not in shipped(), reason="this checkout has no weights")


@pytest.fixture(scope="module", params=["tiny", pytest.param("mini", marks=needs_weights)])
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiny":
        return World(tiny_parts(EPSILON, vision=False), folder, 32)
    parts = load_folder(SHIPPED / "mini")
    return World(replace(parts, clip=None, config=replace(parts.config, vision=None)), folder, parts.config.image_size)


def seeds(count=1, first=7):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def assert_equal(ours, theirs):
    ours = np.stack([np.asarray(image) for image in ours]) / 255
    assert theirs.std() > 0.05                                      # an image, not grey
    # Half a shade is from rounding to bytes; sampling with strong guidance magnifies the last bits of float32 at edges.
    assert np.abs(ours - theirs).max() < 3 / 255 and np.abs(ours - theirs).mean() < 0.4 / 255


# --- the same as diffusers --------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_img2img_equals_diffusers(world, sampler):
    image = world.image()
    theirs = world.pipe(StableDiffusionImg2ImgPipeline, sampler=sampler)(
        [PROMPT] * 2, image=[image] * 2, strength=0.6, num_inference_steps=5, guidance_scale=4.0,
        negative_prompt=[NEGATIVE] * 2, generator=seeds(2), output_type="np").images
    ours = world.model(sampler=sampler).img2img(PROMPT, image, NEGATIVE, strength=0.6, batch=2,
                                                **world.settings(sampler))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_nine_channel_inpainting_equals_diffusers(world, sampler, strength):
    image, mask = world.image(), world.mask()
    theirs = world.pipe(StableDiffusionInpaintPipeline, "nine", sampler)(
        PROMPT, image=image, mask_image=mask, strength=strength, num_inference_steps=5, guidance_scale=4.0,
        negative_prompt=NEGATIVE, width=image.width, height=image.height, generator=seeds(), output_type="np").images
    ours = world.model("nine", sampler).inpaint(PROMPT, image, mask, NEGATIVE, strength=strength,
                                                **world.settings(sampler))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_blended_inpainting_equals_diffusers(world, sampler):
    """Below full strength: at full strength diffusers' first step sees noise alone in the known part, too."""
    image, mask = world.image(), world.mask()
    theirs = world.pipe(StableDiffusionInpaintPipeline, sampler=sampler)(
        PROMPT, image=image, mask_image=mask, strength=0.8, num_inference_steps=5, guidance_scale=4.0,
        width=image.width, height=image.height, generator=seeds(), output_type="np").images
    ours = world.model(sampler=sampler).inpaint(PROMPT, image, mask, strength=0.8, **world.settings(sampler))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"conditioning_scale": 0.5, "end": 0.6}, {"guess_mode": True}],
                         ids=["plain", "half, early", "guess"])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_control_equals_diffusers(world, sampler, options):
    hint = world.image(3)
    pipe = world.pipe(StableDiffusionControlNetPipeline, sampler=sampler,
                      controlnet=ControlNetModel.from_pretrained(world.folder / "net"))
    noise = torch.randn(1, 4, *(side // world.parts.config.vae.factor for side in hint.size[::-1]),
                        generator=torch.Generator().manual_seed(3))
    theirs = pipe(PROMPT, image=hint, num_inference_steps=5, guidance_scale=4.0, negative_prompt=NEGATIVE,
                  latents=noise, controlnet_conditioning_scale=options.get("conditioning_scale", 1.0),
                  guess_mode=options.get("guess_mode", False), control_guidance_end=options.get("end", 1.0),
                  output_type="np").images
    model = world.model(sampler=sampler)
    given = {"latent": noise, "size": hint.size, **world.settings(sampler)}
    ours = model.control(PROMPT, world.net, hint, NEGATIVE, **options, **given)
    assert_equal(ours, theirs)
    without = model.text2img(PROMPT, NEGATIVE, **given)
    assert np.abs(np.asarray(without[0], int) - np.asarray(ours[0], int)).max() > 8       # it does something


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_two_controls_add_up_as_in_diffusers(world, sampler):
    hints = [world.image(3), world.image(4)]
    nets = [ControlNetModel.from_pretrained(world.folder / "net") for _ in hints]
    pipe = world.pipe(StableDiffusionControlNetPipeline, sampler=sampler, controlnet=nets)
    theirs = pipe(PROMPT, image=hints, num_inference_steps=5, guidance_scale=4.0, generator=seeds(),
                  controlnet_conditioning_scale=[0.7, 0.4], output_type="np").images
    controls = [make_control(world.net, hint, conditioning_scale=s) for hint, s in zip(hints, (0.7, 0.4), strict=True)]
    ours = world.model(sampler=sampler).text2img(PROMPT, controls=controls, **world.settings(sampler))
    assert_equal(ours, theirs)


# --- what follows from the definitions --------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return World(tiny_parts(EPSILON, vision=False), tmp_path_factory.mktemp("tiny"), 32)


def arrays(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_little_strength_changes_little(tiny):
    image, model = tiny.image(), tiny.model()
    with torch.no_grad():
        known = model.vae.to_latent(to_tensor([np.asarray(image)]), torch.Generator().manual_seed(0))
    [through] = model.decode(known)
    little, much = (np.abs(arrays(model.img2img(PROMPT, image, strength=strength,
                                                num_inference_steps=50)) - arrays([through])).mean()
                    for strength in (0.02, 0.5))
    assert little < 0.5 * much


def test_an_image_is_one_for_all_or_one_for_each(tiny):
    model, images = tiny.model(), [tiny.image(0), tiny.image(1)]
    both = arrays(model.img2img(PROMPT, images, batch=2, num_inference_steps=3))
    alone = [arrays(model.img2img(PROMPT, image, seed=i, num_inference_steps=3))[0] for i, image in enumerate(images)]
    assert np.abs(both - alone).max() <= 1
    with pytest.raises(SettingsError, match="2 images for a batch of 3"):
        model.img2img(PROMPT, images, batch=3)


@pytest.mark.parametrize("kind", ["image", "bytes", "tensor"])
def test_an_image_may_be_an_image_bytes_or_a_tensor(tiny, kind):
    image, model = tiny.image(), tiny.model()
    array = np.asarray(image)
    given = {"image": image, "bytes": array,
             "tensor": to_tensor([array])}[kind]
    assert np.array_equal(arrays(model.img2img(PROMPT, given, num_inference_steps=3)),
                          arrays(model.img2img(PROMPT, image, num_inference_steps=3)))


@pytest.mark.parametrize("kind", ["bool", "list of bool", "bool tensor", "uint8", "1-bit image", "float tensor"])
def test_masks_of_every_kind_mark_the_same_pixels(tiny, kind):
    white = np.asarray(tiny.mask()) > 127
    mask = {"bool": white, "list of bool": [white], "bool tensor": torch.from_numpy(white)[None, None],
            "uint8": np.where(white, 255, 0).astype(np.uint8), "1-bit image": tiny.mask().convert("1"),
            "float tensor": torch.from_numpy(white)[None, None].float()}[kind]
    model, image = tiny.model(), tiny.image()
    found, wanted = (arrays(model.inpaint(PROMPT, image, one, num_inference_steps=2)) for one in (mask, tiny.mask()))
    assert np.array_equal(found, wanted)


def test_booleans_are_black_and_white(tiny):
    """In a mask among others of bytes, in a condition image, and in an image to start from."""
    model, white, image = tiny.model(), np.asarray(tiny.mask()) > 127, tiny.image()
    masks = [white, np.asarray(tiny.mask())]
    found, wanted = (arrays(model.inpaint(PROMPT, image, given, num_inference_steps=2, batch=2))
                     for given in (masks, tiny.mask()))
    assert np.array_equal(found, wanted)
    found, wanted = (arrays(model.control(PROMPT, tiny.net, hint, num_inference_steps=2))
                     for hint in (white, tiny.mask()))
    assert np.array_equal(found, wanted)
    found, wanted = (arrays(model.img2img(PROMPT, start, num_inference_steps=2)) for start in (white, tiny.mask()))
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("steps, strength", [(5, 0.75), (7, 0.5), (10, 0.29), (10, 0.7), (3, 0.99), (4, 1.0)])
def test_a_strength_runs_the_steps_that_diffusers_runs(tiny, steps, strength):
    """The last of them, and their number rounded down."""
    pipe = SimpleNamespace(scheduler=DDIMScheduler(timestep_spacing="leading", steps_offset=1))
    pipe.scheduler.set_timesteps(steps)
    wanted, _ = StableDiffusionImg2ImgPipeline.get_timesteps(pipe, steps, strength, "cpu")
    found = list(tiny.model().iter_steps(PROMPT, image=tiny.image(), num_inference_steps=steps, strength=strength,
                                         sampler="ddim",
                                    timestep_spacing="leading", guidance_scale=1.0))
    assert [step.t for step in found] == wanted.tolist()
    assert {step.of for step in found} == {len(wanted)}


def test_default_strengths_are_those_of_the_tasks(tiny):
    """0.8 of the noise for an image, all of it for the white part of a mask, and all of it for bare steps."""
    model, image, mask = tiny.model(), tiny.image(), tiny.mask()
    for call, default, other in (
            (lambda **given: model.img2img(PROMPT, image, num_inference_steps=5, **given), 0.8, 1.0),
            (lambda **given: model.inpaint(PROMPT, image, mask, num_inference_steps=5, **given), 1.0, 0.8),
            (lambda **given: list(model.iter_steps(PROMPT, image=image, num_inference_steps=5,
                                                   **given))[-1].noisy_images(), 1.0, 0.8)):
        found = arrays(call())
        assert np.array_equal(found, arrays(call(strength=default)))
        assert not np.array_equal(found, arrays(call(strength=other)))


@pytest.mark.parametrize("low, high, kind", [(-1.0, 1.0, "image"), (0.0, 1.0, "hint")])
def test_tensors_within_the_range_of_pixels_are_taken_and_others_refused(tiny, low, high, kind):
    """Pixels of an image are in [-1, 1], those of a condition image in [0, 1]; NaN is in neither."""
    model, values = tiny.model(), torch.linspace(low, high, 3 * HEIGHT * WIDTH).reshape(1, 3, HEIGHT, WIDTH)

    def start(pixels):
        if kind == "hint":
            return model.iter_steps(PROMPT, num_inference_steps=1, controls=make_control(tiny.net, pixels))
        return model.iter_steps(PROMPT, num_inference_steps=1, image=pixels)

    start(values)
    for wrong in (low - 0.01, high + 0.01, float("nan"), float("inf"), float("-inf")):
        spoiled = values.clone()
        spoiled[0, 0, 0, 0] = wrong
        with pytest.raises(SettingsError, match=f"{kind} has values outside"):
            start(spoiled)


@pytest.mark.parametrize("name, resample", [("nine", 1), ("plain", 1), ("plain", 3)], ids=["nine", "blend", "resample"])
def test_inpainting_by_either_way_makes_the_masked_part_anew(tiny, name, resample):
    image, model = tiny.image(), tiny.model(name)
    first, second = (arrays(model.inpaint(PROMPT, image, tiny.mask(), num_inference_steps=4, seed=seed,
                                          resample=resample))
                     for seed in (1, 2))
    inside = np.asarray(tiny.mask()) > 127
    assert np.abs(first - second)[0][inside].mean() > 3


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler_ancestral", "heun", "pndm", "unipc"])
@pytest.mark.parametrize("resample", [1, 2])
def test_blending_ends_at_the_image_s_own_latent_outside_of_the_mask(tiny, sampler, resample):
    model, image = tiny.model(), tiny.image()
    *_, step = model.iter_steps(PROMPT, image=image, mask=tiny.mask(), num_inference_steps=4, sampler=sampler,
                                resample=resample)
    outside = np.asarray(tiny.mask())[::2, ::2] < 127
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        known = model.vae.to_latent(to_tensor([np.asarray(image)]), generator)
    assert torch.equal(step.latent[0, :, outside], known[0, :, outside])
    assert not torch.allclose(step.latent[0, :, ~outside], known[0, :, ~outside], atol=0.1)


def test_a_fresh_controlnet_changes_no_bit_of_the_image(tiny):
    model = tiny.model()
    fresh = ControlNet.from_unet(model.unet, hint_widths=(4, 8)).requires_grad_(False)
    plain = list(model.iter_steps(PROMPT, num_inference_steps=3, size=(WIDTH, HEIGHT)))
    controls = make_control(fresh, tiny.image(3))
    for ours, theirs in zip(model.iter_steps(PROMPT, num_inference_steps=3, controls=controls), plain, strict=True):
        assert torch.equal(ours.latent, theirs.latent)


def test_control_goes_with_an_image_and_with_a_mask(tiny):
    control = make_control(tiny.net, tiny.image(3), conditioning_scale=0.5)
    cases = (("plain", {"strength": 0.5}), ("plain", {"mask": tiny.mask()}), ("nine", {"mask": tiny.mask()}))
    for name, given in cases:
        model = tiny.model(name)
        plain, followed = (arrays(list(model.iter_steps(PROMPT, image=tiny.image(), num_inference_steps=4, controls=c,
                                                        **given))[-1]
                                  .noisy_images()) for c in ((), control))
        assert np.abs(plain - followed).max() > 8, given


# --- what cannot be ---------------------------------------------------------------------------------

def other_version(tiny) -> ControlNet:
    return ControlNet.from_unet(UNet(replace(tiny.parts.config.unet, context_dim=24)), hint_widths=(4, 8))


@pytest.mark.parametrize("name, given, told", [
    ("nine", {}, "is an inpainting model.*reads a mask.*call inpaint"),
    ("nine", {"image": "image"}, "is an inpainting model"),
    ("plain", {"mask": "mask"}, "a mask but no image"),
    ("plain", {"image": "image", "mask": Image.new("L", (32, 32), 255)}, "mask is 32x32 pixels, but the image 24x32"),
    ("plain", {"image": "image", "mask": Image.new("L", (24, 32), 100)}, "mask is not binary"),
    ("plain", {"image": "image", "mask": Image.new("L", (24, 32), 0)}, "mask is 0 everywhere"),
    ("plain", {"image": "image", "strength": 0}, "strength is 0; give a number above 0"),
    ("plain", {"image": "image", "strength": 1.5}, "strength is 1.5"),
    ("plain", {"image": "image", "strength": float("nan")}, "strength is nan"),
    ("plain", {"image": "image", "strength": 0.1, "num_inference_steps": 5},
     "strength 0.1 of 5 steps is less than one"),
    ("plain", {"strength": 0.5}, "no image to start from"),
    ("plain", {"resample": 5}, "resampling belongs to inpainting"),
    ("plain", {"image": "image", "mask": "mask", "resample": 0}, "resample is 0"),
    ("plain", {"image": "image", "size": 32}, "image is 24x32, but size is 32x32"),
    ("plain", {"image": Image.new("RGB", (25, 32))}, "25x32 is not a multiple of 2"),
    ("plain", {"image": np.zeros((32, 24, 3))}, "image is float64"),
    ("plain", {"image": torch.full((1, 3, 32, 24), 255.0)}, r"outside of \[-1, 1\]"),
    ("plain", {"image": torch.zeros(1, 4, 16, 12)}, "give floating-point numbers"),
    ("plain", {"image": "image", "latent": torch.zeros(1, 4, 16, 16)}, r"latent is \(1, 4, 16, 16\)"),
    ("plain", {"controls": "hint of another size"}, "hint is 32x32 pixels, but the image 24x32"),
    ("plain", {"controls": "another version"}, "24 wide.*16 wide"),
    ("plain", {"controls": ["no control"]}, "controls holds a str"),
    ("plain", {"long_prompts": "fold"}, "long_prompts is 'fold'"),
    ("plain", {"guidance_interval": (500, 100)}, r"interval is \(500, 100\)"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_is_told_before_anything_is_computed(tiny, monkeypatch, name, given, told):
    model = tiny.model(name)
    monkeypatch.setattr(model.text_encoder, "forward", lambda *_: pytest.fail("computed"))
    swap = {"image": tiny.image(), "mask": tiny.mask()}
    given = {key: swap.get(value, value) if isinstance(value, str) else value for key, value in given.items()}
    if given.get("controls") == "hint of another size":
        given = {"controls": make_control(tiny.net, Image.new("RGB", (32, 32))), "size": (24, 32)}
    elif given.get("controls") == "another version":
        given = {"controls": make_control(other_version(tiny), tiny.image()), "size": (24, 32)}
    with pytest.raises(SettingsError, match=told) as caught:
        model.iter_steps(PROMPT, **given)
    assert "\n" not in str(caught.value)


def test_a_control_that_cannot_be_is_told(tiny):
    cases = (({"conditioning_scale": float("inf")}, "is inf"), ({"start": 0.6, "end": 0.5}, "starts at 0.6"))
    for wrong, message in cases:
        with pytest.raises(SettingsError, match=message):
            make_control(tiny.net, tiny.image(), **wrong)
    assert isinstance(make_control(tiny.net, tiny.image()), Control)
