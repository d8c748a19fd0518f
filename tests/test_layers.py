"""The layers of the package: import-linter's contracts in pyproject.toml hold, notice what breaks them, and are what
the README's table shows."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sdlearn"
LINT = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


def lint(folder: Path) -> tuple[int, str]:
    """Exit status and output of import-linter on the package in `folder`, by the contracts beside it."""
    done = subprocess.run([sys.executable, "-c", LINT, "--no-cache"], cwd=folder, capture_output=True, text=True,
                          env={"PYTHONPATH": str(folder), "PATH": "", "HOME": str(folder), "COLUMNS": "200"})
    return done.returncode, done.stdout + done.stderr


def layers() -> list[set[str]]:
    """Names of the modules and packages of each layer, the lowest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    [rows] = [contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers"]
    return [set(re.findall(r"\w+", row)) for row in reversed(rows)]


def existing_modules() -> set[str]:
    return {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")} - {"__init__"}


def test_a_module_imports_only_from_layers_below_its_own():
    status, output = lint(ROOT)
    assert status == 0, output


@pytest.mark.parametrize("file, line, contract", [
    ("unet.py", "from .pipeline import StableDiffusion", "layers below its own"),
    ("unet.py", "def f():\n    from . import vae", "layers below its own"),                # the same layer
    ("data/scenes.py", "import sdlearn.checkpoint", "layers below its own"),
    ("config.py", "from .tokenizer import Tokenizer", "layers below its own"),
    ("helpers.py", "", "layers below its own"),                                             # in no layer
    ("evaluation/judge.py", "import matplotlib.pyplot", "belong to explore"),
    ("explore/curves.py", "from accelerate import Accelerator", "belong to training"),
])
def test_a_forbidden_import_is_noticed(tmp_path, file, line, contract):
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / "sdlearn" / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    broken = tmp_path / "sdlearn" / file
    broken.write_text((broken.read_text(encoding="utf-8") if broken.exists() else "") + f"\n{line}\n", encoding="utf-8")
    status, output = lint(tmp_path)
    assert status != 0
    assert contract in output and file.removesuffix(".py").replace("/", ".") in output


def test_imports_by_name_are_known():
    """import-linter does not see importlib: only the command line and the exercises load modules by name."""
    users = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")
             for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", ""))
             in ("import_module", "__import__")}
    assert users <= {"__main__", "exercises"}


def rows_of(readme: str) -> list[set[str]]:
    """Names in the first column of the README's table of layers, row by row."""
    table = readme.split("| layer, lowest first |")[1].split("\n\n")[0]
    return [set(re.findall(r"`(\w+?)(?:\.py|/)?`", line.split("|")[1])) for line in table.splitlines()[2:]]


def test_the_readme_shows_the_layers_that_exist():
    shown = rows_of((ROOT / "README.md").read_text(encoding="utf-8"))
    wanted = [layer & existing_modules() for layer in layers()]
    assert shown == [layer for layer in wanted if layer]


def test_a_table_that_lacks_a_module_or_has_another_order_is_noticed():
    table = "| layer, lowest first | what it holds |\n|---|---|\n| `config.py` | x |\n| `data/`, `clip.py` | y |\n\n"
    assert rows_of(table) == [{"config"}, {"data", "clip"}]
    assert rows_of(table.replace(", `clip.py`", "")) == [{"config"}, {"data"}]
