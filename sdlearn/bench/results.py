"""Results of benchmarks that are shipped with the package: what `bench --out` and `optimizations --out` wrote.

    for result in load_results():
        print(result.title, [row.name for row in result.rows])

Files lie in `weights/bench`, any number of them. A figure is shown with the machine, versions and date of its
measurement; for what was not measured there is None. Files with the keys of earlier versions are read, too.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import CheckpointError
from ..checkpoint.files import read_json
from ..checkpoint.shipped import SHIPPED
from .optimizations import list_steps

RESULTS = SHIPPED / "bench"
FEWER = re.compile(r"\d+( steps of .*)")        # the step with fewer sampling steps is named after their number
# Keys of earlier versions, and today's.
OLD_KEYS = {"race": "benchmark", "contenders": "implementations", "ladder": "optimization steps", "rung": "name",
            "of the rung before": "time relative to the previous", "of the first": "time relative to the first"}


@dataclass(frozen=True)
class ResultRow:
    """An implementation of a comparison, or an optimization step.

    relative_time: its seconds over the first row's, None if the images differ. memory: peak in MiB, None if unknown.
    difference: of pixels in [0, 255], the largest: from a comparison's first image, from the previous step's.
    difference_from_first: of optimization steps; None in older files, which lack it.
    """

    name: str
    seconds: float
    relative_time: float | None
    memory: float | None
    difference: int
    exact: bool = True
    difference_from_first: int | None = None


@dataclass(frozen=True)
class Result:
    """One file. kind: "comparison" or "optimizations". title: what was measured, where, when, with which versions."""

    name: str
    kind: str
    title: str
    rows: tuple[ResultRow, ...]
    decoding: float | None = None       # seconds for the batch, of optimization steps

    def find_row(self, name: str) -> ResultRow | None:
        return next((row for row in self.rows if canonical_name(row.name) == canonical_name(name)), None)


def load_results(folder: Path = RESULTS) -> list[Result]:
    """All results of a folder, by date, then by name; none where there is no such folder.

    Raises CheckpointError, which names the file, for one that holds no result.
    """
    read = [(file, read_json(file)) for file in sorted(Path(folder).glob("*.json"))]
    return [parse_result(file, data) for file, data in sorted(read, key=lambda one: str(one[1].get("date")))]


def rename_keys(data):
    """JSON data with `OLD_KEYS` replaced in every dictionary."""
    if isinstance(data, dict):
        return {OLD_KEYS.get(key, key): rename_keys(value) for key, value in data.items()}
    return [rename_keys(value) for value in data] if isinstance(data, list) else data


def parse_result(file: Path, data: dict) -> Result:
    """The result in a file's JSON data. Raises CheckpointError."""
    try:
        data = rename_keys(data)
        where = f"{data['machine']}, {data['date']}, torch {data['versions']['torch']}"
        if "optimization steps" in data:
            rows = tuple(ResultRow(step["name"], step["seconds"], step["time relative to the first"],
                                   step.get("peak memory, MiB"), step["largest difference"], step["exact"],
                                   step.get("largest difference from the first"))
                         for step in data["optimization steps"])
            what = f"{data['preset']}, {data['batch']} of {data['size']} x {data['size']}"
            return Result(file.stem, "optimizations", f"{what}; {where}", rows, data["seconds to decode"])
        settings, implementations = data["benchmark"], data["implementations"]
        first = next(iter(implementations))
        ratios = data.get(f"time of {first} to that of", {})
        relative = {first: 1.0, **{name: 1 / ratio for name, ratio in ratios.items()}}
        rows = tuple(ResultRow(name, one["seconds"], relative.get(name), one["peak memory, MiB"],
                               one["largest difference"]) for name, one in implementations.items())
        what = (f"{settings['preset']}, {settings['batch']} of {settings['size']} x {settings['size']}, "
                f"{settings['steps']} steps of {settings['sampler']}, {settings['dtype']}")
        return Result(file.stem, "comparison", f"{what}; {where}", rows)
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise CheckpointError(f"{file} holds no result of `bench` or `optimizations` ({type(error).__name__}: "
                              f"{error}); write it again with --out, or remove it.") from error


def format_result(result: Result) -> str:
    """Title, and a line for each row."""
    lines = [result.title]
    for row in result.rows:
        parts = ["not compared" if row.relative_time is None else f"{row.relative_time:.2f} of the first's",
                 "" if row.memory is None else f"{row.memory:.0f} MiB", f"differs by {row.difference} of 255",
                 "" if row.difference_from_first is None else f"from the first by {row.difference_from_first}",
                 "" if row.exact else "another image"]
        lines.append(f"  {row.name:24}{row.seconds:9.3f} s, {', '.join(filter(None, parts))}")
    return "\n".join(lines)


def canonical_name(name: str) -> str:
    """The name of an optimization step without the number of its sampling steps."""
    return FEWER.sub(r"fewer\1", name)


def tabulate_steps(results: Sequence[Result]) -> dict[str, list[ResultRow | None]]:
    """By name of each optimization step of a GPU, in order, its row in every result; None where it was not measured."""
    return {canonical_name(step.name): [result.find_row(step.name) for result in results]
            for step in list_steps("cuda")}
