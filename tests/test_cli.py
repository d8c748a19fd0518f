"""`python -m sdlearn`: images into files, one sentence for what is wrong, nothing half-written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from models import one_thread, tiny_parts  # noqa: F401
from PIL import Image

from sdlearn.__main__ import COMMANDS, main
from sdlearn.checkpoint import save_folder
from sdlearn.commands import files as command_files
from sdlearn.data import WORLDS, contact_sheet, draw_scenes
from sdlearn.pipeline import PromptWarning, StableDiffusion

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("models") / "tiny", tiny_parts())


@pytest.fixture
def run(written, tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder with the tiny model; gives status, stdout, stderr, files written."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)

    def run(command, *args, model=written):
        if command == "generate":
            args = ("--model", model, "--device", "cpu", *args)
        before = set(here.rglob("*"))
        try:
            status = main([command, *map(str, args)])
        except SystemExit as stop:      # argparse's own errors
            status = stop.code
        out, err = capsys.readouterr()
        return types.SimpleNamespace(status=status, out=out, err=err, files=sorted(
            str(path.relative_to(here)) for path in set(here.rglob("*")) - before))

    return run


def refused(result, told):
    assert result.status == 2
    assert result.files == []
    assert result.out == ""
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(told, last), last
    assert "Traceback" not in result.err
    assert [line for line in result.err.splitlines() if not line.startswith("note: ")] == [last]


# --- generate ---------------------------------------------------------------------------------------

def test_an_image_is_written_with_its_settings(run, written):
    result = run("generate", PROMPT, "--negative", "a cat", "--steps", 3, "--sampler", "euler", "--guidance", 4,
                 "--size", "24x16", "--seed", 5, "--out", "apple.png")
    assert (result.status, result.out, result.files) == (0, "apple.png\n", ["apple.png"])
    assert "3/3" in result.err          # the progress bar
    with Image.open("apple.png") as image:
        told = json.loads(image.text["sdlearn"])
        pixels = np.asarray(image)
    assert re.fullmatch("[0-9a-f]{16}", told.pop("weights"))
    assert told == {"prompt": PROMPT, "negative_prompt": "a cat", "num_inference_steps": 3, "sampler": "euler",
                    "guidance_scale": 4.0,
                    "size": "24x16", "batch": 1, "seed": 5, "model": str(written), "guidance_rescale": 0.0,
                    "timestep_spacing": None,
                    "long_prompts": "cut", "dtype": "float32", "resample": 1}
    model = StableDiffusion.load(written, device="cpu")
    [wanted] = model.text2img(PROMPT, "a cat", num_inference_steps=3, sampler="euler", guidance_scale=4.0,
                              size=(24, 16), seed=5)
    assert np.array_equal(pixels, np.asarray(wanted))


def test_an_image_tells_the_model_s_default_settings_that_it_was_made_with(run, written):
    sampling = json.loads((written / "sampling.json").read_text(encoding="utf-8"))
    result = run("generate", PROMPT, "--size", "16", "--out", "apple.png")
    steps = sampling["num_inference_steps"]
    assert result.status == 0 and f"{steps}/{steps}" in result.err
    with Image.open("apple.png") as image:
        told = json.loads(image.text["sdlearn"])
    assert (told["num_inference_steps"], told["guidance_scale"]) == (steps, sampling["guidance_scale"])


def test_a_batch_is_numbered_and_each_image_can_be_made_again_alone(run):
    result = run("generate", PROMPT, "--steps", 2, "--batch", 3, "--seed", 5, "--out", "apple.png")
    assert result.files == ["apple-0.png", "apple-1.png", "apple-2.png"]
    with Image.open("apple-2.png") as image:
        told, pixels = json.loads(image.text["sdlearn"]), np.asarray(image)
    assert (told["seed"], told["batch"]) == (7, 1)
    run("generate", PROMPT, "--steps", 2, "--seed", told["seed"], "--out", "again.png")
    with Image.open("again.png") as image:
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 1        # of 255


@pytest.mark.parametrize("prompt, name", [
    ("A red apple: on TOP?", "a-red-apple-on-top-3.png"), ("", "image-3.png"), ("🦊/../\n", "image-3.png"),
    ("x" * 500, "x" * 60 + "-3.png"),
])
def test_without_a_name_the_file_is_named_after_the_prompt(run, prompt, name):
    assert run("generate", prompt, "--steps", 1, "--seed", 3).files == [name]


def test_what_will_not_be_heard_is_noted_once_and_the_image_made(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptWarning)       # told as a note, so not once more as a warning
        result = run("generate", "a purple dragon", "--steps", 1, "--out", "x.png")
    assert result.status == 0 and result.files == ["x.png"]
    assert result.err.count("dragon") == 1
    assert "note: the model was never taught 'purple', 'dragon'; it will guess" in result.err
    result = run("generate", "a red apple " * 125, "--steps", 1, "--out", "long.png")
    assert result.files == ["long.png"]
    assert 'note: the prompt is longer than 77 tokens; its end is cut off: "a red apple' in result.err
    result = run("generate", "", "--steps", 1, "--out", "empty.png")
    assert result.files == ["empty.png"]
    assert "note: the prompt is empty, so the image is unconditional" in result.err
    result = run("generate", PROMPT, "--steps", 1, "--out", "quiet.png")
    assert "note:" not in result.err


def test_a_long_prompt_in_chunks_is_read_to_its_end_without_a_note(run):
    prompts = ["apple " * 100 + end for end in ("cat", "star")]
    for i, prompt in enumerate(prompts):
        result = run("generate", prompt, "--negative", prompts[0], "--steps", 1, "--long-prompts", "chunks",
                     "--out", f"{i}.png")
        assert result.status == 0 and "note:" not in result.err
    with Image.open("0.png") as one, Image.open("1.png") as other:
        assert one.tobytes() != other.tobytes()
        assert json.loads(one.text["sdlearn"])["long_prompts"] == "chunks"


@pytest.mark.parametrize("prompt", ["🦊 ❤️ 👨‍👩‍👧", "a\x00red\x1b[31m\x7fapple\t\n\r", "\u202eelppa"], ids=ascii)
def test_emoji_and_control_characters_run_and_are_kept_in_the_settings(run, prompt):
    result = run("generate", prompt, "--steps", 1, "--out", "x.png")
    assert result.status == 0
    with Image.open("x.png") as image:
        assert json.loads(image.text["sdlearn"])["prompt"] == prompt


@pytest.mark.parametrize("args, told", [
    (["--size", "33"], "33x33 is not a multiple of 2 pixels; the nearest is 32x32"),
    (["--size", "0"], "0x0 cannot be made; give sides of 2 to 2048 pixels"),
    (["--size=-32"], "-32x-32 cannot be made"),
    (["--size", "1000000"], "1000000x1000000 cannot be made"),
    (["--size", "12by9"], "'12by9' is not a size; give 128 or, as width and height, 160x96"),
    (["--steps", "0"], "0 steps asked for: give a whole number from 1 to 1000"),
    (["--steps", "2000"], "2000 steps asked for"),
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--sampler", "magic"], "no sampler 'magic'; choose one of ddpm, ddim, euler"),
    (["--guidance", "nan"], "guidance_scale is nan; give a finite number"),
    (["--guidance", "inf"], "guidance_scale is inf"),
    (["--batch", "0"], "batch is 0; give a whole number from 1 to"),
    (["--seed", "-1"], "seed is -1"),
    (["--colour", "red"], "unrecognized arguments: --colour red"),
    (["--out", "missing/apple.png"], "apple.png cannot be written: there is no folder missing"),
    (["--out", "."], r"\. does not end in .png"),
    (["--out", "apple.jpg"], "apple.jpg does not end in .png"),
])
def test_bad_input_is_one_sentence_and_status_2(run, args, told, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "iter_steps", lambda *_, **__: pytest.fail("sampled"))
    refused(run("generate", PROMPT, *args), told)


def test_an_output_that_cannot_be_written_is_told_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "iter_steps", lambda *_, **__: pytest.fail("sampled"))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    refused(run("generate", PROMPT, "--out", tmp_path / "folder.png"), "is a folder; give the name of a file in it")
    refused(run("generate", PROMPT, "--out", tmp_path / "file" / "x.png"), "there is no folder")
    refused(run("generate", PROMPT, "--out", "x" * 300 + ".png"), "cannot be written: File name too long")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(command_files.tempfile, "TemporaryFile", denied)
    refused(run("generate", PROMPT, "--out", "x.png"), "x.png cannot be written: Permission denied")


def test_an_image_that_is_there_stays_whole_when_the_work_fails(run):
    run("generate", PROMPT, "--steps", 1, "--out", "apple.png")
    before = open("apple.png", "rb").read()
    failed = run("generate", PROMPT, "--guidance", "1e38", "--out", "apple.png")
    assert (failed.status, failed.files, failed.out) == (2, [], "")
    assert failed.err.splitlines()[-1].startswith("error: the latent became NaN or infinite")
    assert open("apple.png", "rb").read() == before


def test_half_a_surrogate_pair_is_no_text(run):
    """What the shell's bytes become when they are not UTF-8."""
    refused(run("generate", "a red \udcff apple"), "not valid Unicode: character 6 is half a surrogate")


