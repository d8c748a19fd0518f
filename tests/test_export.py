"""`python -m sdlearn export`: what is written opens in diffusers and here, and gives the same tensors."""

import json
import re
import shutil
import types
import warnings

import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from models import ZERO_SNR, one_thread, tiny_config, tiny_parts  # noqa: F401
from safetensors.torch import load_file, save_file
from single_files import small, tokenizer

from sdlearn import __main__ as cli
from sdlearn.checkpoint import load, load_folder, save_folder, save_tokenizer
from sdlearn.pipeline import SHIPPED, StableDiffusion

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("models") / "tiny", tiny_parts())


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder; gives status, stdout, stderr and what was written."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(*args):
        before = set(here.rglob("*"))
        try:
            status = cli.main(["export", *map(str, args)])
        except SystemExit as stop:      # argparse's own errors
            status = stop.code
        out, err = capsys.readouterr()
        return types.SimpleNamespace(status=status, out=out, err=err, here=here, files=sorted(
            path.relative_to(here).as_posix() for path in set(here.rglob("*")) - before))

    return run


def refused(result, told):
    assert (result.status, result.files, result.out) == (2, [], "")
    [line] = result.err.splitlines()
    assert line.startswith("error: ") and re.search(told, line), line


def same_parts(ours, theirs):
    for part in (*PARTS, "clip"):
        a, b = getattr(ours, part), getattr(theirs, part)
        assert (a is None) == (b is None)
        if a is not None:
            a, b = a.state_dict(), b.state_dict()
            assert a.keys() == b.keys() and not [name for name in a if not torch.equal(a[name], b[name])], part


def opened(folder, kind=StableDiffusionPipeline):
    """Diffusers' pipeline, without a word on the screen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = kind.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", ["written", "mini"])
def test_a_model_becomes_a_folder_that_diffusers_opens(run, written, name):
    source = written if name == "written" else name
    result = run(source, "--to", "diffusers", "--out", "out")
    assert (result.status, result.out) == (0, "out\n")
    same_parts(load_folder(result.here / "out"), load_folder(written if name == "written" else SHIPPED / name))
    pipeline = opened(result.here / "out")
    ours = StableDiffusion.load(result.here / "out", device="cpu")
    ids = pipeline.tokenizer("a red apple", padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ids, ours.tokenizer(["a red apple"]))
    with torch.no_grad():
        text = ours.text_encoder(ids).hidden
        torch.testing.assert_close(pipeline.text_encoder(ids).last_hidden_state, text, rtol=1e-4, atol=1e-4)
        side = ours.config.latent_size
        x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(pipeline.unet(x, 500, text).sample, ours.unet(x, 500, text), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pipeline.vae.decode(x).sample, ours.vae.decode(x), rtol=1e-4, atol=1e-4)


def test_an_image_comes_out_of_what_diffusers_opened(run, written):
    run(written, "--to", "diffusers", "--out", "out")
    [image] = opened("out")("a red apple", num_inference_steps=2, height=32, width=32).images
    assert image.size == (32, 32)


@pytest.mark.parametrize("noise", [tiny_config().noise, ZERO_SNR], ids=["epsilon", "zero SNR"])
def test_a_model_becomes_a_single_file_and_a_folder_again(run, tmp_path, noise):
    parts = tiny_parts(noise)
    source = save_folder(tmp_path / "tiny", parts)
    result = run(source, "--to", "single", "--out", "tiny.safetensors")
    assert (result.status, result.out, result.files) == (0, "tiny.safetensors\n", ["tiny.safetensors"])
    again = load("tiny.safetensors")
    assert again.config == parts.config and again.world == parts.world
    same_parts(again, parts)
    assert run("tiny.safetensors", "--to", "diffusers", "--out", "back/tiny").status == 0
    for file in source.rglob("*.safetensors"):
        back = load_file(result.here / "back" / "tiny" / file.relative_to(source))
        assert all(torch.equal(back[name], tensor) for name, tensor in load_file(file).items())
    for file in source.rglob("*.json"):
        assert json.loads((result.here / "back" / "tiny" / file.relative_to(source)).read_text()) == json.loads(
            file.read_text()), file


@pytest.mark.parametrize("to, out", [("single", "tiny.safetensors"), ("diffusers", "out")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_written_in_the_precision_asked_for(run, written, to, out, dtype):
    result = run(written, "--to", to, "--out", out, "--dtype", dtype)
    files = [result.here / name for name in result.files if name.endswith(".safetensors")]
    assert {one.dtype for file in files for one in load_file(file).values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("newer", [False, True], ids=["SD 1.x", "SD 2.x"])
def test_a_published_single_file_becomes_a_folder_that_diffusers_opens(run, tmp_path, newer):
    theirs = small(newer, in_channels=4 if newer else 9)
    save_file(theirs.tensors, tmp_path / "model.safetensors")
    save_tokenizer(tmp_path / "words", tokenizer())
    extra = ["--prediction", "v_prediction"] if newer else []
    result = run(tmp_path / "model.safetensors", "--to", "diffusers", "--out", "out", "--tokenizer",
                 tmp_path / "words", *extra)
    assert result.status == 0, result.err
    pipeline = opened(result.here / "out", StableDiffusionPipeline if newer else StableDiffusionInpaintPipeline)
    assert pipeline.scheduler.config.prediction_type == ("v_prediction" if newer else "epsilon")
    assert pipeline.unet.config.sample_size == (96 if newer else 64)
    for part, module in (("unet", pipeline.unet), ("vae", pipeline.vae)):
        wanted = getattr(theirs, part).state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in module.state_dict().items())
    ids = pipeline.tokenizer("a red apple", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(pipeline.text_encoder(ids).last_hidden_state,
                                   theirs.text_encoder(ids).last_hidden_state)


# --- refusals ---------------------------------------------------------------------------------------

def test_what_cannot_be_written_is_told_before_the_model_is_read(run, written, tmp_path):
    """The source does not exist either: that the target is told shows which was looked at first."""
    shutil.copytree(written, tmp_path / "file.safetensors")
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    refused(run("nothing", "--to", "single", "--out", "tiny.ckpt"), "tiny.ckpt does not end in .safetensors")
    refused(run("nothing", "--to", "single", "--out", tmp_path / "file.safetensors"), "is a folder")
    refused(run("nothing", "--to", "diffusers", "--out", tmp_path / "file"), "is a file")
    refused(run("nothing", "--to", "diffusers", "--out", tmp_path / "other"), "other things in it")
    assert (tmp_path / "other" / "letter.txt").exists()


def test_sources_that_are_none_are_told(run, written, tmp_path):
    theirs = small(newer=True)
    save_file(theirs.tensors, tmp_path / "model.safetensors")
    refused(run("nothing", "--to", "single", "--out", "x.safetensors"), "no file or folder nothing")
    refused(run(written / "unet", "--to", "single", "--out", "x.safetensors"), "is not a model folder")
    refused(run(tmp_path / "model.safetensors", "--to", "diffusers", "--out", "x"), "prediction=.epsilon")
    refused(run(written, "--to", "diffusers", "--out", "x", "--prediction", "sample"), "leave prediction out")
    refused(run(written, "--to", "diffusers", "--out", "x", "--tokenizer", "none"), "no tokenizer at none")


@pytest.mark.parametrize("args", [["mini"], ["mini", "--to", "single"], ["mini", "--to", "onnx", "--out", "x"],
                                  ["mini", "--to", "single", "--out", "x", "--dtype", "int8"]])
def test_arguments_that_are_missing_or_unknown_are_told(run, args):
    refused(run(*args), "required|invalid choice")
