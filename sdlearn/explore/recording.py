"""Values that a notebook measured, quoted in its text between markers.

A code cell calls `record(psnr=28.53)`. A Markdown cell quotes the value with a marker, whose comments do not show
when the text is rendered:

    PSNR is <!--psnr:.1f-->28.5<!--/--> dB.

The part after the colon is a Python format specification. `fill_values` writes the recorded values between the
markers, and `find_stale_values` lists the texts that differ, so that new weights leave no old number behind. Texts
outside of a notebook (README.md) quote with the notebook's number in front: `<!--01.psnr:.1f-->28.5<!--/-->`.
"""

import json
import re
from pathlib import Path

from IPython.display import display

MIME_TYPE = "application/vnd.sdlearn.values+json"
MARKER = re.compile(r"<!--(?P<name>[\w.]+)(?::(?P<format>[^\s>]*))?-->(?P<text>.*?)<!--/-->", re.DOTALL)

Value = float | int | str | bool


def record(**values: Value):
    """Store values with the running cell's output, where `fill_values` finds them. Nothing is shown.

    Tensors and arrays of one element become numbers. Raises TypeError for anything else than a number or text.
    """
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    for name, value in plain.items():
        if not isinstance(value, Value):
            raise TypeError(f"{name} is a {type(value).__name__}; record takes numbers and text")
    display({MIME_TYPE: plain}, raw=True)


def read_notebook(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_notebook(path: Path, notebook: dict):
    """In nbformat's own layout: one space of indentation, a final line break."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def recorded_values(notebook: dict) -> dict[str, Value]:
    """The values that the cells of an executed notebook recorded. Raises ValueError where two cells record one name."""
    values = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            for name, value in output.get("data", {}).get(MIME_TYPE, {}).items():
                if name in values:
                    raise ValueError(f"two cells record {name}")
                values[name] = value
    return values


def format_value(value: Value, specification: str) -> str:
    """As `format`, with a typographic minus sign for negative numbers that take one in a text: -0.5 becomes −0.5."""
    text = format(value, specification)
    return text if isinstance(value, str) else text.replace("-", "\u2212") if text.startswith("-") else text


def fill_text(text: str, values: dict[str, Value]) -> str:
    """`text` with each marker's value written in. Raises KeyError for a name that no cell recorded."""
    def fill(match: re.Match) -> str:
        specification = match["format"] or ""
        marker = match["name"] + (f":{specification}" if specification else "")
        return f"<!--{marker}-->{format_value(values[match['name']], specification)}<!--/-->"

    return MARKER.sub(fill, text)


def join_source(cell: dict) -> str:
    return "".join(cell["source"])


def fill_values(notebook: dict) -> dict:
    """The notebook with its recorded values written into its Markdown cells; the cells are changed in place."""
    values = recorded_values(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = fill_text(join_source(cell), values).splitlines(keepends=True)
    return notebook


def find_stale_values(notebook: dict) -> list[str]:
    """One line for each marker whose text is not the recorded value, or whose name no cell recorded."""
    values, stale = recorded_values(notebook), []
    for index, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "markdown":
            continue
        for match in MARKER.finditer(join_source(cell)):
            if match["name"] not in values:
                stale.append(f"cell {index} quotes {match['name']}, which no cell recorded")
            elif match["text"] != (value := format_value(values[match["name"]], match["format"] or "")):
                stale.append(f"cell {index} quotes {match['name']} as {match['text']}; it is {value}")
    return stale


def values_of_course(folder: Path) -> dict[str, Value]:
    """Recorded values of all notebooks in `folder`, named by the notebook's number: `01.psnr`."""
    return {f"{path.name[:2]}.{name}": value for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))
            for name, value in recorded_values(read_notebook(path)).items()}
