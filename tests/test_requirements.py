"""requirements.txt, environment.yml and pyproject.toml tell the same story, and leave no library out.

Every rule is a function that returns a list of complaints, so that each is also tried on a sample
that breaks it.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sdlearn"


def requirement_lines(text: str) -> list[str]:
    lines = (line.split(" #")[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def ranges(pyproject: dict) -> dict[str, SpecifierSet]:
    """Range of every library that pyproject names, extras included."""
    project = pyproject["project"]
    lines = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, lines)}


def pin_complaints(requirements: str, pyproject: dict) -> list[str]:
    """Where requirements.txt is not one pin for each range of pyproject, and the package at the end."""
    *lines, last = requirement_lines(requirements)
    complaints = [] if last == "-e ." else ["the last line does not install the package: -e ."]
    allowed, pinned = ranges(pyproject), set()
    for line in lines:
        match = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
        if match is None:
            complaints.append(f"not a pin: {line}")
            continue
        name = canonicalize_name(match[1])
        pinned.add(name)
        if name not in allowed:
            complaints.append(f"{name} is pinned, but pyproject does not name it")
        elif not allowed[name].contains(match[2], prereleases=True):
            complaints.append(f"{line} is outside pyproject's {allowed[name]}")
    return complaints + [f"{name} has no pin" for name in sorted(allowed.keys() - pinned)]


def environment_complaints(environment: str, requirements: str, python: str) -> list[str]:
    """Where environment.yml's pip section differs from requirements.txt, or its Python is too old."""
    dependencies = yaml.safe_load(environment)["dependencies"]
    pip = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    versions = [entry.split("=")[-1] for entry in dependencies if str(entry).startswith("python=")]
    complaints = []
    if pip != [requirement_lines(requirements)]:
        complaints.append("the pip section differs from requirements.txt")
    if "pip" not in dependencies:
        complaints.append("pip itself is missing")
    if len(versions) != 1 or not SpecifierSet(python).contains(versions[0]):
        complaints.append(f"python is {versions}, pyproject asks for {python}")
    return complaints


def imported_libraries(source: str) -> set[str]:
    """Top-level names of everything that `source` imports absolutely, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def undeclared(folders: list[Path], declared: set[str]) -> list[str]:
    """Libraries that are imported in `folders` and named by no requirement."""
    renamed = {"PIL": "pillow", "yaml": "pyyaml", "importlinter": "import-linter"}
    local = {PACKAGE} | {path.stem for folder in folders for path in folder.rglob("*.py")}
    local |= {path.name for folder in folders for path in folder.rglob("*") if path.is_dir()}
    complaints = set()
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for library in imported_libraries(path.read_text(encoding="utf-8")) - local - set(sys.stdlib_module_names):
            if canonicalize_name(renamed.get(library, library)) not in declared:
                complaints.add(f"{path.name} imports {library}, which no requirement names")
    return sorted(complaints)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read_pyproject() -> dict:
    return tomllib.loads(read("pyproject.toml"))


def test_every_range_has_one_pin_inside_it():
    assert pin_complaints(read("requirements.txt"), read_pyproject()) == []


def test_environment_is_in_step_with_requirements():
    python = read_pyproject()["project"]["requires-python"]
    assert environment_complaints(read("environment.yml"), read("requirements.txt"), python) == []


def test_every_imported_library_is_a_requirement():
    assert undeclared([ROOT / PACKAGE, ROOT / "tests"], set(ranges(read_pyproject()))) == []


@pytest.mark.parametrize("lines, words", [
    ("a==1.5\nb_c==2.0\n", "does not install the package"),
    ("a==2.5\nb-c==2.0\n-e .\n", "outside pyproject's"),
    ("a>=1.5\nb-c==2.0\n-e .\n", "not a pin"),
    ("a==1.5\n-e .\n", "b-c has no pin"),
    ("a==1.5\nb-c==2.0\nd==1\n-e .\n", "d is pinned"),
])
def test_a_bad_pin_is_found(lines, words):
    pyproject = {"project": {"dependencies": ["a>=1,<2"], "optional-dependencies": {"test": ["B.C>=2"]}}}
    assert pin_complaints("# pins\na==1.5 # why\nb-c==2.0\n-e .", pyproject) == []
    assert any(words in complaint for complaint in pin_complaints(lines, pyproject))


@pytest.mark.parametrize("environment, complaints", [
    ("dependencies: [python=3.11, pip, pip: [a==1, -e .]]", 0),
    ("dependencies: [python=3.11, pip, pip: [a==2, -e .]]", 1),
    ("dependencies: [python=3.11, pip, pip: [a==1]]", 1),
    ("dependencies: [python=3.10, pip, pip: [a==1, -e .]]", 1),
    ("dependencies: [pip, pip: [a==1, -e .]]", 1),
    ("dependencies: [python=3.11]", 2),
])
def test_an_environment_out_of_step_is_found(environment, complaints):
    assert len(environment_complaints(environment, "a==1\n-e .\n", ">=3.11")) == complaints


def test_an_undeclared_library_is_found(tmp_path):
    (tmp_path / "one.py").write_text("import os, PIL.Image\ndef f():\n    import scipy.ndimage\nimport two")
    (tmp_path / "two.py").write_text("from sdlearn import data\nfrom . import one")
    assert undeclared([tmp_path], {"pillow"}) == ["one.py imports scipy, which no requirement names"]
