"""What a test does with a learner's answer: call it with copies, compare its result, and say what is wrong.

A test gets an `Answer` for each name that its exercise asks for, and raises `Wrong` with a sentence.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .difference import describe_difference, describe_resemblance, describe_type, format_number
from .exercise import Exercise

ERROR_LENGTH = 600      # characters of an error's text that are shown
NOTEBOOK = "__main__"   # `__name__` among the globals of functions that were deserialized


class Wrong(Exception):
    """What is wrong with an answer, in a sentence; `place` is its (file, line), where known."""

    def __init__(self, message: str, place: tuple[str, int] | None = None):
        super().__init__(message if message.endswith((".", "?", "!")) else f"{message}.")
        self.place = place


class Answer:
    """A learner's function or class, to be called like the original.

    A call passes copies of tensors, lists and random generators. It raises Wrong when those have changed,
    when nothing is returned, and when autograd's mode or the default dtype is left changed.
    """

    def __init__(self, exercise: Exercise, name: str, function: Callable):
        self.exercise, self.name, self.function = exercise, name, function
        self.solution = exercise.solutions[exercise.names.index(name)]

    def __call__(self, *args, **kwargs) -> Any:
        given, named = copy_value(args), copy_value(kwargs)
        with torch_state_restored() as changes:
            result = self.function(*given, **named)
        self._require_unchanged(args, kwargs, given, named)
        if changes:
            raise Wrong(f"{self.name} {changes[0]}")
        if result is None:
            raise Wrong(f"{self.name} returns None: is a `return` missing?")
        return self._checked_items(result, (args, kwargs, given, named)) if isinstance(result, Iterator) else result

    def same(self, *args, tol: float = 1e-4, **kwargs) -> Any:
        """Its result for these arguments. Raises Wrong where it differs from the solution's."""
        return self.agrees(lambda answer: answer(*args, **kwargs), tol=tol)

    def agrees(self, run: Callable[[Callable], Any], *, tol: float = 1e-4, what: str = "The result") -> Any:
        """The result of `run(answer)`. Raises Wrong where it differs from that of `run(solution)`.

        run: called with the solution and with the answer; where the results differ also with the known
        mistakes, up to the first that gives the answer's result: its diagnosis ends the message. So `run` must
        be deterministic. It returns tensors, numbers, or lists, tuples and dictionaries of them. tol: see
        `describe_difference`.
        """
        expected, _ = _outcome(run, _with_copies(self.solution), False)
        got, error = _outcome(run, self, True)
        problem = describe_error(error) if error else describe_difference(got, expected, tol, what)
        if problem is None:
            return got
        cause = self._diagnose(run, got, error, tol) or (None if error else describe_resemblance(got, expected, tol))
        if cause and error:
            problem, cause = f"{problem}. {cause[0].upper()}{cause[1:]}", None
        elif error:
            raise Wrong(problem, find_place(error)) from error
        raise Wrong(f"{problem}: {cause}" if cause else problem) from error

    def _diagnose(self, run: Callable, got: Any, error: Exception | None, tol: float) -> str | None:
        """The diagnosis of the first known mistake with the same result or the same error."""
        for mistake in self.exercise.mistakes:
            if mistake.of == self.name:
                value, other = _outcome(run, _with_copies(mistake.answer), True)
                same_error = error and type(error) is type(other) and str(error) == str(other)
                if same_error or not (error or other) and _close(got, value, tol):
                    return mistake.diagnosis
        return None

    def _checked_items(self, iterator: Iterator, passed: tuple) -> Iterator:
        while True:
            with torch_state_restored():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            self._require_unchanged(*passed)
            yield item

    def _require_unchanged(self, args: tuple, kwargs: dict, given: tuple, named: dict):
        try:
            names = list(inspect.signature(self.function).parameters)
        except (TypeError, ValueError):
            names = []
        for i, (before, after) in enumerate(zip(args, given, strict=True)):
            if has_changed(before, after):
                name = f"`{names[i]}`" if i < len(names) else f"number {i + 1}"
                raise Wrong(f"{self.name} changes its argument {name} in place: the caller still needs its "
                            "values, so make something new")
        for name in kwargs:
            if has_changed(kwargs[name], named[name]):
                raise Wrong(f"{self.name} changes its argument `{name}` in place: make something new")


def require(condition: Any, message: str):
    """Raise Wrong with that message unless the condition holds."""
    if not bool(condition):
        raise Wrong(message)


def require_shape(x: Any, shape: tuple[int, ...], what: str = "The result"):
    """Raise Wrong unless x is a tensor of that shape."""
    require(isinstance(x, Tensor), f"{what} is {describe_type(x)} where it must be a tensor")
    require(tuple(x.shape) == tuple(shape), f"{what} has shape {tuple(x.shape)} where it must be {tuple(shape)}")


def require_sums(x: Tensor, total: float, dim: int, question: str):
    """Raise Wrong unless x sums to that total along `dim`; `question` asks for the cause."""
    sums = x.detach().double().sum(dim)
    off = sums.flatten()[(sums - total).abs().argmax()].item()
    require(abs(off - total) < 1e-4,
            f"Along axis {dim} the sum is {format_number(off)} where it must be {format_number(total)}: {question}")


def require_permutation(got: list, expected: list, message: str):
    """Raise Wrong unless both hold the same items equally often, in any order."""
    require(sorted(got) == sorted(expected), message)


