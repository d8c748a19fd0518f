"""What a learner has done: one small JSON file, on this machine alone.

    {"version": 1, "exercises": {"zero_conv": {"id": "7.1", "done": true, "attempts": 2, "hints": 1}}}

It lies in the user's data folder, or where SDLEARN_PROGRESS says. A file that is damaged or cannot be
written is told in a sentence and stops nothing; what was in a damaged one is kept beside it.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

if TYPE_CHECKING:
    from .exercise import Exercise

VERSION = 1
# Exercises that had another name once: a progress file that holds the old name is read as the new one's.
RENAMED: dict[str, str] = {
}


@dataclass(frozen=True)
class Record:
    """What was done on one exercise: solved or not, checks of something written, levels of hints taken."""

    id: str
    done: bool = False
    attempts: int = 0
    hints: int = 0


# What could not be written, for the rest of this session.
_unsaved: dict[str, Record] = {}


def path() -> Path:
    """Where the file lies."""
    given = os.environ.get("SDLEARN_PROGRESS")
    return Path(given) if given else Path(platformdirs.user_data_dir("sdlearn", appauthor=False)) / "progress.json"


def records() -> tuple[dict[str, Record], str]:
    """(what is known, by exercise's name; a sentence if the file was not as it should be, or "")."""
    file = path()
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        found: dict[str, Record] = {}
        for name, one in held["exercises"].items():
            name, new = RENAMED.get(str(name), str(name)), _record(one)
            found[name] = _merged(found[name], new) if name in found else new
    except FileNotFoundError:
        found, said = {}, ""
    except OSError as error:
        found, said = {}, f"Your progress could not be read ({error.strerror})."
    except (ValueError, KeyError, TypeError, AttributeError):
        found, said = {}, "The file of your progress is damaged: it is kept aside, and a new one begun."
    else:
        said = ""
    return found | _unsaved, said


def record(exercise: "Exercise") -> Record:
    """What was done on this exercise."""
    return records()[0].get(exercise.name, Record(exercise.id))


def update(exercise: "Exercise", *, done: bool = False, attempts: int = 0, hints: int | None = None) -> str:
    """Note more attempts, that it is done, or how many hints are taken; a sentence if that went wrong, or ""."""
    found, said = records()
    old = found.get(exercise.name, Record(exercise.id))
    new = replace(old, id=exercise.id, done=old.done or done, attempts=old.attempts + attempts,
                  hints=old.hints if hints is None else hints)
    found[exercise.name] = new
    try:
        if said:
            os.replace(path(), path().with_suffix(".damaged.json"))
        _write(found)
        _unsaved.clear()
    except OSError as error:
        _unsaved[exercise.name] = new
        said = f"Your progress could not be saved ({error.strerror}): it is kept until the notebook is closed."
    return said


def _record(held: dict) -> Record:
    one = Record(**{key: held[key] for key in ("id", "done", "attempts", "hints") if key in held})
    if not (isinstance(one.id, str) and isinstance(one.done, bool) and isinstance(one.attempts, int)
            and isinstance(one.hints, int)):
        raise TypeError("a value of another type")
    return one


def _merged(one: Record, other: Record) -> Record:
    """One record of what was done under two names."""
    return Record(one.id, one.done or other.done, one.attempts + other.attempts, max(one.hints, other.hints))


def _write(found: dict[str, Record]):
    """Beside it, then renamed: whoever reads meanwhile, or a machine that stops, sees the old file or the new."""
    file = path()
    file.parent.mkdir(parents=True, exist_ok=True)
    held = {"version": VERSION, "exercises": {name: asdict(one) for name, one in sorted(found.items())}}
    descriptor, beside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as writing:
            json.dump(held, writing, indent=1)
        os.replace(beside, file)
    except BaseException:
        os.unlink(beside)
        raise
