"""Measurements that are kept with the package: what `bench --out` and `ladder --out` wrote, on whatever machines.

    for one in kept():
        print(one.title, [row.name for row in one.rows])

Files lie in `weights/bench`, any number of them, none included. A figure is shown with the machine, the versions and
the date that it was measured with; for what nobody has measured there is None, and no guess.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import CheckpointError
from ..checkpoint.files import read_json
from ..checkpoint.shipped import SHIPPED
from .ladder import rungs_for

KEPT = SHIPPED / "bench"
EVERYWHERE = ("machine", "date", "versions")
FEWER = re.compile(r"\d+( steps of .*)")        # the rung with fewer steps is named after their number


@dataclass(frozen=True)
class Row:
    """A contender of a race, or a rung of a ladder. times: of the first row's seconds. memory: MiB, None if unknown."""

    name: str
    seconds: float
    times: float | None
    memory: float | None
    differs: int                        # shades of 255, at most: from a race's first image, a ladder's one before
    exact: bool = True
    from_first: int | None = None       # shades, of a ladder; None in older files, which do not tell


@dataclass(frozen=True)
class Kept:
    """One file. kind: "race" or "ladder"."""

    name: str
    kind: str
    title: str                          # what was made, where, when, with which versions
    rows: tuple[Row, ...]
    decoding: float | None = None       # seconds, of a ladder, for the batch

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if named(row.name) == named(name)), None)


def kept(folder: Path = KEPT) -> list[Kept]:
    """All measurements of a folder, by date, then by name; none where there is no such folder.

    Raises CheckpointError, which names the file, for one that is no measurement.
    """
    read = [(file, read_json(file)) for file in sorted(Path(folder).glob("*.json"))]
    return [measurement(file, data) for file, data in sorted(read, key=lambda one: str(one[1].get("date")))]


def measurement(file: Path, data: dict) -> Kept:
    """What a file holds. Raises CheckpointError."""
    try:
        where = f"{data['machine']}, {data['date']}, torch {data['versions']['torch']}"
        if "ladder" in data:
            rows = tuple(Row(one["rung"], one["seconds"], one["of the first"], one.get("peak memory, MiB"),
                             one["largest difference"], one["exact"], one.get("largest difference from the first"))
                         for one in data["ladder"])
            what = f"{data['preset']}, {data['batch']} of {data['size']} x {data['size']}"
            return Kept(file.stem, "ladder", f"{what}; {where}", rows, data["seconds to decode"])
        race, contenders = data["race"], data["contenders"]
        first = next(iter(contenders))
        told = data.get(f"time of {first} to that of", {})
        ratios = {first: 1.0, **{name: 1 / ratio for name, ratio in told.items()}}
        rows = tuple(Row(name, one["seconds"], ratios.get(name), one["peak memory, MiB"], one["largest difference"])
                     for name, one in contenders.items())
        what = (f"{race['preset']}, {race['batch']} of {race['size']} x {race['size']}, {race['steps']} steps of "
                f"{race['sampler']}, {race['dtype']}")
        return Kept(file.stem, "race", f"{what}; {where}", rows)
    except (KeyError, TypeError, AttributeError, StopIteration) as error:
        raise CheckpointError(f"{file} is no measurement of `bench` or `ladder` ({type(error).__name__}: {error}); "
                              "write it anew with --out, or take it away.") from error


def table(one: Kept) -> str:
    """Title, and a line for each row."""
    lines = [one.title]
    for row in one.rows:
        told = ["not compared" if row.times is None else f"{row.times:.2f} of the first's",
                "" if row.memory is None else f"{row.memory:.0f} MiB", f"differs by {row.differs} of 255",
                "" if row.from_first is None else f"from the first by {row.from_first}",
                "" if row.exact else "another image"]
        lines.append(f"  {row.name:24}{row.seconds:9.3f} s, {', '.join(filter(None, told))}")
    return "\n".join(lines)


def named(rung: str) -> str:
    """A rung's name without the number of its steps."""
    return FEWER.sub(r"fewer\1", rung)


def rung_table(ladders: Sequence[Kept]) -> dict[str, list[Row | None]]:
    """By rung, all that a GPU has, in order: a row for each of the ladders, None where it was not measured there."""
    return {named(rung.name): [one.row(rung.name) for one in ladders] for rung in rungs_for("cuda")}
