"""A prompt to images: the same as diffusers', image by image as from its seed, and told when it cannot be."""

import inspect
import os
import shutil
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EPSILON, WORLD, ZERO_SNR, one_thread, tiny_parts  # noqa: F401
from PIL import Image

from sdlearn.checkpoint import CheckpointError, load_folder, save_folder
from sdlearn.checkpoint import shipped as shipped_room
from sdlearn.config import PRESETS, SamplingConfig
from sdlearn.controlnet import ControlNet
from sdlearn.finetune import new_lora
from sdlearn.guidance import predict_x0
from sdlearn.pipeline import (
    SHIPPED,
    LongPromptWarning,
    NotFinite,
    Settings,
    SettingsError,
    StableDiffusion,
    UnknownWordWarning,
    shipped,
    unknown_words,
)
from sdlearn.pipeline.compiled import FEW_ROWS, CompiledUNet, LinearByOneDNN
from sdlearn.samplers import SAMPLERS, make_timesteps_for
from sdlearn.schedule import ALMOST_ZERO, NoiseSchedule

PROMPT = "a red apple to the left of a cat"
LONG = "a red apple " * 150 + "above a blue tree"


def make(noise=EPSILON) -> StableDiffusion:
    return StableDiffusion(tiny_parts(noise))


@pytest.fixture(scope="module")
def model():
    return make()


def arrays(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


# --- the same as diffusers --------------------------------------------------------------------------

@pytest.fixture(scope="module", ids=["epsilon", "v, zero SNR, float16 files"],
                params=[(EPSILON, torch.float32), (ZERO_SNR, torch.float16)])
def both(request, tmp_path_factory):
    """The same folder, opened here and in diffusers; both compute in float32, whatever the files are."""
    noise, dtype = request.param
    return opened(save_folder(tmp_path_factory.mktemp("models") / "tiny", tiny_parts(noise), dtype=dtype))


def opened(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return StableDiffusion.load(folder, device="cpu"), pipe, pipe.scheduler


SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}


def spacing(sampler: str, noise) -> tuple[str, str]:
    """A grid on which both begin at noise of variance 1: its name in diffusers, and here."""
    if noise.zero_terminal_snr:
        return "trailing", "trailing"
    return ("linspace", "linspace_open") if sampler == "dpmpp_2m" else ("leading", "leading")


# 5 and 8 divide 1000: with other numbers diffusers' DDIM steps from a trailing grid to timesteps off it.
@pytest.mark.parametrize("sampler, steps", [("ddim", 5), ("ddim", 8), ("euler", 8), ("dpmpp_2m", 8)])
def test_images_equal_those_of_diffusers(both, sampler, steps):
    model, pipe, scheduler = both
    theirs, ours = spacing(sampler, model.config.noise)
    pipe.scheduler = SCHEDULERS[sampler].from_config(scheduler.config, timestep_spacing=theirs)
    if sampler != "ddim":       # diffusers' Euler and DPM++ put a small abar in place of the last one, if it is 0
        model.schedule = NoiseSchedule(model.config.noise, floor=ALMOST_ZERO)
    noise = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(3))
    theirs = pipe([PROMPT] * 2, negative_prompt=["two cars"] * 2, latents=noise, num_inference_steps=steps,
                  guidance_scale=4.0, width=24, height=32, output_type="np").images
    ours = model.text2img(PROMPT, "two cars", latent=noise, sampler=sampler, num_inference_steps=steps,
                          guidance_scale=4.0, batch=2,
                          size=(24, 32), timestep_spacing=ours)
    assert theirs.std() > 0.1
    assert np.abs(arrays(ours) / 255 - theirs).max() < 1 / 255


def test_diffusers_opens_the_folder_with_the_scheduler_that_fits(both):
    model, pipe, scheduler = both
    assert pipe.tokenizer(PROMPT).input_ids == [
        model.tokenizer.start, *model.tokenizer.encode(PROMPT), model.tokenizer.end]
    wanted = model.schedule.alphas_cumprod
    assert torch.allclose(scheduler.alphas_cumprod.double(), wanted, atol=1e-6)
    pipe.scheduler = scheduler
    assert pipe(PROMPT, num_inference_steps=2, output_type="np").images.std() > 0


