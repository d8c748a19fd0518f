"""`generate` with images, hints, LoRAs and learned words; `export`, whose result other programs open."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from models import one_thread, randomise, tiny_parts  # noqa: F401
from PIL import Image
from test_cli import refused, run, written  # noqa: F401
from test_learned import lora_for, toy

from sdlearn.checkpoint import load_single
from sdlearn.checkpoint.control import load_controlnet_folder, save_controlnet
from sdlearn.checkpoint.embedding import save_embedding
from sdlearn.checkpoint.lora import save_lora
from sdlearn.controlnet import ControlNet
from sdlearn.pipeline import StableDiffusion, make_control, shipped

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def files(written, tmp_path_factory):  # noqa: F811
    """Everything that `generate` reads beside the model."""
    folder = tmp_path_factory.mktemp("files")
    model = StableDiffusion.load(written, device="cpu")
    net = ControlNet.from_unet(model.unet, hint_widths=(4, 8)).requires_grad_(False)
    randomise(net.controlnet_down_blocks, torch.Generator().manual_seed(2))
    randomise(net.controlnet_cond_embedding, torch.Generator().manual_seed(3))
    save_controlnet(folder / "net", net)
    image = np.add.outer(np.arange(32), np.arange(24)) * 4
    Image.fromarray(np.stack([image, 255 - image, image // 2], axis=-1).astype(np.uint8)).save(folder / "in.png")
    mask = Image.new("L", (24, 32))
    mask.paste(255, (4, 4, 20, 20))
    mask.save(folder / "mask.png")
    mask.point(lambda v: v // 2).save(folder / "grey.png")
    mask.resize((32, 32)).save(folder / "large.png")
    (folder / "text.png").write_text("no image")
    save_lora(folder / "lora.safetensors", lora_for(model))
    save_embedding(folder / "toy.safetensors", toy())
    return folder


def pixels(name):
    with Image.open(name) as image:
        return np.asarray(image), json.loads(image.text["sdlearn"])


def test_generate_does_all_that_the_pipeline_does(run, written, files):  # noqa: F811
    result = run("generate", "a <toy> cat", "--steps", 4, "--out", "out.png", "--image", files / "in.png", "--mask",
                 files / "mask.png", "--strength", 0.75, "--resample", 2, "--lora", files / "lora.safetensors", 0.5,
                 "--embedding", files / "toy.safetensors", "--control", files / "net", files / "in.png", 0.4,
                 "--rescale", 0.5, "--spacing", "trailing", "--sampler", "ddim")
    assert (result.status, result.files) == (0, ["out.png"]), result.err
    assert "3/3" in result.err                  # three quarters of four steps
    found, told = pixels("out.png")
    model = StableDiffusion.load(written, device="cpu")
    model.add_lora(files / "lora.safetensors", 0.5)
    model.add_embedding(files / "toy.safetensors")
    net = load_controlnet_folder(files / "net", device="cpu", dtype=torch.float32)
    image = Image.open(files / "in.png")
    [wanted] = model.inpaint("a <toy> cat", image, Image.open(files / "mask.png"), strength=0.75,
                             num_inference_steps=4, resample=2,
                             controls=make_control(net, image, conditioning_scale=0.4), guidance_rescale=0.5,
                             timestep_spacing="trailing",
                             sampler="ddim")
    assert np.array_equal(found, np.asarray(wanted))
    assert told["size"] == "24x32" and told["strength"] == 0.75 and told["lora"][0][1] == "0.5"


def test_an_image_is_changed_by_four_fifths_unless_told_otherwise(run, written, files):  # noqa: F811
    run("generate", PROMPT, "--steps", 5, "--out", "out.png", "--image", files / "in.png")
    [wanted] = StableDiffusion.load(written, device="cpu").img2img(PROMPT, Image.open(files / "in.png"),
                                                                   num_inference_steps=5)
    assert np.array_equal(pixels("out.png")[0], np.asarray(wanted))


@pytest.mark.parametrize("given, strength, steps", [
    (["--mask", "{}/mask.png"], 1.0, 5), (["--mask", "{}/mask.png", "--strength", "0.8"], 0.8, 4),
    ([], 0.8, 4), (["--strength", "1"], 1.0, 5)], ids=["mask", "mask, 0.8", "image", "image, 1"])
def test_without_a_strength_a_mask_is_inpainted_from_noise(run, written, files, given, strength, steps):  # noqa: F811
    """As in the pipeline: 1 with a mask, 0.8 without one, and the strength that is given in either case."""
    result = run("generate", PROMPT, "--steps", 5, "--out", "out.png", "--image", files / "in.png",
                 *(one.replace("{}", str(files)) for one in given))
    assert result.status == 0 and f"{steps}/{steps}" in result.err
    model, image = StableDiffusion.load(written, device="cpu"), Image.open(files / "in.png")
    task = {"image": image, **({"mask": Image.open(files / "mask.png")} if "--mask" in given else {})}
    [wanted] = list(model.iter_steps(PROMPT, num_inference_steps=5, strength=strength, **task))[-1].noisy_images()
    found, told = pixels("out.png")
    assert np.array_equal(found, np.asarray(wanted))
    assert ("strength" in told) == ("--strength" in given), "what is recorded is what was given"
    assert told.get("strength", strength) == strength


def test_numbers_and_words_left_out_are_one_and_the_files_own(run, written, files):  # noqa: F811
    """The strength of a LoRA and of a ControlNet, and the name of an embedding; a word that is given replaces it."""
    def made(prompt, *options):
        assert run("generate", prompt, "--steps", 2, "--size", "24x32", "--out", "out.png", *options).status == 0
        return pixels("out.png")[0]

    lora, control = ("--lora", files / "lora.safetensors"), ("--control", files / "net", files / "in.png")
    word = ("--embedding", files / "toy.safetensors")
    for options in (lora, control):
        default = made(PROMPT, *options)
        assert np.array_equal(default, made(PROMPT, *options, 1))
        assert not np.array_equal(default, made(PROMPT, *options, 0.5))
    own = made("a <toy> cat", *word)
    assert np.array_equal(own, made("a <mine> cat", *word, "<mine>"))
    assert not np.array_equal(own, made("a <toy> cat", *word, "<mine>"))


@pytest.mark.parametrize("args, told", [
    (["--image", "{}/none.png"], "none.png is not an image that can be read: No such file"),
    (["--image", "{}/text.png"], "text.png is not an image"),
    (["--mask", "{}/mask.png"], "a mask but no image"),
    (["--image", "{}/in.png", "--mask", "{}/grey.png"], "mask is not binary"),
    (["--image", "{}/in.png", "--mask", "{}/large.png"], "mask is 32x32 pixels, but the image 24x32"),
    (["--image", "{}/in.png", "--strength", "0"], "strength is 0.0; give a number above 0"),
    (["--image", "{}/in.png", "--strength", "1.5"], "strength is 1.5"),
    (["--control", "{}/net"], "--control takes a folder, an image and a number"),
    (["--control", "{}/net", "{}/in.png", "much"], "--control takes"),
    (["--control", "{}/none", "{}/in.png"], "there is no file or folder .*none"),
    (["--control", "{}/net", "{}/large.png", "--size", "24x32"], "hint is 32x32 pixels, but the image 24x32"),
    (["--lora", "{}/none.safetensors"], "none.safetensors is missing"),
    (["--lora", "{}/toy.safetensors"], "toy.safetensors"),
    (["--lora", "{}/lora.safetensors", "1", "2"], "--lora takes a file and a number"),
    (["--embedding", "{}/lora.safetensors"], "lora.safetensors is no embedding"),
    (["--embedding", "{}/toy.safetensors", "cat", "dog"], "--embedding takes a file and a word"),
    (["--spacing", "odd"], "no timestep_spacing 'odd'"), (["--long-prompts", "fold"], "long_prompts is 'fold'"),
], ids=lambda value: " ".join(value).replace("{}/", "") if isinstance(value, list) else "")
def test_bad_input_is_one_sentence(run, files, args, told):  # noqa: F811
    result = run("generate", PROMPT, "--steps", 2, "--out", "x.png", *(arg.replace("{}", str(files)) for arg in args))
    refused(result, told)


# --- export -----------------------------------------------------------------------------------------

needs_weights = pytest.mark.skipif("mini" not in shipped(), reason="this checkout has no weights")


@needs_weights
@pytest.mark.parametrize("to", ["diffusers", "single"])
def test_the_shipped_model_is_exported_and_gives_the_same_image(run, to):  # noqa: F811
    target = "mini" if to == "diffusers" else "mini.safetensors"
    result = run("export", "mini", "--to", to, "--out", target)
    assert (result.status, result.out) == (0, f"{target}\n"), result.err
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    given = {"num_inference_steps": 4, "sampler": "ddim", "guidance_scale": 4.0, "latent": noise}
    [wanted] = StableDiffusion.load("mini", device="cpu").text2img(PROMPT, **given)
    [again] = StableDiffusion.load(target, device="cpu").text2img(PROMPT, **given)
    assert np.array_equal(np.asarray(again), np.asarray(wanted))
    if to == "diffusers":
        pipe = StableDiffusionPipeline.from_pretrained(target, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(PROMPT, latents=noise, num_inference_steps=4, guidance_scale=4.0, output_type="np").images
        assert np.abs(np.asarray(wanted) / 255 - theirs).max() < 1 / 255


def test_all_of_diffusers_pipelines_open_an_exported_model(run, written, files):  # noqa: F811
    """Each is also run: a part that is missing would be told only then."""
    run("export", written, "--to", "single", "--out", "tiny.safetensors")
    assert run("export", "tiny.safetensors", "--to", "diffusers", "--out", "tiny").status == 0
    image, mask = Image.open(files / "in.png"), Image.open(files / "mask.png")
    shared = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "np"}
    pipes = {
        StableDiffusionPipeline: {"width": 24, "height": 32},
        StableDiffusionImg2ImgPipeline: {"image": image},
        StableDiffusionInpaintPipeline: {"image": image, "mask_image": mask, "width": 24, "height": 32},
        StableDiffusionControlNetPipeline: {"image": image},
    }
    for kind, given in pipes.items():
        more = {"controlnet": ControlNetModel.from_pretrained(files / "net")} if "Control" in kind.__name__ else {}
        pipe = kind.from_pretrained("tiny", safety_checker=None, **more)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        assert pipe(**shared, **given).images.shape == (1, 32, 24, 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_exports_may_be_half_the_size(run, written, dtype):  # noqa: F811
    result = run("export", written, "--to", "single", "--out", "half.safetensors", "--dtype", dtype)
    assert result.status == 0
    parts, half = tiny_parts(), getattr(torch, dtype)
    for name, tensor in load_single("half.safetensors").unet.state_dict().items():
        assert torch.equal(tensor, parts.unet.state_dict()[name].to(half).float()), name


@pytest.mark.parametrize("args, told", [
    (["none", "--to", "single", "--out", "a.safetensors"], "there is no file or folder none"),
    (["mini", "--to", "single", "--out", "a.ckpt"], "a.ckpt does not end in .safetensors"),
    (["mini", "--to", "single", "--out", "."], r"\. does not end in"),
    (["mini", "--to", "ldm", "--out", "a"], "invalid choice: 'ldm'"),
    (["mini", "--to", "diffusers"], "required: --out"),
    (["mini", "--to", "diffusers", "--out", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["{}/lora.safetensors", "--to", "diffusers", "--out", "a"], "lora.safetensors"),
    (["{}/text.png", "--to", "diffusers", "--out", "a"], "text.png"),
], ids=lambda value: " ".join(value).replace("{}/", "") if isinstance(value, list) else "")
def test_exports_that_cannot_be_are_told(run, files, args, told):  # noqa: F811
    refused(run("export", *(arg.replace("{}", str(files)) for arg in args)), told)


def test_an_export_does_not_write_over_what_is_no_model(run, tmp_path, written):  # noqa: F811
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("long work")
    refused(run("export", written, "--to", "diffusers", "--out", tmp_path / "thesis"), "other things in it")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "long work"


