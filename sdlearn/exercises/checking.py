"""The functions that notebooks call: `check`, `hint`, `solution`, `progress`."""

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
from .cards import Bars, Card, Source, shorten_output, show
from .exercise import Exercise, exercises, find, is_stub
from .sandbox import MEMORY, SandboxError, run_request
from .serialization import serialize

UNWRITTEN = "not written yet: the course continues with its own."
COLOURS = {"right": "green", "wrong": "orange", "unwritten": "grey", "unchecked": "grey", "given": "grey"}


@dataclass(frozen=True)
class Result:
    """Outcome of a check: `passed` of `of` tests, in their order, up to the first that failed.

    status: "right"; "wrong"; "unwritten" for a stub; "unchecked" where the check itself failed; "given" for the
    package's own.
    message: what is wrong, in a sentence, or "". printed: the output of the answer in the last test that ran.
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
    """Raised in grading for an answer that is not right."""


class Check:
    """`add_noise = check("add_noise", add_noise)`: tests an answer and returns the function to continue with.

    An answer runs in another process, with limits of time and memory: see `sandbox.py`.
    """

    def __call__(self, name: str, *answers: Callable) -> Any:
        """Show the result; return the answer when it is right, otherwise the package's own.

        Several names of one exercise are passed as several arguments and returned as a tuple.
        Raises ValueError for an unknown exercise, and for another number of answers; in `grading`
        NotRight for an answer that is not right.
        """
        exercise = find(name)
        result = self._result_of_own(exercise, answers) or self.run(name, *answers)
        note = ""
        if result.status in ("right", "wrong"):
            note = store.update(exercise, attempts=1, done=result.right)
        show(make_card(exercise, result, note))
        if self.is_grading and not result.right:
            raise NotRight(str(make_card(exercise, result)))
        returned = answers if result.right else exercise.solutions
        return returned if len(returned) > 1 else returned[0]

    def run(self, name: str, *answers: Callable, seconds: float | None = None, memory: int = MEMORY) -> Result:
        """The result for the answer; nothing is shown or recorded.

        seconds: the limit for each test, in place of its author's. memory: bytes. Raises ValueError as above.
        """
        exercise = find(name)
        if len(answers) != len(exercise.names):
            raise ValueError(f"{exercise.id} {name} asks for {', '.join(exercise.names)}: pass "
                             f"{len(exercise.names)} answers, not {len(answers)}")
        start, of = time.perf_counter(), len(exercise.tests)

        def result(status: str, passed: int = 0, message: str = "", printed: str = "") -> Result:
            spent = time.perf_counter() - start
            return Result(exercise.id, exercise.name, status, passed, of, message, spent, shorten_output(printed))

        for wanted, answer in zip(exercise.names, answers, strict=True):
            if not callable(answer):
                return result("wrong", message=f"{wanted} is {answer!r:.40}: pass the function itself, not its "
                                               "result.")
        if all(map(is_stub, answers)):
            return result("unwritten")
        try:
            return result(*_run_tests(exercise, serialize(answers), seconds, memory))
        except ValueError as error:
            return result("unchecked", message=f"It could not be checked: {error}.")
        except SandboxError as error:
            return result("unchecked", message=f"It could not be checked: {error}. Run the cell again.")

    @property
    def is_grading(self) -> bool:
        """Whether an answer that is not right raises NotRight, and the package's own is never returned."""
        return self._grading or os.environ.get("SDLEARN_GRADING", "") not in ("", "0")

    _grading = False

    @contextmanager
    def grading(self) -> Iterator[None]:
        """Context manager in which `check` raises NotRight in place of returning the package's own.

        SDLEARN_GRADING=1 in the environment has the same effect, for notebooks that are run to be graded.
        """
        before, self._grading = self._grading, True
        try:
            yield
        finally:
            self._grading = before

    def _result_of_own(self, exercise: Exercise, answers: tuple) -> Result | None:
        """The result where the package's own is passed, as when only the cell with the check is run again."""
        if answers != exercise.solutions:
            return None
        return Result(exercise.id, exercise.name, "given", 0, len(exercise.tests),
                      "This is the course's own: run the cell that defines yours, then this one again.", 0.0)


check = Check()


def hint(name: str, level: int | None = None):
    """Show the next hint for that exercise, or that of `level`, counted from 1; after the last, the last again."""
    exercise = find(name)
    levels = [*exercise.hints, f'`solution("{name}")` shows how the package does it. Close it again before you write.']
    number = level or min(store.record(exercise).hints + 1, len(levels))
    if not 1 <= number <= len(levels):
        raise ValueError(f"{exercise.id} {name} has hints 1 to {len(levels)}, not {number}")
    note = store.update(exercise, hints=max(number, store.record(exercise).hints))
    title, badge, text = f"{exercise.id} {name}", f"hint {number} of {len(levels)}", levels[number - 1]
    show(Card("blue", title, badge, (text, note), " ".join(filter(None, [f"{title}, {badge}: {text}", note]))))


def solution(name: str):
    """Show the package's source code of that exercise's solution."""
    exercise = find(name)
    show(Source(f"{exercise.id} {name}, as the package has it", exercise.source(), exercise.beyond))


def progress():
    """Show how many exercises of each notebook are solved, on this machine."""
    found, note = store.records()
    rows = []
    for number, lesson in groupby(exercises(), key=lambda one: one.lesson.number):
        lesson = list(lesson)
        done = sum(found[one.name].done for one in lesson if one.name in found)
        rows.append((f"{number:02} {lesson[0].lesson.title}", done, len(lesson)))
    show(Bars(tuple(rows), note))


def make_card(exercise: Exercise, result: Result, note: str = "") -> Card:
    """The card that `check` shows for a result; `note` is a sentence to add."""
    title = f"{exercise.id} {exercise.name}"
    waiting = f"{result.of} test{'s are' if result.of != 1 else ' is'} waiting."
    beyond = exercise.beyond if result.right else ""
    match result.status:
        case "unwritten":
            which = f"{result.message} " if result.message else ""          # of several, some are written
            badge, message = "not written yet", f"{which}The course continues with its own. {waiting}"
            plain = f"{title}: {UNWRITTEN} {which}{waiting}"
        case "right":
            badge, message = f"right, {result.passed} of {result.of}", "The course continues with yours."
            plain = f"{title}: right, {result.passed} of {result.of}."
        case "wrong":
            badge, message = f"{result.passed} of {result.of}", result.message
            plain = f"{title}: {result.passed} of {result.of}. {result.message}"
        case _:
            badge, message = "not checked", result.message
            plain = f"{title}: {result.message}"
    help_ = f'The course continues with its own. `hint("{exercise.name}")` helps.' if result.status == "wrong" else ""
    printed = "\n".join(["It printed:", *(f"    {line}" for line in result.printed.splitlines())]) \
        if result.printed else ""
    plain = "\n".join(filter(None, [plain, beyond, note, printed]))
    return Card(COLOURS[result.status], title, badge, (message, beyond, help_, note), plain, result.printed)


def _run_tests(exercise: Exercise, answers: bytes, seconds: float | None,
            memory: int) -> tuple[str, int, str, str]:
    """(status, tests passed, message, output of the last test)."""
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
    return status, passed, add_line(failed["message"], failed["place"]), printed.get(failed["test"], "")


def add_line(message: str, place: list | None) -> str:
    """The message, with the line of the notebook that caused the error."""
    line = linecache.getline(*place).strip() if place else ""
    if not line:
        return message
    return f"{message.rstrip('.')}, in the line `{line}`."