# --- seeds ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_holds_the_images_that_its_seeds_give_alone(model, sampler):
    batch = arrays(model.text2img(PROMPT, sampler=sampler, num_inference_steps=3, seed=7, batch=3))
    alone = [model.text2img(PROMPT, sampler=sampler, num_inference_steps=3, seed=7 + i)[0] for i in range(3)]
    off = np.abs(np.asarray(batch, int) - np.asarray(arrays(alone), int))
    assert off.max() <= 1                                   # of 255: a batch is added up in another order
    assert np.abs(np.asarray(batch[0], int) - np.asarray(batch[1], int)).max() > 10


def test_a_batch_is_one_call_of_the_network(model):
    sizes = []
    hook = model.unet.register_forward_hook(lambda module, inputs, output: sizes.append((len(inputs[0]), len(output))))
    model.text2img(PROMPT, num_inference_steps=2, batch=3, guidance_scale=3.0)
    hook.remove()
    assert sizes == [(3, 6), (3, 6)], "both halves of guidance at once, of the latents that they share"


def test_a_seed_gives_the_same_image_whatever_was_drawn_before(model):
    first = arrays(model.text2img(PROMPT, sampler="ddpm", num_inference_steps=3, seed=1))
    before = torch.get_rng_state()
    torch.randn(10)
    assert np.array_equal(arrays(model.text2img(PROMPT, sampler="ddpm", num_inference_steps=3, seed=1)), first)
    assert not np.array_equal(arrays(model.text2img(PROMPT, sampler="ddpm", num_inference_steps=3, seed=2)), first)
    torch.set_rng_state(before)
    model.text2img(PROMPT, sampler="ddpm", num_inference_steps=3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)       # and it does not touch others' random numbers


def test_a_latent_takes_the_place_of_the_seed(model):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    given_noise = arrays(model.text2img(PROMPT, num_inference_steps=2, latent=noise, seed=0))
    assert np.array_equal(given_noise, arrays(model.text2img(PROMPT, num_inference_steps=2, seed=5)))
    with pytest.raises(SettingsError, match=r"the latent is \(1, 4, 16, 16\).*\(2, 4, 16, 16\)"):
        model.text2img(PROMPT, latent=noise, batch=2)


# --- what is asked for ------------------------------------------------------------------------------

@pytest.mark.parametrize("size, shape", [
    (None, (32, 32)), (16, (16, 16)), ((40, 24), (24, 40)), ((2, 6), (6, 2)), ((26, 30), (30, 26)),
])
def test_sizes_are_width_then_height_and_latents_may_be_odd(model, size, shape):
    images = model.text2img(PROMPT, num_inference_steps=1, size=size)
    assert arrays(images).shape == (1, *shape, 3)


def test_an_empty_prompt_is_the_unconditional_model(model):
    """Guidance then goes from the empty prompt to itself, so its scale changes nothing."""
    with torch.no_grad():
        assert torch.equal(*model.encode(["", ""]))
    low, high = (arrays(model.text2img("", num_inference_steps=3, guidance_scale=scale)).astype(int)
                 for scale in (1.0, 9.0))
    assert np.abs(low - high).max() <= 1
    told = arrays(model.text2img(PROMPT, num_inference_steps=3, guidance_scale=9.0)).astype(int)
    assert np.abs(low - told).max() > 10


def test_the_negative_prompt_and_every_setting_are_heard(model):
    plain = arrays(model.text2img(PROMPT, num_inference_steps=3))
    for changed in ({"num_inference_steps": 4}, {"sampler": "euler_ancestral"}, {"guidance_scale": 2.0},
                    {"guidance_rescale": 0.7},
                    {"timestep_spacing": "trailing"}, {"negative_prompt": "two cars"}):
        assert not np.array_equal(arrays(model.text2img(PROMPT, **{"num_inference_steps": 3, **changed})),
                                  plain), changed


