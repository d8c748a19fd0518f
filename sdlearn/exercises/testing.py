"""What a test does with a learner's answer: call it with care, compare it, and say what is wrong.

A test gets a `Answer` for each name that its exercise asks for, and raises `Wrong` with a sentence.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .difference import difference, kind, number, resemblance
from .exercise import Exercise

SAID = 600              # characters of an error's text that are told
NOTEBOOK = "__main__"   # `__name__` among the globals of whatever was carried here


class Wrong(Exception):
    """What is wrong with an answer, in a sentence; `place` is (file, line) of it, where there is one."""

    def __init__(self, said: str, place: tuple[str, int] | None = None):
        super().__init__(said if said.endswith((".", "?", "!")) else f"{said}.")
        self.place = place


class Answer:
    """A learner's function or class, as a test sees it.

    Calling it hands over copies of tensors, lists and generators of noise, and complains when those have
    changed, when nothing is returned, and when gradients or the default dtype are left switched.
    """

    def __init__(self, exercise: Exercise, name: str, answer: Callable):
        self.exercise, self.name, self.answer = exercise, name, answer
        self.solution = exercise.solutions[exercise.names.index(name)]

    def __call__(self, *args, **kwargs) -> Any:
        given, named = copied(args), copied(kwargs)
        with torch_as_it_was() as switched:
            result = self.answer(*given, **named)
        self._leaves_alone(args, kwargs, given, named)
        if switched:
            raise Wrong(f"{self.name} {switched[0]}")
        if result is None:
            raise Wrong(f"{self.name} returns None: is a `return` missing?")
        return self._watched(result, (args, kwargs, given, named)) if isinstance(result, Iterator) else result

    def same(self, *args, tol: float = 1e-4, **kwargs) -> Any:
        """Its result of these arguments, which must be the solution's. Raises Wrong."""
        return self.agrees(lambda answer: answer(*args, **kwargs), tol=tol)

    def agrees(self, run: Callable[[Callable], Any], *, tol: float = 1e-4, what: str = "The result") -> Any:
        """What `run` makes of it, which must be what `run` makes of the solution. Raises Wrong.

        run: called with the solution, with this, and if the two differ with every known mistake; whose
        result this has, its diagnosis is told. So `run` must do the same each time. Results are tensors,
        numbers, or lists, tuples and dictionaries of such. tol: see `difference`.
        """
        expected, _ = _outcome(run, _careful(self.solution), False)
        got, error = _outcome(run, self, True)
        problem = raised(error) if error else difference(got, expected, tol, what)
        if problem is None:
            return got
        cause = self._mistake(run, got, error, tol) or (None if error else resemblance(got, expected, tol))
        if cause and error:
            problem, cause = f"{problem}. {cause[0].upper()}{cause[1:]}", None
        elif error:
            raise Wrong(problem, place(error)) from error
        raise Wrong(f"{problem}: {cause}" if cause else problem) from error

    def _mistake(self, run: Callable, got: Any, error: Exception | None, tol: float) -> str | None:
        """The diagnosis of the first known mistake that comes out as this did."""
        for mistake in self.exercise.mistakes:
            if mistake.of == self.name:
                value, other = _outcome(run, _careful(mistake.answer), True)
                alike = error and type(error) is type(other) and str(error) == str(other)
                if alike or not (error or other) and _alike(got, value, tol):
                    return mistake.diagnosis
        return None

    def _watched(self, iterator: Iterator, passed: tuple) -> Iterator:
        while True:
            with torch_as_it_was():
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            self._leaves_alone(*passed)
            yield item

    def _leaves_alone(self, args: tuple, kwargs: dict, given: tuple, named: dict):
        try:
            names = list(inspect.signature(self.answer).parameters)
        except (TypeError, ValueError):
            names = []
        for i, (before, after) in enumerate(zip(args, given, strict=True)):
            if changed(before, after):
                name = f"`{names[i]}`" if i < len(names) else f"number {i + 1}"
                raise Wrong(f"{self.name} changes its argument {name} in place: the caller still needs what it "
                            "held, so make something new")
        for name in kwargs:
            if changed(kwargs[name], named[name]):
                raise Wrong(f"{self.name} changes its argument `{name}` in place: make something new")


def require(condition: Any, said: str):
    """Raise Wrong, with that sentence, unless the condition holds."""
    if not bool(condition):
        raise Wrong(said)


def require_shape(x: Any, shape: tuple[int, ...], said: str = "The result"):
    """Raise Wrong unless x is a tensor of that shape."""
    require(isinstance(x, Tensor), f"{said} is {kind(x)} where it must be a tensor")
    require(tuple(x.shape) == tuple(shape), f"{said} has shape {tuple(x.shape)} where it must be {tuple(shape)}")


