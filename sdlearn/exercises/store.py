"""A learner's progress: one small JSON file on this machine.

    {"version": 1, "exercises": {"zero_conv": {"id": "7.1", "done": true, "attempts": 2, "hints": 1}}}

It is in the user's data folder, or at the path in SDLEARN_PROGRESS. A file that is damaged or cannot be written
is reported in a sentence and stops nothing; a damaged one is renamed to `progress.damaged.json`.
"""

import json
import os
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from ..files import write_atomically

if TYPE_CHECKING:
    from .exercise import Exercise

VERSION = 1
# Exercises that had another name once: a progress file that holds the old name is read as the new one's.
RENAMED: dict[str, str] = {
    "reusing": "ConditioningCache",
    "exchanged": "replace_token_embedding",
    "prior_preserved": "prior_preservation_loss",
    "merged_weight": "merge_weight",
    "widened": "widen_unet",
    "guided": "classifier_free_guidance",
    "repelled": "composed_guidance",
    "rescaled": "rescale_guidance",
    "scale_at": "guidance_scale_at",
    "both_halves": "predict_uncond_cond",
    "guided_passes": "count_nfe",
    "timesteps": "make_timesteps",
    "blended": "blended_denoise",
    "shifted_time": "shift_timestep",
}


@dataclass(frozen=True)
class Record:
    """Progress on one exercise: whether it is solved, how many answers were checked, how many hints were shown."""

    id: str
    done: bool = False
    attempts: int = 0
    hints: int = 0


# Records that could not be written, for the rest of this session.
_unsaved: dict[str, Record] = {}


def path() -> Path:
    """The path of the file."""
    given = os.environ.get("SDLEARN_PROGRESS")
    return Path(given) if given else Path(platformdirs.user_data_dir("sdlearn", appauthor=False)) / "progress.json"


def records() -> tuple[dict[str, Record], str]:
    """(records by the exercise's name; a sentence if the file could not be read, or "")."""
    file = path()
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        found: dict[str, Record] = {}
        for name, one in held["exercises"].items():
            name, new = RENAMED.get(str(name), str(name)), _parse_record(one)
            found[name] = _merge(found[name], new) if name in found else new
    except FileNotFoundError:
        found, problem = {}, ""
    except OSError as error:
        found, problem = {}, f"Your progress could not be read ({error.strerror})."
    except (ValueError, KeyError, TypeError, AttributeError):
        found, problem = {}, "The file of your progress is damaged: it is renamed, and a new one begun."
    else:
        problem = ""
    return found | _unsaved, problem


def record(exercise: "Exercise") -> Record:
    """The progress on this exercise."""
    return records()[0].get(exercise.name, Record(exercise.id))


def update(exercise: "Exercise", *, done: bool = False, attempts: int = 0, hints: int | None = None) -> str:
    """Add attempts, mark it as solved, or set how many hints were shown; a sentence if saving failed, or ""."""
    found, problem = records()
    old = found.get(exercise.name, Record(exercise.id))
    new = replace(old, id=exercise.id, done=old.done or done, attempts=old.attempts + attempts,
                  hints=old.hints if hints is None else hints)
    found[exercise.name] = new
    try:
        if problem:
            os.replace(path(), path().with_suffix(".damaged.json"))
        _write(found)
        _unsaved.clear()
    except OSError as error:
        _unsaved[exercise.name] = new
        problem = f"Your progress could not be saved, and lasts until the notebook is closed: {error}"
    return problem


def _parse_record(held: dict) -> Record:
    record = Record(**{key: held[key] for key in ("id", "done", "attempts", "hints") if key in held})
    if tuple(map(type, astuple(record))) != (str, bool, int, int):
        raise TypeError("a value of another type")
    return record


def _merge(one: Record, other: Record) -> Record:
    """One record of the progress under two names."""
    return Record(one.id, one.done or other.done, one.attempts + other.attempts, max(one.hints, other.hints))


def _write(found: dict[str, Record]):
    held = {"version": VERSION, "exercises": {name: asdict(record) for name, record in sorted(found.items())}}
    with write_atomically(path()) as file:
        file.write_text(json.dumps(held, indent=1), encoding="utf-8")