def final_latent(model, **given):
    *_, step = model.iter_steps(PROMPT, num_inference_steps=4, sampler="ddim",
                                **given)          # at timesteps 751, 501, 251, 1
    return step.latent


def test_guidance_applies_within_its_interval_alone(model):
    without, everywhere = final_latent(model, guidance_scale=1.0), final_latent(model, guidance_scale=5.0)
    assert not torch.allclose(without, everywhere, atol=0.01)
    assert torch.equal(final_latent(model, guidance_scale=5.0, guidance_interval=(900, 999)), without)
    assert torch.equal(final_latent(model, guidance_scale=5.0, guidance_interval=(0, 999)), everywhere)
    part = final_latent(model, guidance_scale=5.0, guidance_interval=(200, 600))
    assert torch.equal(final_latent(model, guidance_scale=5.0, guidance_interval=(251, 501)),
                       part), "both ends belong to it"
    assert not torch.allclose(part, without, atol=0.01) and not torch.allclose(part, everywhere, atol=0.01)


@pytest.mark.parametrize("guidance", [4.0, 1.0, 0.0])
@pytest.mark.parametrize("more", [{}, {"guidance_rescale": 0.7}, {"guidance_interval": (200, 600)},
                                  {"guidance_rescale": 0.7, "guidance_interval": (200, 600)}], ids=str)
