"""A room of the package imports only rooms of lower rank; plots, widgets and accelerate keep to theirs.

Every rule is a function that returns a list of complaints, so that each is also tried on a sample
that breaks it.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "sdlearn"

RANKS = {
    "config": 0, "tokenizer": 0, "attention": 0, "layers": 0, "schedule": 0,
    "images": 0,
    "clip": 1, "vae": 1, "unet": 1, "samplers": 1, "guidance": 1, "inpaint": 1,
    "sizes": 1, "tiles": 1,
    "controlnet": 2, "finetune": 2, "prompt": 2, "costs": 2,
    "checkpoint": 3, "data": 3,
    "pipeline": 4, "training": 4, "evaluation": 4,
    "__init__": 4.5,            # sdlearn/__init__.py: hands out what lies below, draws nothing
    "explore": 5, "exercises": 5, "interview": 5, "bench": 5,
    "commands": 6, "__main__": 6,
}
NEIGHBOURS = {"attention", "layers"}    # of one rank; one of them may import the other
LIBRARY_RANKS = {"matplotlib": {5, 6}, "ipywidgets": {5, 6}, "accelerate": {4}}


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of all imports in `source`, those inside functions too.

    `from a import b` counts as a.b, whether b is a module or a name in it. `package` is the
    package that the file lies in, from which relative imports start.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute("." * node.level + (node.module or ""), package)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.lineno, absolute(node.args[0].value, package)))
    return found


def absolute(name: str, package: str) -> str:
    """`..a.b` seen from `package` as a full dotted name."""
    rest = name.lstrip(".")
    level = len(name) - len(rest)
    if level == 0:
        return name
    parents = package.split(".")
    return ".".join(parents[:len(parents) - level + 1] + ([rest] if rest else []))


def room_of(dotted: str) -> str:
    """The room that `sdlearn.room.anything` names; a name taken from sdlearn itself is its __init__'s."""
    room = (dotted.split(".") + [""])[1]
    return room if room in RANKS else "__init__"


def rank_complaints(folder: Path) -> list[str]:
    """What in the package at `folder` imports a room or a library that its rank does not allow."""
    complaints, taken = [], set()
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        room = relative.parts[0].removesuffix(".py")
        if room not in RANKS:
            complaints.append(f"{relative}: unknown room {room}: give it a rank in the design and here")
            continue
        package = ".".join((PACKAGE, *relative.parent.parts))
        for line, name in imports(path.read_text(encoding="utf-8"), package):
            library = name.split(".")[0]
            if RANKS[room] not in LIBRARY_RANKS.get(library, {RANKS[room]}):
                complaints.append(f"{relative}:{line}: {library} has no place in rank {RANKS[room]}")
            if library == PACKAGE and not may_import(room, room_of(name)):
                complaints.append(f"{relative}:{line}: {room} (rank {RANKS[room]}) imports "
                                  f"{room_of(name)} (rank {RANKS[room_of(name)]})")
            if library == PACKAGE:
                taken.add((room, room_of(name)))
    if {("attention", "layers"), ("layers", "attention")} <= taken:
        complaints.append("attention and layers import each other")
    return complaints


def may_import(room: str, other: str) -> bool:
    return RANKS[other] < RANKS[room] or other in (room, "config") or {room, other} == NEIGHBOURS