def require_sums(x: Tensor, total: float, dim: int, said: str):
    """Raise Wrong unless x sums to that total along `dim`; `said` asks for the cause."""
    sums = x.detach().double().sum(dim)
    off = sums.flatten()[(sums - total).abs().argmax()].item()
    require(abs(off - total) < 1e-4,
            f"Along axis {dim} the sum is {number(off)} where it must be {number(total)}: {said}")


def require_permutation(got: list, expected: list, said: str):
    """Raise Wrong unless both hold the same items, in any order."""
    require(sorted(got) == sorted(expected), said)


def with_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The module with those weights. Raises Wrong where its parameters have other names or shapes."""
    require(isinstance(module, nn.Module), f"It makes {kind(module)} where it must make an nn.Module")
    own = module.state_dict()
    for name in weights:
        require(name in own, f"It has no parameter `{name}`: it has {', '.join(own) or 'none'}")
        require_shape(own[name], weights[name].shape, f"Its parameter `{name}`")
    for name in own:
        require(name in weights, f"It has a parameter `{name}`, which must not be there")
    module.load_state_dict(weights)
    return module


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Noise that is the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_test(exercise: Exercise, answers: tuple[Callable, ...], index: int) -> dict:
    """Run that test of the exercise: {passed, message, written, place}, for JSON."""
    subjects = [Answer(exercise, name, answer) for name, answer in zip(exercise.names, answers, strict=True)]
    told = {"passed": False, "written": True, "place": None}
    try:
        exercise.tests[index].run(*subjects)
    except Wrong as wrong:
        return told | {"message": str(wrong), "place": wrong.place}
    except NotImplementedError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        name = frame.f_code.co_qualname.rpartition("<locals>.")[2].removesuffix(".__init__")
        return told | {"message": f"{name} is not written yet.", "written": False}
    except BaseException as error:      # exit() and a KeyboardInterrupt of the learner's own end here as well
        where = place(error)
        said = raised(error) if where or isinstance(error, MemoryError) else \
            f"What it returns is not what was asked for ({type(error).__name__}: {text(error)})"
        return told | {"message": str(Wrong(said)), "place": where}
    return told | {"passed": True, "message": ""}


def raised(error: BaseException) -> str:
    """That an answer raised this, as the beginning of a sentence without its full stop."""
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
            return raised(MemoryError())
    said = text(error)
    return f"It raises {type(error).__name__}{': ' if said else ''}{said.rstrip('.')}"


def text(error: BaseException) -> str:
    """What the error says, on one line, shortened."""
    try:
        said = " ".join(str(error).split())
    except Exception:               # its own __str__ is the learner's
        said = ""
    return said if len(said) <= SAID else f"{said[:SAID]}..."


def place(error: BaseException | None) -> tuple[str, int] | None:
    """(file, line) of the last place in the learner's own code that the error came through."""
    if isinstance(error, Wrong):
        return error.place
    found, step = None, error.__traceback__ if error else None
    while isinstance(step, TracebackType):
        if step.tb_frame.f_globals.get("__name__") == NOTEBOOK:
            found = step.tb_frame.f_code.co_filename, step.tb_lineno
        step = step.tb_next
    return found


@contextmanager
def torch_as_it_was() -> Iterator[list[str]]:
    """Put back PyTorch's default dtype, gradients and threads; what had to be put back is told in the list."""
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    switched: list[str] = []
    try:
        yield switched
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
            switched.append("changes PyTorch's default dtype for the whole notebook: give `dtype=` where it is needed")
        if torch.is_grad_enabled() != grad:
            torch.set_grad_enabled(grad)
            switched.append("leaves gradients switched for the whole notebook: use `with torch.no_grad():`")
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def copied(value: Any) -> Any:
    """A copy that its receiver may spoil: of tensors, generators of noise, and what holds them."""
    match value:
        case Tensor():
            return value.detach().clone().requires_grad_(value.requires_grad)
        case torch.Generator():
            return torch.Generator(value.device).set_state(value.get_state())
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*map(copied, value))
        case list() | tuple():
            return type(value)(map(copied, value))
        case dict():
            return {key: copied(one) for key, one in value.items()}
    return value


def changed(before: Any, after: Any) -> bool:
    """Whether a copy is no longer what it was copied from; drawing from a generator of noise is no change."""
    match before:
        case Tensor():
            return before.shape != after.shape or not torch.equal(before, after)
        case list() | tuple():
            return len(before) != len(after) or any(map(changed, before, after))
        case dict():
            return before.keys() != after.keys() or any(changed(before[key], after[key]) for key in before)
        case int() | float() | str() | None:
            return before != after
    return False


def _careful(answer: Callable) -> Callable:
    return lambda *args, **kwargs: answer(*copied(args), **copied(kwargs))


def _alike(got: Any, value: Any, tol: float) -> bool:
    try:
        return difference(got, value, tol) is None
    except TypeError:           # of a type that is not compared
        return False


def _outcome(run: Callable, answer: Callable, caught: bool) -> tuple[Any, Exception | None]:
    """(result, None), or where errors are caught (None, error); noise without a generator is the same each time."""
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