def test_guidance_settings_reach_the_denoiser(model, guidance, more):
    """The same latent as a sampler gives with the classifier-free guidance of these arguments."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        context, uncond = model.encode([PROMPT, "two cars"])[:, None]
        denoise = predict_x0(model.unet, model.schedule, context, uncond, guidance_scale=guidance, **more)
        *_, wanted = SAMPLERS["ddim"](denoise, noise, make_timesteps_for("ddim", model.schedule, 4), model.schedule)
    found = final_latent(model, negative_prompt="two cars", latent=noise, guidance_scale=guidance, **more)
    assert torch.allclose(found, wanted.x, atol=1e-3)


def test_zero_terminal_snr_starts_at_the_last_timestep_by_itself():
    assert next(make(ZERO_SNR).iter_steps(PROMPT, num_inference_steps=4)).t == 999


# --- steps ------------------------------------------------------------------------------------------

def test_steps_are_told_one_by_one_and_end_with_the_image(model):
    steps = list(model.iter_steps(PROMPT, num_inference_steps=5, seed=3, batch=2))
    assert [(step.index, step.of) for step in steps] == [(i, 5) for i in range(5)]
    assert [step.t for step in steps] == sorted((step.t for step in steps), reverse=True)
    assert all(step.latent.shape == step.x0.shape == (2, 4, 16, 16) for step in steps)
    images = arrays(model.text2img(PROMPT, num_inference_steps=5, seed=3, batch=2))
    assert np.array_equal(arrays(steps[-1].noisy_images()), images)
    assert not np.array_equal(arrays(steps[0].images()), arrays(steps[0].noisy_images()))


def test_steps_decode_only_when_asked(monkeypatch):
    model, decoded = make(), []
    to_pixels = model.vae.to_pixels
    monkeypatch.setattr(model.vae, "to_pixels", lambda *args, **kw: decoded.append(1) or to_pixels(*args, **kw))
    steps = list(model.iter_steps(PROMPT, num_inference_steps=3))
    assert not decoded
    steps[1].images()
    assert len(decoded) == 1


def test_stepping_leaves_gradients_as_the_caller_has_them(model):
    steps = model.iter_steps(PROMPT, num_inference_steps=3)
    next(steps)
    assert torch.is_grad_enabled()
    steps.close()
    assert not next(model.iter_steps(PROMPT, num_inference_steps=1)).latent.requires_grad


def test_text_guidance_of_one_runs_the_network_on_one_half_only(monkeypatch):
    model, batches = make(), []
    forward = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda x, t, context, **kw: (batches.append(len(context))
                                                                            or forward(x, t, context, **kw)))
    model.text2img(PROMPT, num_inference_steps=2, guidance_scale=1.0)
    model.text2img(PROMPT, num_inference_steps=2, guidance_scale=2.0)
    assert batches == [1, 1, 2, 2]


# --- prompts ----------------------------------------------------------------------------------------

def test_unknown_words_are_named_and_the_prompt_runs(model):
    with pytest.warns(UnknownWordWarning, match=r"'dragon', 'aple' \(did you mean 'apple'\?\); it will") as caught:
        images = model.text2img("a red Dragon above a aple's dragon", num_inference_steps=1)
    assert len(images) == 1 and len(caught) == 1
    assert caught[0].filename == __file__           # told at the line that asked
    with pytest.warns(UnknownWordWarning, match="'castle'"):
        model.text2img("a red apple", "a castle", num_inference_steps=1)


def test_known_words_and_models_without_a_world_warn_of_nothing(model):
    silent = make()
    silent.world = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.text2img("A red CAT, to the left of 3 balloons! 'apple' (cat's tree) - a balloons.",
                       num_inference_steps=1)
        silent.text2img("a purple dragon", num_inference_steps=1)


def test_the_words_of_the_world_are_known_and_others_are_not():
    known = WORLD["words"]
    assert unknown_words(" ".join(known), known) == []
    assert unknown_words("ein Äpfelchen über 猫 🦊 ❤️ … –", known) == ["'ein'", "'äpfelchen'", "'über'", "'猫'",
                                                                       "'🦊'", "'❤'"]


def test_a_long_prompt_is_cut_and_its_lost_end_quoted(model):
    with pytest.warns(LongPromptWarning, match="longer than 77 tokens; .*cut.*\"a red apple a red.* \\.\\.\\.\""):
        long = model.text2img(LONG, num_inference_steps=1)
    assert np.array_equal(arrays(long), arrays(model.text2img(model.tokenizer.decode(
        model.tokenizer(LONG)[0]), num_inference_steps=1)))
    with pytest.warns(LongPromptWarning, match="above a blue tree\"; long_prompts"):
        model.text2img("apple " * 75 + "above a blue tree", num_inference_steps=1)
    with pytest.warns(LongPromptWarning):
        model.text2img(PROMPT, LONG, num_inference_steps=1)


def test_prompts_that_lose_nothing_give_no_warning(model):
    """Up to 75 words of one token each; and any number of them in chunks, in either prompt."""
    long = "apple " * 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.text2img("apple " * 75, "cat " * 75, num_inference_steps=1)
        model.text2img(long, long, num_inference_steps=1, long_prompts="chunks")
        assert list(model.prompt_warnings("apple " * 75, long_prompts="cut")) == list(model.prompt_warnings(
            long, long, long_prompts="chunks")) == []
    with pytest.warns(LongPromptWarning, match="\"cat\"; long_prompts"):
        model.text2img("apple " * 75 + "cat", num_inference_steps=1)
    kinds = [kind for kind, _ in model.prompt_warnings("a dragon " * 50, long_prompts="chunks")]
    assert kinds == [UnknownWordWarning], "a word that was never taught is reported all the same"


@given(prompt=st.text(max_size=30))
@settings(max_examples=40)
def test_any_text_makes_an_image(model, prompt):
    """Emoji, control characters, unassigned code points: all but half a surrogate pair, which is no text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownWordWarning)
        try:
            [image] = model.text2img(prompt, num_inference_steps=1, size=8)
        except SettingsError as error:
            assert "surrogate" in str(error)
            assert any("\ud800" <= char <= "\udfff" for char in prompt)
        else:
            assert image.size == (8, 8)


# --- default sampling settings ----------------------------------------------------------------------

def test_steps_and_guidance_default_to_those_of_the_model():
    other = StableDiffusion(tiny_parts(config=replace(PRESETS["tiny"], sampling=SamplingConfig(3, 2.0))))
    assert [step.of for step in other.iter_steps(PROMPT)] == [3, 3, 3]
    [image], [same] = other.text2img(PROMPT), other.text2img(PROMPT, num_inference_steps=3, guidance_scale=2.0)
    assert np.array_equal(image, same) and not np.array_equal(image, other.text2img(PROMPT, guidance_scale=7.5)[0])
    assert other.validate(num_inference_steps=5).guidance_scale == 2.0
    assert other.validate(guidance_scale=0.0).num_inference_steps == 3


