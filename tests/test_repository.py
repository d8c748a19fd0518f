"""What the repository holds: lint, top-level names, sizes, paths, executed notebooks, proven claims, the commands.

Every rule is a function that returns a list of complaints, so that each is also tried on a sample
that breaks it.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sdlearn"
TOP_LEVEL = {
    "notebooks", "sdlearn", "tests", "requirements.txt", "environment.yml", "README.md",
    "pyproject.toml", "LICENSE", ".ci", ".gitignore",
}
WEIGHT_BYTES = 64 * 10**6
NOTEBOOK_BYTES = 10**6
CODE_LINES = 430        # the field's longer names wrap more lines; 250 is the aim
# A path that exists on one machine only; not the end of a longer word, as base64 may hold.
MACHINE_PATH = re.compile(r"(?<![\w+])/(?:work|tmp|root|home)/")
TEXT_SUFFIXES = {".py", ".md", ".ipynb", ".toml", ".yml", ".json", ".txt"}
OPEN_COMMAND = "pip install -r requirements.txt && jupyter lab notebooks/00_first_picture.ipynb"
TEST_COMMAND = "pip install -r requirements.txt && pytest"


def ruff_findings(*paths: Path) -> str:
    command = [sys.executable, "-m", "ruff", "check", "--quiet", "--no-cache", "--output-format=concise",
               "--config", str(ROOT / "pyproject.toml"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return "" if done.returncode == 0 else done.stdout + done.stderr or f"exit status {done.returncode}"


def test_ruff_finds_nothing():
    findings = ruff_findings(ROOT / PACKAGE, ROOT / "tests", ROOT / "notebooks")
    assert findings == "", "\n" + findings


@pytest.mark.parametrize("source, rule", [
    ("import os\n", "F401"), ("x = 1;\n", "E703"), (f"x = '{'y' * 120}'\n", "E501"),
    ("import torch\nimport os\n\nprint(torch, os)\n", "I001"), ("zip([1], [2])\n", "B905"),
    ("from typing import List\n\nx: List[int] = []\n", "UP0"),
])
def test_ruff_rules_are_on(tmp_path, source, rule):
    (tmp_path / "sample.py").write_text(source)
    assert rule in ruff_findings(tmp_path)


def tracked(root: Path) -> list[str]:
    """Names of the files that git tracks; skips where the course was unpacked without its history."""
    if not (root / ".git").exists():
        pytest.skip("not a git clone")
    command = ["git", "-c", f"safe.directory={root}", "ls-files", "-z"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return [name for name in names if name and (root / name).is_file()]


def top_level_complaints(names: list[str]) -> list[str]:
    found = {name.split("/")[0] for name in names}
    return ([f"{name} has no place at the top level" for name in sorted(found - TOP_LEVEL)]
            + [f"{name} is missing or not tracked" for name in sorted(TOP_LEVEL - found)])


def size_complaints(root: Path, names: list[str]) -> list[str]:
    """Weights over their common budget, notebooks over their own; sizes in bytes."""
    sizes = {name: (root / name).stat().st_size for name in names}
    weights = sum(size for name, size in sizes.items() if name.startswith(f"{PACKAGE}/weights/"))
    complaints = [f"weights take {weights} bytes"] if weights > WEIGHT_BYTES else []
    return complaints + [f"{name} takes {size} bytes" for name, size in sizes.items()
                         if name.endswith(".ipynb") and size > NOTEBOOK_BYTES]


def machine_paths(name: str, text: str) -> list[str]:
    """Paths of somebody's machine in a file's text; of a notebook, in its sources and text outputs."""
    if name.endswith(".ipynb"):
        text = notebook_text(json.loads(text))
    return [f"{name}: {line.strip()[:100]}" for line in text.splitlines() if MACHINE_PATH.search(line)]


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)


def notebook_text(notebook: dict) -> str:
    parts = []
    for cell in notebook["cells"]:
        parts.append(joined(cell["source"]))
        for output in cell.get("outputs", []):
            parts += [joined(output.get("text", "")), *map(joined, output.get("traceback", []))]
            data = output.get("data", {})
            parts += [joined(data[kind]) for kind in data if kind.startswith("text/")]
    return "\n".join(parts)


def notebook_complaints(notebook: dict) -> list[str]:
    """Where a notebook is too long, or not as a run from a fresh kernel, top to bottom, leaves it."""
    cells = [cell for cell in notebook["cells"]
             if cell["cell_type"] == "code" and joined(cell["source"]).strip()]
    lines = sum(bool(line.strip()) for cell in cells for line in joined(cell["source"]).splitlines())
    counts = [cell.get("execution_count") for cell in cells]
    errors = [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    complaints = [f"a cell ended in {error['ename']}" for error in errors]
    if not cells:
        complaints.append("no code cells")
    if counts != list(range(1, len(cells) + 1)):
        complaints.append(f"not run once from top to bottom: cells are counted {counts}")
    if "widgets" in notebook["metadata"]:
        complaints.append("metadata.widgets is kept: save without widget state")
    if lines > CODE_LINES:
        complaints.append(f"{lines} lines of code, at most {CODE_LINES}")
    return complaints


def claims_without_proof(notebook: dict) -> list[str]:
    """Code cells that are tagged with a claim and assert nothing."""
    return [f"cell {cell.get('id')} is tagged {', '.join(claims)} and asserts nothing"
            for cell in notebook["cells"] if cell["cell_type"] == "code"
            if (claims := [tag for tag in cell.get("metadata", {}).get("tags", []) if tag.startswith("claim:")])
            and not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(joined(cell["source"]))))]


def test_top_level_holds_what_the_design_names():
    assert top_level_complaints(tracked(ROOT)) == []


def test_weights_and_notebooks_keep_their_budgets():
    assert size_complaints(ROOT, tracked(ROOT)) == []


def test_no_file_names_a_path_of_one_machine():
    names = [name for name in tracked(ROOT) if Path(name).suffix in TEXT_SUFFIXES
             or name.startswith(".ci/") and not name.endswith(".safetensors")]
    assert names
    assert [line for name in names for line in machine_paths(name, read(name))] == []


def test_notebooks_are_executed():
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        assert notebook_complaints(json.loads(path.read_text(encoding="utf-8"))) == [], path.name


def test_every_claim_of_a_notebook_is_asserted():
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    notebooks = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    assert any("claim:" in tag for one in notebooks.values() for cell in one["cells"]
               for tag in cell["metadata"].get("tags", []))
    assert {name: found for name, one in notebooks.items() if (found := claims_without_proof(one))} == {}


def test_a_stray_or_missing_top_level_name_is_found():
    names = [f"{name}/file" for name in TOP_LEVEL]
    assert top_level_complaints(names) == []
    assert top_level_complaints([*names, "setup.py"]) == ["setup.py has no place at the top level"]
    assert top_level_complaints([name for name in names if "LICENSE" not in name]) \
        == ["LICENSE is missing or not tracked"]


def test_tracked_lists_what_git_tracks(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for name in ("ä.py", "gone.py", "stray.py"):
        (tmp_path / name).touch()
    subprocess.run(["git", "add", "ä.py", "gone.py"], cwd=tmp_path, check=True)
    (tmp_path / "gone.py").unlink()
    assert tracked(tmp_path) == ["ä.py"]


@pytest.mark.parametrize("name, limit", [
    ("sdlearn/weights/mini/a.bin", 64 * 10**6), ("notebooks/a.ipynb", 10**6),
])
def test_a_file_over_its_budget_is_found(tmp_path, name, limit):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(limit)                    # a hole: takes no room on the disk
    assert size_complaints(tmp_path, [name]) == []
    with path.open("ab") as file:
        file.write(b"x")
    assert len(size_complaints(tmp_path, [name])) == 1


@pytest.mark.parametrize("folder", ["work", "tmp", "root", "home"])
def test_a_machine_path_is_found(folder):
    path = f"/{folder}/me/a.png"
    clean = {"cells": [code_cell(1, data={"image/png": f"QUJD{path}"})]}
    assert machine_paths("a.py", f"see https://a.org{path}, b{path}\n") == []
    assert machine_paths("a.ipynb", json.dumps(clean)) == []
    assert len(machine_paths("a.py", f"x = 1\ny = '{path}'\n")) == 1
    for cell in (code_cell(1, source=f"open('{path}')"), code_cell(1, text=[f"saved {path}\n"]),
                 code_cell(1, data={"text/plain": [f"'{path}'"]})):
        assert len(machine_paths("a.ipynb", json.dumps({"cells": [cell]}))) == 1


def code_cell(count, source="x = 1\n", **output):
    outputs = [{"output_type": "display_data", **output}] if output else []
    return {"cell_type": "code", "execution_count": count, "source": source, "outputs": outputs}


def test_a_notebook_in_order_passes():
    cells = [code_cell(1), {"cell_type": "markdown", "source": "text"}, code_cell(None, source=""),
             code_cell(2, source=["x = 1\n", "\n"] * (CODE_LINES - 1))]    # the limit, with the first cell's line
    assert notebook_complaints({"metadata": {}, "cells": cells}) == []


@pytest.mark.parametrize("cells, metadata, words", [
    ([], {}, "no code cells"),
    ([code_cell(None)], {}, "not run once"),
    ([code_cell(1), code_cell(3)], {}, "not run once"),
    ([code_cell(2), code_cell(1)], {}, "not run once"),
    ([code_cell(1)], {"widgets": {}}, "metadata.widgets"),
    ([code_cell(1, source="x = 1\n" * (CODE_LINES + 1))], {}, f"{CODE_LINES + 1} lines"),
    ([{**code_cell(1), "outputs": [{"output_type": "error", "ename": "KeyError"}]}], {}, "ended in KeyError"),
])
def test_a_notebook_out_of_order_is_found(cells, metadata, words):
    complaints = notebook_complaints({"metadata": metadata, "cells": cells})
    assert len(complaints) == 1 and words in complaints[0]


@pytest.mark.parametrize("source, tags, found", [
    ("x = 1\nassert x", ["claim:Q1.1"], 0), ("for x in [1]:\n    assert x", ["claim:Q1.1"], 0),
    ("x = 1", [], 0), ("x = 1", ["slow"], 0),
    ("x = 1", ["claim:Q1.1"], 1), ("# assert x\nprint('assert')", ["slow", "claim:Q1.1", "claim:F2"], 1),
])
def test_a_claim_without_an_assert_is_found(source, tags, found):
    cell = {**code_cell(1, source=source), "id": "here", "metadata": {"tags": tags}}
    text = {"cell_type": "markdown", "source": "no code", "metadata": {"tags": ["claim:Q1.1"]}}
    complaints = claims_without_proof({"cells": [cell, code_cell(2), text]})
    assert len(complaints) == found and all("here" in one and "claim:Q1.1" in one for one in complaints)


def command_complaints(readme: str, ci: str) -> list[str]:
    """Where the two commands are not the README's first code, or .ci/run does not run the second."""
    code = [line.strip() for line in readme.splitlines() if line.startswith("    ")]
    complaints = [] if code[:2] == [OPEN_COMMAND, TEST_COMMAND] else ["the README starts with other commands"]
    if not re.search(rf'^command="{re.escape(TEST_COMMAND)}"$', ci, re.MULTILINE):
        complaints.append("the README's test command is not the one that .ci/run runs")
    return complaints


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_readme_starts_with_the_two_commands():
    assert command_complaints(read("README.md"), read(".ci/run")) == []
    assert os.access(ROOT / ".ci/run", os.X_OK) or os.name == "nt"


def test_other_commands_are_found():
    ci = f'command="{TEST_COMMAND}"'
    readme = f"# x\n\n    {OPEN_COMMAND}\n\nand\n\n    {TEST_COMMAND}\n"
    assert command_complaints(readme, ci) == []
    assert len(command_complaints(readme, f"{ci} -q")) == 1
    assert len(command_complaints(readme.replace("&& jupyter", "; jupyter"), ci)) == 1
    assert len(command_complaints("    cd sdlearn\n" + readme, ci)) == 1
