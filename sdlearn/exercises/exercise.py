"""An exercise: its task, hints, solution, tests in steps and known mistakes.

The package docstring is the guide for authors.
"""

import difflib
import dis
import importlib
import inspect
import pkgutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .store import RENAMED

GRADES = ("guided", "supported", "on your own")
STEPS = ("shape", "value", "edge case")
SECONDS = 10.0          # wall time for one test: these tests take milliseconds

REGISTERED: dict[str, "Exercise"] = {}      # by name


@dataclass(frozen=True)
class Test:
    """One test of a check: `run` is called with an `Answer` for each name that the exercise asks for."""

    step: str
    run: Callable[..., None]
    seconds: float


@dataclass(frozen=True)
class Mistake:
    """A known wrong answer and its diagnosis, the end of the message for a learner who gives it."""

    diagnosis: str
    answer: Callable
    of: str             # the name that it is an answer to


@dataclass(frozen=True)
class Exercise:
    """An exercise, as `Lesson.exercise` makes it; its decorators `test` and `mistake` add to it."""

    id: str
    name: str
    lesson: "Lesson"
    names: tuple[str, ...]
    solutions: tuple[Callable, ...]
    grade: str
    minutes: int
    asks: str
    hints: tuple[str, ...]
    beyond: str
    also: tuple[Callable, ...]
    module: str
    tests: list[Test] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)

    def test(self, step: str, *, seconds: float = SECONDS) -> Callable[[Callable], Callable]:
        """Register a test of that step: "shape", "value" or "edge case". Tests run in the order of registration."""
        if step not in STEPS:
            raise ValueError(f"{self.id} {self.name}: there is no step '{step}': choose one of {', '.join(STEPS)}")
        if self.tests and STEPS.index(self.tests[-1].step) > STEPS.index(step):
            raise ValueError(f"{self.id} {self.name}: a test of '{step}' comes after one of "
                             f"'{self.tests[-1].step}': order them {', '.join(STEPS)}")

        def register(run: Callable) -> Callable:
            self.tests.append(Test(step, run, seconds))
            return run
        return register

    def mistake(self, diagnosis: str, *, of: str | None = None) -> Callable[[Callable], Callable]:
        """Register a wrong answer with its diagnosis: a clause, or a question, that names the mistake.

        It is shown when a learner's result equals that of this wrong answer. `of`: which of several names.
        """
        of = of or self.names[0]
        if of not in self.names:
            raise ValueError(f"{self.id} {self.name}: it does not ask for '{of}', but for {', '.join(self.names)}")

        def register(answer: Callable) -> Callable:
            self.mistakes.append(Mistake(diagnosis, answer, of))
            return answer
        return register

    def source(self) -> str:
        """The source code of the solution, with the functions that the author named in `also`."""
        parts = (inspect.getsource(part) for part in (*self.solutions, *self.also))
        return "\n\n\n".join(textwrap.dedent(part).rstrip() for part in parts)


@dataclass(frozen=True)
class Lesson:
    """The exercises of one notebook: its number and the title of its progress bar."""

    number: int
    title: str

    def exercise(self, place: int, *solutions: Callable, grade: str, minutes: int, asks: str, hints: Sequence[str],
                 name: str | None = None, beyond: str = "", also: Sequence[Callable] = ()) -> Exercise:
        """Register exercise `number.place`, whose answer is the package's `solutions`.

        name: of the exercise; the solution's where it is not given. Several solutions keep their own names.
        grade: one of GRADES. asks: the task in a sentence. hints: from general to nearly
        the answer; one that points to the solution is added. beyond: what the package's code does in addition.
        also: functions whose code is printed with the solution.
        Raises ValueError for an unknown grade, and for an id or a name that is taken.
        """
        identity, name = f"{self.number}.{place}", name or solutions[0].__name__
        if grade not in GRADES:
            raise ValueError(f"{identity} {name}: there is no grade '{grade}': choose one of {', '.join(GRADES)}")
        names = tuple(one.__name__ for one in solutions) if len(solutions) > 1 else (name,)
        module = sys._getframe(1).f_globals["__name__"]
        exercise = Exercise(identity, name, self, names, solutions, grade, minutes, asks, tuple(hints), beyond,
                            tuple(also), module)
        for other in REGISTERED.values():
            same = (other.id == identity) != (other.name == name) or other.module != exercise.module
            if same and (other.id == identity or other.name == name):
                raise ValueError(f"{identity} {name}: {other.id} {other.name} exists already: choose another")
        REGISTERED[name] = exercise         # a module that is reloaded replaces its own
        return exercise


def find(name: str) -> Exercise:
    """The exercise of that name. Raises ValueError with its new name or the nearest names."""
    if name not in REGISTERED:
        exercises()
    if name not in REGISTERED:
        if name in RENAMED:
            raise ValueError(f"the exercise '{name}' is now called '{RENAMED[name]}': use that name")
        near = difflib.get_close_matches(str(name), REGISTERED, n=3) or sorted(REGISTERED)
        raise ValueError(f"there is no exercise '{name}': did you mean {' or '.join(near)}?")
    return REGISTERED[name]


def exercises() -> list[Exercise]:
    """All exercises of the course, in its order."""
    package = sys.modules[__package__]
    for module in pkgutil.walk_packages(package.__path__, f"{__package__}."):
        if module.name.startswith(f"{__package__}.nb"):
            importlib.import_module(module.name)
    return sorted(REGISTERED.values(), key=lambda one: (one.lesson.number, int(one.id.split(".")[1])))


def is_stub(answer: Any) -> bool:
    """Whether the answer is a stub: nothing but a docstring and `raise NotImplementedError`.

    It is decided by the bytecode, so that a notebook as shipped starts no process. A class is a stub if one of
    its methods is.
    """
    if isinstance(answer, type):
        return any(is_stub(method) for method in vars(answer).values() if inspect.isfunction(method))
    code = getattr(answer, "__code__", None)
    return code is not None and code.co_names == ("NotImplementedError",) and not any(
        step.opname.startswith(("LOAD_FAST", "STORE_", "LOAD_DEREF")) for step in dis.get_instructions(code))