def test_models_that_store_no_settings_have_stable_diffusions(model):
    assert (model.validate().num_inference_steps, model.validate().guidance_scale) == (50, 7.5)


# --- what cannot be ---------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, told", [
    ({"num_inference_steps": 0}, "0 steps"), ({"num_inference_steps": 2000}, "2000 steps"),
                                         ({"num_inference_steps": 2.5}, "2.5 steps"),
    ({"sampler": "magic"}, "no sampler 'magic'; choose one of ddpm"),
    ({"timestep_spacing": "odd"}, "no timestep_spacing 'odd'"),
    ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
                                         ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
    ({"guidance_scale": "7"}, "guidance_scale is 7"), ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5"),
    ({"size": 33}, "33x33 is not a multiple of 2 pixels; the nearest is 32x32"),
    ({"size": (32, 35)}, "32x35 is not a multiple of 2"),
    ({"size": 0}, "0x0 cannot be made; give sides of 2 to 2048"), ({"size": -8}, "-8x-8 cannot"),
    ({"size": 10**9}, "cannot be made"), ({"size": (8, 8, 8)}, "8x8x8 cannot"), ({"size": 16.0}, "cannot be made"),
    ({"batch": 0}, "batch is 0"), ({"batch": 10**9}, "batch is 1000000000"),
    ({"seed": -1}, "seed is -1"), ({"seed": 0.5}, "seed is 0.5"), ({"seed": 2**64}, "seed is"),
], ids=str)
def test_wrong_settings_are_told_before_anything_is_computed(model, monkeypatch, wrong, told):
    monkeypatch.setattr(model.text_encoder, "forward", lambda *_: pytest.fail("computed"))
    with pytest.raises(SettingsError) as caught:
        model.iter_steps(PROMPT, **wrong)        # at the call, not at the first step
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