def test_models_that_are_missing_or_damaged_are_told(run, written, tmp_path):
    refused(run("generate", PROMPT, model="maxi"), "no model 'maxi'; give the path of a model folder")
    (tmp_path / "nothing").mkdir()
    refused(run("generate", PROMPT, model=tmp_path / "nothing"), "nothing is not a model folder")
    damaged = shutil.copytree(written, tmp_path / "damaged")
    file = damaged / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(run("generate", PROMPT, model=damaged), f"{file} is truncated or not a safetensors file")
    shutil.copy(written / "vae" / file.name, file)
    refused(run("generate", PROMPT, model=damaged), "does not fit the config.json beside it: of its tensors, ")
    file.unlink()
    refused(run("generate", PROMPT, model=damaged), f"{file} is missing")


def test_too_little_memory_and_a_missing_device_are_told(run, monkeypatch):
    def greedy(*_, **__):
        raise MemoryError("not enough memory for the images; ask for fewer")

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "iter_steps", greedy)
        refused(run("generate", PROMPT), "not enough memory")
    refused(run("generate", PROMPT, "--device", "abacus"), "no device")


def test_ctrl_c_is_status_130_without_a_traceback(run, monkeypatch):
    def stopped(*_, **__):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(StableDiffusion, "iter_steps", stopped)
    result = run("generate", PROMPT, "--out", "x.png")
    assert (result.status, result.files, result.out) == (130, [], "")
    assert "Traceback" not in result.err and "stopped" in result.err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to send")
