"""Answers to the exercises as people write them, a module for each notebook: right ones, and wrong ones with the words
that their message must hold."""

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


def run_tests(name: str, answers: tuple[Callable, ...]) -> tuple[int, str]:
    """(tests passed, message of the first that failed or ""); serialized as for a check, but run here."""
    exercise = find(name)
    answers = deserialize(serialize(answers))
    for index in range(len(exercise.tests)):
        result = run_test(exercise, answers, index)
        if not result["passed"]:
            return index, result["message"]
    return len(exercise.tests), ""


def assert_accepted(name: str, *answers: Callable):
    """That the answers pass every test of the exercise."""
    passed, message = run_tests(name, answers)
    assert passed == len(find(name).tests), f"{name}: {passed} of {len(find(name).tests)}. {message}"


def assert_rejected(name: str, *answers: Callable, words: str):
    """That the answers fail with a message that holds those words."""
    passed, message = run_tests(name, answers)
    assert passed < len(find(name).tests), f"{name}: accepted"
    assert words in message, f"{name}: the message is '{message}', without '{words}'"
