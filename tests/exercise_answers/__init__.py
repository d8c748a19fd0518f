"""Answers to the exercises as people write them, a module a notebook: right, and wrong with what must be said."""

from collections.abc import Callable

from sdlearn.exercises.exercise import find
from sdlearn.exercises.serialization import deserialize, serialize
from sdlearn.exercises.testing import run_test

RIGHT: dict[str, list[Callable]] = {}
WRONG: dict[str, list[tuple[Callable, str]]] = {}


def right(name: str, *, of: str | None = None) -> Callable[[Callable], Callable]:
    """Register a right answer to that exercise; `of` as for `wrong`."""
    def register(answer: Callable) -> Callable:
        RIGHT.setdefault(name, []).append(among(name, answer, of))
        return answer
    return register


def wrong(name: str, words: str, *, of: str | None = None) -> Callable[[Callable], Callable]:
    """Register a wrong answer, to be rejected with those words.

    of: which name it answers, where the exercise asks for several; the others are the package's.
    """
    def register(answer: Callable) -> Callable:
        WRONG.setdefault(name, []).append((among(name, answer, of), words))
        return answer
    return register


def among(name: str, answer: Callable, of: str | None) -> tuple[Callable, ...]:
    exercise = find(name)
    of = of or exercise.names[0]
    assert of in exercise.names
    return tuple(answer if one == of else package
                 for one, package in zip(exercise.names, exercise.solutions, strict=True))


def told(name: str, answers: tuple[Callable, ...]) -> tuple[int, str]:
    """(tests passed, what the first that failed said or "") of the answers, carried as into a check, but run here."""
    exercise = find(name)
    answers = deserialize(serialize(answers))
    for index in range(len(exercise.tests)):
        one = run_test(exercise, answers, index)
        if not one["passed"]:
            return index, one["message"]
    return len(exercise.tests), ""


def assert_accepted(name: str, *answers: Callable):
    """That the answers pass every test of the exercise."""
    passed, said = told(name, answers)
    assert passed == len(find(name).tests), f"{name}: {passed} of {len(find(name).tests)}. {said}"


def assert_rejected(name: str, *answers: Callable, words: str):
    """That the answers fail, and that what they are told holds those words."""
    passed, said = told(name, answers)
    assert passed < len(find(name).tests), f"{name}: accepted"
    assert words in said, f"{name}: told '{said}', not '{words}'"