METHODS = {"text2img": (), "img2img": ("x",), "inpaint": ("x", "x"), "control": ("x", "x"), "iter_steps": ()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_settings_as_keyword_arguments_with_their_defaults(method):
    """In the signature, which an editor completes, and with ranges and defaults in the docstring."""
    function = getattr(StableDiffusion, method)
    found = {name: (one.default, one.annotation) for name, one in inspect.signature(function).parameters.items()
             if one.kind is one.KEYWORD_ONLY}
    wanted = {one.name: (one.default, one.type) for one in fields(Settings)}
    assert {name: found.get(name) for name in wanted} == wanted
    assert all(f"{one.name}: {one.metadata['help']}" in function.__doc__ for one in fields(Settings))


def test_iter_steps_takes_what_the_other_methods_take():
    taken = set(inspect.signature(StableDiffusion.iter_steps).parameters)
    for method in ("text2img", "img2img", "inpaint"):
        assert set(inspect.signature(getattr(StableDiffusion, method)).parameters) <= taken


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_argument_is_a_type_error_that_names_it(model, method):
    with pytest.raises(TypeError, match="'num_steps'"):
        getattr(model, method)(PROMPT, *METHODS[method], num_steps=20)


def test_validate_fills_in_the_defaults_of_the_model(model):
    found = model.validate(batch=2)
    assert (found.num_inference_steps, found.guidance_scale, found.size) == (50, 7.5, (32, 32))
    assert len(found.timesteps) == 50 and model.latent_shape(found) == (2, 4, 16, 16)
    image = Image.new("RGB", (24, 16))
    half = model.validate(image=image, strength=0.5, num_inference_steps=8)
    assert half.size == (24, 16) and half.image.shape == (1, 3, 16, 24)
    assert half.timesteps == model.validate(num_inference_steps=8).timesteps[4:]


def test_nan_is_told_and_never_a_black_image():
    model = make()
    with torch.no_grad():
        model.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(NotFinite, match="latent became NaN.*guidance 3.0"):
        model.text2img(PROMPT, num_inference_steps=2, guidance_scale=3.0)
    model = make()
    with torch.no_grad():
        model.vae.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(NotFinite, match="VAE decoded to NaN or infinity"):
        model.text2img(PROMPT, num_inference_steps=2)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where, message", [("unet", "latent became NaN or infinite"), ("vae", "VAE decoded to NaN")])
def test_a_single_value_that_is_not_finite_raises(where, message, value):
    """Infinity like NaN, and one element of one image of the batch like all of them."""
    def spoil(module, inputs, output):
        output[-1, 0, 0, 0] = value
        return output

    model = make()
    (model.unet if where == "unet" else model.vae.decoder).conv_out.register_forward_hook(spoil)
    with pytest.raises(NotFinite, match=message):
        model.text2img(PROMPT, num_inference_steps=1, sampler="dpmpp_2m", guidance_scale=1.0, batch=2)


def test_guidance_beyond_what_numbers_hold_is_told(model):
    with pytest.raises(NotFinite):
        model.text2img(PROMPT, num_inference_steps=5, guidance_scale=1e38)


@pytest.mark.parametrize("where", ["unet", "vae"])
def test_too_little_memory_is_told(monkeypatch, where):
    model = make()
    module = model.unet if where == "unet" else model.vae.decoder
    monkeypatch.setattr(module, "forward", lambda *_, **kw: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(MemoryError, match="not enough memory for the images.*fewer or smaller"):
        model.text2img(PROMPT, num_inference_steps=2)


def test_other_errors_of_the_network_pass_as_they_are(monkeypatch):
    model = make()

    def broken(*_, **kw):
        raise RuntimeError("a mistake in a layer")

    monkeypatch.setattr(model.unet, "forward", broken)
    with pytest.raises(RuntimeError, match="a mistake in a layer"):
        model.text2img(PROMPT, num_inference_steps=2)


def test_unknown_models_and_devices_are_told(tmp_path):
    with pytest.raises(CheckpointError, match="no model 'maxi'; give the path .* or the name of a shipped model"):
        StableDiffusion.load("maxi")
    folder = save_folder(tmp_path / "tiny", tiny_parts())
    for device in ("abacus", "cuda:99"):
        with pytest.raises(SettingsError, match=f"no device '{device}' here"):
            StableDiffusion.load(folder, device=device)


def test_shipped_models_are_found_by_name(tmp_path, monkeypatch):
    save_folder(tmp_path / "small", tiny_parts())
    (tmp_path / "no model").mkdir()
    monkeypatch.setattr(shipped_room, "SHIPPED", tmp_path)
    assert shipped() == ["small"]
    assert StableDiffusion.load("small", device="cpu").config.name == "small"


def test_a_model_can_run_in_bfloat16(tmp_path):
    folder = save_folder(tmp_path / "tiny", tiny_parts())
    low = StableDiffusion.load(folder, device="cpu", dtype=torch.bfloat16)
    high = StableDiffusion.load(folder, device="cpu")
    a, b = (arrays(model.text2img(PROMPT, num_inference_steps=2, guidance_scale=1.0)).astype(int)
            for model in (low, high))
    assert 0 < np.abs(a - b).mean() < 10


# --- the shipped model ------------------------------------------------------------------------------

needs_weights = pytest.mark.skipif("mini" not in shipped(), reason="this checkout has no weights")


@pytest.fixture(scope="module")
def mini():
    return opened(SHIPPED / "mini")


@needs_weights
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_images_of_the_shipped_model_equal_those_of_diffusers(mini, sampler):
    model, pipe, scheduler = mini
    theirs, ours = spacing(sampler, model.config.noise)
    pipe.scheduler = SCHEDULERS[sampler].from_config(scheduler.config, timestep_spacing=theirs)
    if sampler != "ddim":
        model.schedule = NoiseSchedule(model.config.noise, floor=ALMOST_ZERO)
    side = model.config.latent_size
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    theirs = pipe(PROMPT, latents=noise, num_inference_steps=5, guidance_scale=5.0, output_type="np").images
    ours = model.text2img(PROMPT, latent=noise, sampler=sampler, num_inference_steps=5, guidance_scale=5.0,
                          timestep_spacing=ours)
    assert np.abs(arrays(ours) / 255 - theirs).max() < 1 / 255


@needs_weights
def test_the_shipped_model_knows_its_world_and_listens():
    model = StableDiffusion.load(device="cpu")
    assert model.config == replace(model.config, name="mini")
    assert {"apple", "cat", "red", "background"} <= set(model.world["words"])
    assert model.clip is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        red, blue = (arrays(model.text2img(f"a {colour} apple", num_inference_steps=4))[0]
                     for colour in ("red", "green"))
    assert red.shape == (model.config.image_size, model.config.image_size, 3)
    assert np.abs(red.astype(int) - blue).mean() > 2


# --- compiled -----------------------------------------------------------------------------------------

@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("shape", [(2, 64, 32), (40, 32), (2, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_by_onednn_give_the_same_numbers(shape, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(32, 48, bias=bias), torch.randn(shape)
    with torch.no_grad(), torch.profiler.profile() as told, LinearByOneDNN():
        found = [layer(x), torch.nn.functional.linear(x, layer.weight, bias=layer.bias)]
    many = x.numel() // 32 >= FEW_ROWS
    assert any("mkldnn" in event.key for event in told.key_averages()) == many, "few rows stay with MKL"
    for one in found:
        torch.testing.assert_close(one, layer(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), LinearByOneDNN():
        assert layer.double()(x.double()).dtype == torch.float64, "what oneDNN cannot do is left alone"


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None and not os.environ.get("CI"),
                    reason="a CPU's compiled code needs a C++ compiler")
def test_compiled_it_makes_the_same_images():
    """Alone, with a ControlNet, and after the weights have changed."""
    model = StableDiffusion(tiny_parts(EPSILON))
    net = ControlNet.from_unet(model.unet, hint_widths=(4, 4))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    hint = np.full((16, 16, 3), 200, np.uint8)

    def images():
        return [arrays(model.text2img(PROMPT, num_inference_steps=3, size=16)),
                arrays(model.control(PROMPT, net, hint, num_inference_steps=3,
                                                                                       size=16))]

    plain = images()
    assert isinstance(model.compile().network, CompiledUNet) and model.network is model.network
    for wanted, found in zip(plain, images(), strict=True):
        assert np.abs(found.astype(int) - wanted).max() <= 1
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(-1)
    turned, = StableDiffusion(model.parts).text2img(PROMPT, num_inference_steps=3, size=16)
    assert np.abs(arrays([turned]).astype(int) - plain[0]).max() > 1
    assert np.abs(arrays(model.text2img(PROMPT, num_inference_steps=3,
                                        size=16)).astype(int) - arrays([turned])).max() <= 1
    model.unet = StableDiffusion(tiny_parts(EPSILON)).unet
    assert model.network.unet is model.unet


def test_loading_lays_the_unet_out_for_convolutions(tmp_path):
    """Channels last, whatever the file; written again, the tensors are the same to the bit."""
    one = StableDiffusion.load(save_folder(tmp_path / "a", make().parts), device="cpu")
    weight = one.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    again = load_folder(save_folder(tmp_path / "b", one.parts))
    assert all(torch.equal(a, b) for a, b in zip(one.unet.parameters(), again.unet.parameters(), strict=True))
    plain = StableDiffusion(again)
    assert plain.unet.conv_in.weight.is_contiguous()
    images = [arrays(model.text2img(PROMPT, num_inference_steps=2)).astype(int) for model in (one, plain)]
    assert abs(images[0] - images[1]).max() <= 1
    lora = new_lora(one.unet, rank=2, targets=("conv1", "to_k"))
    for tensor in lora.tensors():
        torch.nn.init.normal_(tensor, std=0.1)
    for model in (one, plain):
        model.add_lora(lora)
    assert all(torch.equal(a, b) for a, b in zip(one.unet.parameters(), plain.unet.parameters(), strict=True))
    assert one.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    one.remove_lora(lora)
    assert all(torch.equal(a, b) for a, b in zip(one.unet.parameters(), load_folder(tmp_path / "a").unet.parameters(),
                                                 strict=True))