def test_ctrl_c_ends_a_real_process_in_the_middle(written, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "sdlearn", "generate", PROMPT, "--model", written, "--steps", "1000", "--size", "512",
         "--device", "cpu", "--out", tmp_path / "x.png"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # as in a terminal: a shell's background jobs ignore it, and so would their children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    told = ""
    while "step/s" not in told and process.poll() is None:      # sampling has begun
        told += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert "Traceback" not in told + rest
    assert list(tmp_path.iterdir()) == []


# --- the rest ---------------------------------------------------------------------------------------

def test_help_comes_without_pytorch():
    code = ("import sys\nfrom sdlearn.__main__ import main\n"
            "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("generate", "scenes", "train"))


@pytest.mark.parametrize("args, told", [([], "required: command"), (["draw"], "invalid choice: 'draw'")])
def test_an_unknown_command_is_status_2(args, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_scenes_are_drawn_on_a_sheet(run):
    result = run("scenes", "--seed", 3, "--count", 5, "--split", "test", "--out", "sheet.png")
    assert (result.status, result.files) == (0, ["sheet.png"])
    with Image.open("sheet.png") as image:
        assert image.width > 5 * 128 and image.height > 128
        assert json.loads(image.text["sdlearn"]) == {"seed": 3, "count": 5, "split": "test", "world": "full"}


@pytest.mark.parametrize("seed, count, split, world", [
    (0, 2, "train", "full"), (0, 2, "test", "full"), (5, 1, "test", "full"), (0, 2, "train", "core")])
def test_a_sheet_holds_the_scenes_of_its_seed_split_and_world(run, seed, count, split, world):
    options = ("--seed", seed, "--count", count, "--split", split, "--world", world)
    assert run("scenes", *options, "--out", "sheet.png").status == 0
    wanted = list(draw_scenes(seed, count, split, WORLDS[world]))
    with Image.open("sheet.png") as image:
        sheet = contact_sheet([one.image for one in wanted], [one.caption for one in wanted])
        assert np.array_equal(np.asarray(image), np.asarray(sheet))


def test_the_splits_and_worlds_of_a_sheet_differ(run):
    sheets = []
    for i, options in enumerate(((), ("--split", "test"), ("--world", "core"), ("--seed", 1))):
        run("scenes", "--count", 2, *options, "--out", f"{i}.png")
        with Image.open(f"{i}.png") as image:
            sheets.append((image.size, image.tobytes()))
    assert len(set(sheets)) == len(sheets)


@pytest.mark.parametrize("args, told", [
    (["--count", "0"], "count is 0"), (["--split", "exam"], "invalid choice: 'exam'"),
    (["--out", "missing/sheet.png"], "no folder missing"),
])
def test_bad_input_for_scenes(run, args, told):
    refused(run("scenes", *args), told)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize("dry", [{"DRY": "print"}, {"DRY": "1", "PYTHON": "echo"}], ids=["print", "small"])
def test_what_the_gpu_script_runs_is_understood(dry, monkeypatch, tmp_path):
    """Every command of it, at full size and at small size; none is run."""
    script = Path(__file__).resolve().parent.parent / ".ci" / "gpu"
    done = subprocess.run(["bash", str(script), "all", str(tmp_path)], env=os.environ | dry, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("python ").split() for line in done.stdout.splitlines()]
    commands = [words for words in lines if "sdlearn" in words]
    seen = []
    for words in commands:
        module = import_module(f"sdlearn.{COMMANDS[words[2]][1]}")
        monkeypatch.setattr(module, "run", seen.append)
        assert words[:2] == ["-m", "sdlearn"] and main(words[2:]) == 0
    assert len(seen) == len(commands) >= 5
    training, = (args for args in seen if getattr(args, "stage", "") == "all")
    assert training.minutes <= 25 and training.start is None


def test_train_hands_over_to_the_recipes(run, monkeypatch):
    from sdlearn.commands import train as command

    seen = []
    monkeypatch.setattr(command, "run", seen.append)
    assert run("train", "vae", "--minutes", "0.5").status == 0
    assert (seen[0].stage, seen[0].minutes) == ("vae", 0.5)

    def fails(_):
        raise FileNotFoundError("the stage 'vae' has not been trained")

    monkeypatch.setattr(command, "run", fails)
    refused(run("train", "unet"), "the stage 'vae' has not been trained")
