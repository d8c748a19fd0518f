"""`generate --prompts`: many prompts, shared out among processes, gone on with where it was cut off."""

import json
import os
import subprocess
import sys

import pytest
from models import one_thread, tiny_parts  # noqa: F401
from PIL import Image
from test_cli import refused, run, written  # noqa: F401

from sdlearn.checkpoint import save_folder
from sdlearn.commands.files import RENAMED, save_png
from sdlearn.pipeline import StableDiffusion

PROMPTS = ["a red apple", "a cat", "", "a red apple", "two dogs on a (blue:1.2) background"]
ASKED = [prompt for prompt in PROMPTS if prompt]


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return tmp_path / "prompts.txt"


def told(file) -> dict:
    return json.loads(Image.open(file).text["sdlearn"])


def test_each_line_becomes_an_image(run, written, prompts, tmp_path):  # noqa: F811
    """Numbered, with its settings in it, and the one that the prompt alone gives."""
    out = tmp_path / "out"
    assert run("generate", "--prompts", prompts, "--steps", 2, "--out", out).status == 0
    files = sorted(out.iterdir())
    assert [told(file)["prompt"] for file in files] == ASKED
    assert files[0].name == "0000-a-red-apple-0.png" and files[2].name == "0002-a-red-apple-0.png"
    alone, = StableDiffusion.load(written, device="cpu").text2img(ASKED[1], num_inference_steps=2)
    assert Image.open(files[1]).tobytes() == alone.tobytes()


def test_it_goes_on_where_it_was_cut_off(run, prompts, tmp_path):  # noqa: F811
    """What is there stays, byte for byte; what is missing, broken or made otherwise is made."""
    out, call = tmp_path / "out", ("generate", "--prompts", prompts, "--out", tmp_path / "out")
    assert run(*call, "--steps", 2).status == 0
    kept, missing, broken, other = sorted(out.iterdir())
    whole = {file: file.read_bytes() for file in (kept, missing, broken, other)}
    missing.unlink()
    broken.write_bytes(whole[broken][:100])
    os.utime(kept, (1, 1))
    assert run(*call, "--steps", 2).status == 0
    assert {file: file.read_bytes() for file in whole} == whole
    assert kept.stat().st_mtime == 1, "it was made again"
    assert run(*call, "--steps", 3).status == 0
    assert told(kept)["num_inference_steps"] == 3 and kept.stat().st_mtime > 1


@pytest.fixture
def again(run, tmp_path):  # noqa: F811
    """Calls twice, (arguments, options of `run`) each, with one prompt; whether the second made its image again."""
    def again(first, second, between=lambda file: None):
        (tmp_path / "one.txt").write_text(PROMPTS[0])
        call = ("generate", "--prompts", tmp_path / "one.txt", "--steps", 2, "--out", tmp_path / "out")
        assert run(*call, *first[0], **first[1]).status == 0
        [file] = (tmp_path / "out").iterdir()
        between(file)
        os.utime(file, (1, 1))
        assert run(*call, *second[0], **second[1]).status == 0
        return file.stat().st_mtime > 1
    return again


def test_another_type_of_numbers_is_another_image(again):
    assert again(((), {}), (("--dtype", "bfloat16"), {}))
    assert not again((("--dtype", "bfloat16"), {}), (("--dtype", "bfloat16"), {}))


def test_another_count_of_resampling_is_another_image(again, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "in.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "mask.png")
    common = ("--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png")
    assert again((common, {}), ((*common, "--resample", 2), {}))
    assert not again((common, {}), ((*common, "--resample", 1), {}))


def test_another_model_of_the_same_name_is_another_image(again, written, tmp_path):  # noqa: F811
    """Told by its place, and by the weights that are there now."""
    parts = tiny_parts()
    other = save_folder(tmp_path / "other", parts)
    assert again(((), {}), ((), {"model": other}))

    def trained(file):
        assert told(file)["model"] == str(other)
        parts.unet.conv_out.bias.data += 0.1
        save_folder(other, parts)
    assert again(((), {"model": other}), ((), {"model": other}), between=trained)
    assert not again(((), {"model": other}), ((), {"model": other}))


@pytest.mark.parametrize("key", ["weights", "dtype", "resample"])
def test_an_image_that_does_not_tell_is_made_again(again, key):
    """As of earlier versions, which wrote less."""
    def forget(file):
        settings = told(file)
        del settings[key]
        save_png(file, Image.open(file).copy(), settings)
    assert again(((), {}), ((), {}), between=forget)


def test_settings_recorded_under_their_earlier_names_are_read(again):
    """The image is not generated again for the names alone."""
    def rename(file):
        settings, old = told(file), {new: name for name, new in RENAMED.items()}
        assert settings.pop("guidance_interval", None) is None
        save_png(file, Image.open(file).copy(), {old.get(name, name): value for name, value in settings.items()})
    assert not again(((), {}), ((), {}), between=rename)
    assert again(((), {}), (("--guidance-interval", 200, 800), {}), between=rename)


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "--"),
    "accelerate launch": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port",
                          "0", "-m")}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_share_them_out(written, prompts, tmp_path, launcher):  # noqa: F811
    """The same images as from one process; each makes some, none makes another's."""
    def call(*before, out):
        return subprocess.run([sys.executable, *before, "sdlearn", "generate", "--prompts", str(prompts), "--model",
                               str(written), "--steps", "2", "--out", str(out)], capture_output=True, text=True,
                              timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                                                             "HF_HOME": str(tmp_path)})    # no `accelerate config`
    one = call("-m", out=tmp_path / "one")
    two = call("-m", *LAUNCHERS[launcher], out=tmp_path / "two")
    assert one.returncode == two.returncode == 0, two.stderr
    assert len(two.stdout.split()) == len(ASKED), "each image is made once"
    for file in sorted((tmp_path / "one").iterdir()):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("args, words", [
    ((), "give a prompt, or a file"),
    (("a cat", "--prompts", "{}"), "not both"),
    (("--prompts", "nowhere.txt"), "nowhere.txt cannot be read"),
    (("--prompts", "{}", "--out", "{}"), "cannot be made"),
])
def test_bad_input_is_one_sentence(run, prompts, args, words):  # noqa: F811
    refused(run("generate", *(arg.format(prompts) for arg in args)), words)


def test_a_file_without_prompts_is_told(run, tmp_path):  # noqa: F811
    (tmp_path / "empty.txt").write_text("\n\n")
    refused(run("generate", "--prompts", tmp_path / "empty.txt"), "holds no prompt")
