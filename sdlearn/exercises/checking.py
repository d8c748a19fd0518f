"""What a notebook calls: `check`, `hint`, `solution`, `progress`."""

import linecache
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from . import store
from .cards import Bars, Card, Source, shortened, show
from .exercise import Exercise, exercises, find, not_written
from .sandbox import MEMORY, SandboxError, run_request
from .serialization import serialize

WAITING = "not written yet, the course goes on with its own."
COLOURS = {"right": "green", "wrong": "orange", "unwritten": "grey", "unchecked": "grey", "given": "grey"}


@dataclass(frozen=True)
class Result:
    """How an answer did: `passed` of `of` tests, in their order, up to the first that failed.

    status: "right"; "wrong"; "unwritten", a stub; "unchecked", for reasons that are not the learner's.
    message: what is wrong, in a sentence, or "". printed: what the answer wrote in the last test that ran.
    """

    id: str
    name: str
    status: str
    passed: int
    of: int
    message: str
    seconds: float
    printed: str = ""

    @property
    def right(self) -> bool:
        return self.status == "right"


class NotRight(AssertionError):
    """In grading: an answer that is not right."""


class Check:
    """`add_noise = check("add_noise", add_noise)`: judges an answer, and hands back what to go on with.

    An answer runs in another process, with limits of time and memory: see `sandbox.py`.
    """

    def __call__(self, name: str, *answers: Callable) -> Any:
        """Show how the answer does; return it when it is right, and the package's own when it is not (yet).

        Several names that are asked for together come as several arguments, and go back as a tuple.
        Raises ValueError for an unknown exercise, and for another number of answers; in `grading`
        NotRight for an answer that is not right.
        """
        exercise = find(name)
        result = self._given(exercise, answers) or self.run(name, *answers)
        told = ""
        if result.status in ("right", "wrong"):
            told = store.update(exercise, attempts=1, done=result.right)
        show(card(exercise, result, told))
        if self.is_grading and not result.right:
            raise NotRight(str(card(exercise, result)))
        kept = answers if result.right else exercise.solutions
        return kept if len(kept) > 1 else kept[0]

    def run(self, name: str, *answers: Callable, seconds: float | None = None, memory: int = MEMORY) -> Result:
        """How the answer does; nothing is shown and nothing noted.

        seconds: for each test, in place of what its author gave it. memory: bytes. Raises ValueError as above.
        """
        exercise = find(name)
        if len(answers) != len(exercise.names):
            raise ValueError(f"{exercise.id} {name} asks for {', '.join(exercise.names)}: hand over "
                             f"{len(exercise.names)}, not {len(answers)}")
        start, of = time.perf_counter(), len(exercise.tests)

        def result(status: str, passed: int = 0, message: str = "", printed: str = "") -> Result:
            spent = time.perf_counter() - start
            return Result(exercise.id, exercise.name, status, passed, of, message, spent, shortened(printed))

        for wanted, answer in zip(exercise.names, answers, strict=True):
            if not callable(answer):
                return result("wrong", message=f"{wanted} is {answer!r:.40}: hand over the function itself, not what "
                                               "it returns.")
        if all(map(not_written, answers)):
            return result("unwritten")
        try:
            return result(*_run_tests(exercise, serialize(answers), seconds, memory))
        except ValueError as error:
            return result("unchecked", message=f"It could not be checked: {error}.")
        except SandboxError as error:
            return result("unchecked", message=f"It could not be checked: {error}. Run the cell again.")

    @property
    def is_grading(self) -> bool:
        """Whether an answer that is not right ends the cell, and the package's own is never handed out."""
        return self._grading or os.environ.get("SDLEARN_GRADING", "") not in ("", "0")

    _grading = False

    @contextmanager
    def grading(self) -> Iterator[None]:
        """Inside of it `check` raises NotRight in place of handing out the package's own.

        So does SDLEARN_GRADING=1 in the environment, for notebooks that are run to be graded.
        """
        before, self._grading = self._grading, True
        try:
            yield
        finally:
            self._grading = before

    def _given(self, exercise: Exercise, answers: tuple) -> Result | None:
        """What to tell where the package's own is handed over, as when only the cell with the check is run again."""
        if answers != exercise.solutions:
            return None
        return Result(exercise.id, exercise.name, "given", 0, len(exercise.tests),
                      "This is the course's own: run the cell that defines yours, then this one again.", 0.0)