def package_of(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root / PACKAGE


def test_rooms_import_only_rooms_below_them():
    assert rank_complaints(ROOT / PACKAGE) == []


def test_allowed_imports_pass(tmp_path):
    folder = package_of(tmp_path, {
        "__init__.py": "from .pipeline import StableDiffusion\n",
        "config.py": "import torch\n",
        "layers.py": "from sdlearn.attention import attend\nfrom .config import UNetConfig\n",
        "unet.py": "def f():\n    from . import layers, config\n",
        "data/__init__.py": "from .scenes import scenes\n",
        "data/scenes.py": "from ..unet import UNet\nfrom . import world\nimport sdlearn.data.world\n",
        "training/loop.py": "import accelerate\nfrom ..data import scenes\n",
        "explore/plots.py": "import matplotlib.pyplot as plt\nimport ipywidgets\n",
        "__main__.py": "from sdlearn import StableDiffusion\n",
    })
    assert rank_complaints(folder) == []


@pytest.mark.parametrize("name, source, words", [
    ("layers.py", "from .unet import UNet", "imports unet"),
    ("unet.py", "def f():\n    from .pipeline import StableDiffusion", "imports pipeline"),
    ("unet.py", "from . import vae", "imports vae"),                        # the same rank, another room
    ("vae.py", "import sdlearn.clip", "imports clip"),
    ("schedule.py", "if True:\n    from sdlearn.layers import x", "imports layers"),
    ("config.py", "from .tokenizer import Tokenizer", "imports tokenizer"),
    ("data/scenes.py", "from ..checkpoint import load", "imports checkpoint"),
    ("data/deep/inner.py", "from ...training import x", "imports training"),
    ("data/__init__.py", "from .. import pipeline", "imports pipeline"),
    ("clip.py", "import importlib\nimportlib.import_module('sdlearn.data')", "imports data"),
    ("clip.py", "from importlib import import_module\nimport_module('.data', 'sdlearn')", "imports data"),
    ("vae.py", "from sdlearn import StableDiffusion", "imports __init__"),
    ("__init__.py", "from . import explore", "imports explore"),
    ("helpers.py", "", "unknown room helpers"),
    ("utils/text.py", "", "unknown room utils"),
    ("pipeline.py", "def f():\n    import matplotlib.pyplot as plt", "matplotlib has no place"),
    ("__init__.py", "import matplotlib", "matplotlib has no place"),
    ("training/loop.py", "from ipywidgets import Button", "ipywidgets has no place"),
    ("unet.py", "from accelerate import Accelerator", "accelerate has no place"),
    ("explore/run.py", "import accelerate", "accelerate has no place"),
])
def test_a_forbidden_import_is_found(tmp_path, name, source, words):
    complaints = rank_complaints(package_of(tmp_path, {name: source}))
    assert len(complaints) == 1 and words in complaints[0] and name in complaints[0]


def test_neighbours_may_not_import_each_other_both_ways(tmp_path):
    folder = package_of(tmp_path, {
        "attention.py": "from .layers import ResBlock", "layers.py": "from .attention import attend"})
    assert rank_complaints(folder) == ["attention and layers import each other"]


def architecture_complaints(readme: str, folder: Path) -> list[str]:
    """Where the README's table of rooms differs from the rooms that are there, and their ranks."""
    told = {}
    for rank, rooms in re.findall(r"^\| (\d) \| ([^|]+) \|", readme, re.MULTILINE):
        told |= {room.rstrip("/").removesuffix(".py"): int(rank) for room in re.findall(r"`([^`]+)`", rooms)}
    names = {path.relative_to(folder).parts[0].removesuffix(".py") for path in folder.rglob("*.py")}
    there = {name: RANKS.get(name) for name in names - {"__init__"}}
    return [f"{room}: the README says rank {told.get(room)}, the package {there.get(room)}"
            for room in sorted(told.keys() | there.keys()) if told.get(room) != there.get(room)]


def test_readme_tells_the_rooms_that_are_there():
    assert architecture_complaints((ROOT / "README.md").read_text(encoding="utf-8"), ROOT / PACKAGE) == []


def test_a_table_of_other_rooms_is_found(tmp_path):
    table = "| 0 | `config.py`, `layers.py` | x |\n| 3 | `data/` | y |\n"
    folder = package_of(tmp_path, {"config.py": "", "layers.py": "", "data/scenes.py": ""})
    assert architecture_complaints(table, folder) == []
    assert len(architecture_complaints(table.replace("3", "4"), folder)) == 1
    assert len(architecture_complaints(table.replace(", `layers.py`", ""), folder)) == 1
    assert len(architecture_complaints(table + "| 1 | `vae.py` | z |\n", folder)) == 1