def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The module, with those weights loaded. Raises Wrong where its parameters have other names or shapes."""
    require(isinstance(module, nn.Module), f"It makes {describe_type(module)} where it must make an nn.Module")
    own = module.state_dict()
    for name in weights:
        require(name in own, f"It has no parameter `{name}`: it has {', '.join(own) or 'none'}")
        require_shape(own[name], weights[name].shape, f"Its parameter `{name}`")
    for name in own:
        require(name in weights, f"It has a parameter `{name}`, which must not be there")
    module.load_state_dict(weights)
    return module


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian noise that is the same every time, on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_test(exercise: Exercise, answers: tuple[Callable, ...], index: int) -> dict:
    """Run that test of the exercise: {passed, message, written, place}, for JSON.

    written: whether the answer is more than a stub. place: (file, line) of an error in the learner's code, or None.
    """
    wrapped = [Answer(exercise, name, answer) for name, answer in zip(exercise.names, answers, strict=True)]
    failed = {"passed": False, "written": True, "place": None}
    try:
        exercise.tests[index].run(*wrapped)
    except Wrong as wrong:
        return failed | {"message": str(wrong), "place": wrong.place}
    except NotImplementedError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        name = frame.f_code.co_qualname.rpartition("<locals>.")[2].removesuffix(".__init__")
        return failed | {"message": f"{name} is not written yet.", "written": False}
    except BaseException as error:      # exit() and a KeyboardInterrupt in the learner's code end here, too
        where = find_place(error)
        message = describe_error(error) if where or isinstance(error, MemoryError) else \
            f"What it returns is not what was asked for ({type(error).__name__}: {error_text(error)})"
        return failed | {"message": str(Wrong(message)), "place": where}
    return failed | {"passed": True, "message": ""}


def describe_error(error: BaseException) -> str:
    """A sentence, without its full stop, that the answer raised this error."""
    match error:
        case Wrong():
            return str(error).rstrip(".")
        case SystemExit():
            return "It calls exit(), which would end the notebook: leave a function with `return`"
        case RecursionError():
            return "It calls itself without end: where does the recursion stop?"
        case MemoryError():
            return "It asks for more memory than a check may take: how large is what it makes?"
        case RuntimeError() if "can't allocate memory" in str(error) or "not enough memory" in str(error):
            return describe_error(MemoryError())
    text = error_text(error)
    return f"It raises {type(error).__name__}{': ' if text else ''}{text.rstrip('.')}"


def error_text(error: BaseException) -> str:
    """The error's own text on one line, shortened."""
    try:
        text = " ".join(str(error).split())
    except Exception:               # an error class of the learner's may have a broken __str__
        text = ""
    return text if len(text) <= ERROR_LENGTH else f"{text[:ERROR_LENGTH]}..."


def find_place(error: BaseException | None) -> tuple[str, int] | None:
    """(file, line) of the innermost frame of the learner's own code in the error's traceback."""
    if isinstance(error, Wrong):
        return error.place
    found, step = None, error.__traceback__ if error else None
    while isinstance(step, TracebackType):
        if step.tb_frame.f_globals.get("__name__") == NOTEBOOK:
            found = step.tb_frame.f_code.co_filename, step.tb_lineno
        step = step.tb_next
    return found


@contextmanager
def torch_state_restored() -> Iterator[list[str]]:
    """Restore PyTorch's default dtype, autograd mode and threads on exit; the list describes what had changed."""
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    changes: list[str] = []
    try:
        yield changes
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
            changes.append("changes PyTorch's default dtype for the whole notebook: give `dtype=` where it is needed")
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
            changes.append("leaves gradients switched for the whole notebook: use `with torch.no_grad():`")
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def copy_value(value: Any) -> Any:
    """A copy of a tensor or random generator, or of a container of them; other objects unchanged."""
    match value:
        case Tensor():
            return value.detach().clone().requires_grad_(value.requires_grad)
        case torch.Generator():
            return torch.Generator(value.device).set_state(value.get_state())
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*map(copy_value, value))
        case list() | tuple():
            return type(value)(map(copy_value, value))
        case dict():
            return {key: copy_value(one) for key, one in value.items()}
    return value


def has_changed(before: Any, after: Any) -> bool:
    """Whether a copy differs from its original; the state of a random generator does not count."""
    match before:
        case Tensor():
            return before.shape != after.shape or not torch.equal(before, after)
        case list() | tuple():
            return len(before) != len(after) or any(map(has_changed, before, after))
        case dict():
            return before.keys() != after.keys() or any(has_changed(before[key], after[key]) for key in before)
        case int() | float() | str() | None:
            return before != after
    return False


def _with_copies(function: Callable) -> Callable:
    return lambda *args, **kwargs: function(*copy_value(args), **copy_value(kwargs))


def _close(got: Any, value: Any, tol: float) -> bool:
    try:
        return describe_difference(got, value, tol) is None
    except TypeError:           # of a type that is not compared
        return False


def _outcome(run: Callable, answer: Callable, caught: bool) -> tuple[Any, Exception | None]:
    """(result, None), or (None, error) where errors are caught. PyTorch's default generator is seeded first."""
    torch.default_generator.manual_seed(0)      # that of the CPU, and only that
    try:
        value = run(answer)
        return (list(value) if isinstance(value, Iterator) else value), None
    except NotImplementedError:
        if isinstance(answer, Answer):
            raise
        return None, NotImplementedError()
    except Exception as error:
        if not caught:
            raise
        return None, error
