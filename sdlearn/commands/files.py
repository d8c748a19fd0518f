"""Files that commands write: checked before the work, written atomically."""

import json
import os
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..files import write_atomically
from ..pipeline import SettingsError

# What earlier versions recorded, and its present name.
RENAMED = {"steps": "num_inference_steps", "guidance": "guidance_scale", "rescale": "guidance_rescale",
           "spacing": "timestep_spacing", "prediction": "prediction_type"}


def check_writable(files: list[Path]) -> list[Path]:
    """Returns the files. Raises SettingsError unless a PNG can be written to each of them."""
    for file in files:
        if file.suffix.lower() != ".png":
            raise SettingsError(f"{file} does not end in .png; images are written as PNG files")
        _check(file)
    return files


def check_json(file: Path):
    """Raises SettingsError where no JSON file can be written."""
    if file.suffix.lower() != ".json":
        raise SettingsError(f"{file} does not end in .json; figures are written as JSON")
    _check(file)


def _check(file: Path):
    try:
        if file.is_dir():
            raise SettingsError(f"{file} is a folder; give the name of a file in it")
        if not file.absolute().parent.is_dir():
            raise SettingsError(f"{file} cannot be written: there is no folder {file.parent}")
        with file.open("ab") if file.exists() else tempfile.TemporaryFile(dir=file.parent):
            pass                            # opened for writing, unchanged
    except OSError as error:
        raise SettingsError(f"{file} cannot be written: {error.strerror or error}") from error


def save_png(file: Path, image, settings: dict):
    """Write an image with its settings, as JSON, in PNG text named "sdlearn"."""
    info = PngInfo()
    info.add_text("Software", "sdlearn")
    info.add_text("sdlearn", json.dumps(settings))
    with write_atomically(file) as beside:
        image.save(beside, format="PNG", pnginfo=info)


def make_folder(folder: Path) -> Path:
    """Returns the folder, which is created where it is missing. Raises SettingsError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"{folder} cannot be made: {error.strerror or error}") from error
    return folder


def read_settings(file: Path) -> dict | None:
    """The settings in a PNG that `save_png` wrote; None where there is no such file, or a truncated one.

    Settings that were recorded under an earlier name are returned under the present one.
    """
    try:
        with Image.open(file) as image:
            image.load()
            settings = json.loads(image.text["sdlearn"])
    except (OSError, AttributeError, KeyError, ValueError, SyntaxError):    # a damaged PNG raises any of them
        return None
    if "steps" in settings:
        settings = {RENAMED.get(name, name): value for name, value in settings.items()} | {"guidance_interval": None}
    return settings


def check_target(out: Path, single: bool):
    """Raises SettingsError where no model can be written, before one is read."""
    if single and out.suffix.lower() != ".safetensors":
        raise SettingsError(f"{out} does not end in .safetensors; single files are written as such")
    if single and out.is_dir():
        raise SettingsError(f"{out} is a folder; give the name of a file in it")
    if not single and out.exists() and not out.is_dir():
        raise SettingsError(f"{out} is a file; give the name of a folder")
    if not single and out.is_dir() and any(out.iterdir()) and not (out / "model_index.json").exists():
        raise SettingsError(f"{out} is a folder with other things in it; give a new one, or that of a model")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(above, os.W_OK):
        raise SettingsError(f"{out} cannot be written: {above} may not be written to")