check = Check()


def hint(name: str, level: int | None = None):
    """Show the next hint for that exercise, or the one of that level, counted from 1; the last stays the last."""
    exercise = find(name)
    levels = [*exercise.hints, f'`solution("{name}")` shows how the package does it. Close it again before you write.']
    number = level or min(store.record(exercise).hints + 1, len(levels))
    if not 1 <= number <= len(levels):
        raise ValueError(f"{exercise.id} {name} has hints 1 to {len(levels)}, and no {number}")
    told = store.update(exercise, hints=max(number, store.record(exercise).hints))
    title, badge = f"{exercise.id} {name}", f"hint {number} of {len(levels)}"
    said = levels[number - 1]
    show(Card("blue", title, badge, (said, told), " ".join(filter(None, [f"{title}, {badge}: {said}", told]))))


def solution(name: str):
    """Show the package's own code of what that exercise asks for."""
    exercise = find(name)
    show(Source(f"{exercise.id} {name}, as the package has it", exercise.source(), exercise.beyond))


def progress():
    """Show how many exercises of each notebook are solved, on this machine."""
    found, told = store.records()
    rows = []
    for number, lesson in groupby(exercises(), key=lambda one: one.lesson.number):
        lesson = list(lesson)
        done = sum(found[one.name].done for one in lesson if one.name in found)
        rows.append((f"{number:02} {lesson[0].lesson.title}", done, len(lesson)))
    show(Bars(tuple(rows), told))


def card(exercise: Exercise, result: Result, told: str = "") -> Card:
    """What `check` shows of that result; `told` is a sentence to add."""
    title = f"{exercise.id} {exercise.name}"
    waiting = f"{result.of} test{'s are' if result.of != 1 else ' is'} waiting."
    beyond = exercise.beyond if result.right else ""
    match result.status:
        case "unwritten":
            which = f"{result.message} " if result.message else ""          # of several, some are written
            badge, said = "not written yet", f"{which}The course goes on with its own. {waiting}"
            plain = f"{title}: {WAITING} {which}{waiting}"
        case "right":
            badge, said = f"right, {result.passed} of {result.of}", "The course goes on with yours."
            plain = f"{title}: right, {result.passed} of {result.of}."
        case "wrong":
            badge, said = f"{result.passed} of {result.of}", result.message
            plain = f"{title}: {result.passed} of {result.of}. {result.message}"
        case _:
            badge, said = "not checked", result.message
            plain = f"{title}: {result.message}"
    help_ = f'The course goes on with its own. `hint("{exercise.name}")` helps.' if result.status == "wrong" else ""
    printed = "\n".join(["It printed:", *(f"    {line}" for line in result.printed.splitlines())]) \
        if result.printed else ""
    plain = "\n".join(filter(None, [plain, beyond, told, printed]))
    return Card(COLOURS[result.status], title, badge, (said, beyond, help_, told), plain, result.printed)


def _run_tests(exercise: Exercise, answers: bytes, seconds: float | None,
            memory: int) -> tuple[str, int, str, str]:
    """(status, tests passed, message, what was printed in the last test)."""
    request = {"module": exercise.module, "name": exercise.name, "path": [os.path.abspath(one) for one in sys.path],
               "folder": os.getcwd(), "answers": answers, "seconds": seconds, "memory": memory}
    passed, failed, printed = 0, {}, {}
    for message in run_request(request):
        match message:
            case {"printed": text, "test": test}:
                printed[test] = printed.get(test, "") + text
            case {"passed": True}:
                passed += 1
            case {"passed": False}:
                failed = message
    if not failed:
        return "right", passed, "", next(iter(printed.values()), "")
    status = "wrong" if failed["written"] or passed else "unwritten"
    return status, passed, located(failed["message"], failed["place"]), printed.get(failed["test"], "")


def located(said: str, place: list | None) -> str:
    """The sentence, with the line of the notebook that it is about."""
    line = linecache.getline(*place).strip() if place else ""
    if not line:
        return said
    return f"{said.rstrip('.')}, in the line `{line}`."
