"""Exercises: right and wrong answers are recognised, and nothing that an answer does reaches the notebook."""

import ctypes
import dataclasses
import enum
import functools
import importlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import exercise_answers
import nbformat
import numpy as np
import pytest
import torch
from exercise_answers import RIGHT, WRONG, assert_accepted, assert_rejected, sample  # noqa: F401
from models import one_thread  # noqa: F401
from nbclient import NotebookClient
from torch import Tensor, nn

from sdlearn.exercises import NotRight, check, hint, progress, sandbox, serialization, solution, store
from sdlearn.exercises.cards import Card, shorten_output
from sdlearn.exercises.checking import Result
from sdlearn.exercises.difference import describe_difference, describe_resemblance
from sdlearn.exercises.exercise import GRADES, REGISTERED, STEPS, Lesson, exercises, find, is_stub
from sdlearn.exercises.serialization import Missing, deserialize, serialize
from sdlearn.exercises.testing import (
    Answer,
    Wrong,
    randn,
    require_permutation,
    require_shape,
    require_sums,
    with_weights,
)
from sdlearn.layers import zero_conv
from sdlearn.samplers import euler
from sdlearn.schedule import NoiseSchedule

for module in sorted(Path(exercise_answers.__path__[0]).glob("nb*.py")):
    importlib.import_module(f"exercise_answers.{module.stem}")

COURSE = [one for one in exercises() if one.module.startswith("sdlearn.")]
NAMES = [one.name for one in COURSE]


@pytest.fixture(autouse=True)
def own_progress(tmp_path, monkeypatch):
    """No test touches the progress of who runs it."""
    monkeypatch.setenv("SDLEARN_PROGRESS", str(tmp_path / "progress.json"))
    monkeypatch.delenv("SDLEARN_GRADING", raising=False)
    monkeypatch.setattr(store, "_unsaved", {})


@pytest.fixture(scope="module", autouse=True)
def no_process_stays():
    yield
    sandbox.close()


def good(schedule, x0, noise, t):
    return schedule.add_noise(x0, noise, t)


def stub(schedule, x0, noise, t):
    """As shipped."""
    raise NotImplementedError


# --- every exercise -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_is_complete(name):
    exercise = find(name)
    assert exercise.grade in GRADES and 0 < exercise.minutes <= 60 and exercise.asks
    assert len(exercise.hints) >= 2 and all(exercise.hints)
    assert len(exercise.tests) >= 3 and {test.step for test in exercise.tests} == set(STEPS)
    assert len(WRONG.get(name, [])) >= 5 and len(RIGHT.get(name, [])) >= 2
    assert exercise.solutions[0].__name__ in exercise.source() and exercise.source().count("\n") < 90
    for mistake in exercise.mistakes:
        assert not mistake.diagnosis.endswith(".") and "\n" not in mistake.diagnosis


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes_its_tests_in_the_sandbox(name):
    result = check.run(name, *find(name).solutions)
    assert result.right, result


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_are_accepted(name):
    for answers in RIGHT[name]:
        assert_accepted(name, *answers)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_answers_are_rejected_with_their_mistake(name):
    for answers, words in WRONG[name]:
        assert_rejected(name, *answers, words=words)


@pytest.mark.parametrize("name", NAMES)
def test_every_known_mistake_gets_its_own_diagnosis(name):
    """No diagnosis is unreachable or hidden by another one."""
    exercise = find(name)
    for mistake in exercise.mistakes:
        answers = tuple(mistake.answer if one == mistake.of else package
                        for one, package in zip(exercise.names, exercise.solutions, strict=True))
        assert_rejected(name, *answers, words=mistake.diagnosis[1:])    # its first letter may be a capital


@pytest.mark.parametrize("name", NAMES)
def test_a_stub_is_reported_as_unwritten_without_a_process(name, monkeypatch):
    monkeypatch.setattr("sdlearn.exercises.checking.run_request", None)        # no process is asked
    result = check.run(name, *[stub] * len(find(name).names))
    assert result.status == "unwritten" and result.of == len(find(name).tests)


def test_ids_and_names_are_unique_and_each_module_has_answers():
    assert len({one.id for one in COURSE}) == len({one.name for one in COURSE}) == len(COURSE) >= 10
    assert set(WRONG) == set(RIGHT) == set(NAMES)


# --- what check shows and returns -----------------------------------------------------------------------

def made(bias: bool):
    def zero_conv(channels):
        conv = nn.Conv2d(channels, channels, kernel_size=1)
        nn.init.zeros_(conv.weight)
        if not bias:
            nn.init.zeros_(conv.bias)
        return conv
    return zero_conv


def test_check_of_a_stub_returns_the_solution(capsys):
    assert check("zero_sample", stub) is zero_conv
    assert capsys.readouterr().out == ("98.1 zero_sample: not written yet: the course continues with its own. "
                                       "3 tests are waiting.\n")
    assert not store.path().exists()                                    # nothing was tried


def test_check_of_a_mistake_names_it_and_returns_the_solution(capsys):
    assert check("zero_sample", made(bias=True)) is zero_conv
    assert re.fullmatch(r"98\.1 zero_sample: 1 of 3\. The output is -?[\d.]+ where it must be 0 \(at \[.*\]\): "
                        r"the weight is zero, what else does a convolution add\?\n", capsys.readouterr().out)
    assert store.record(find("zero_sample")) == store.Record("98.1", done=False, attempts=1)


def test_check_of_a_right_answer_returns_it(capsys):
    mine = made(bias=False)
    assert check("zero_sample", mine) is mine
    assert capsys.readouterr().out == "98.1 zero_sample: right, 3 of 3.\nThe package's has nothing more.\n"
    assert store.record(find("zero_sample")).done
    check("zero_sample", made(bias=True))
    assert store.record(find("zero_sample")) == store.Record("98.1", done=True, attempts=2)     # done stays done


def test_several_names_are_passed_and_returned_together():
    split, merge = find("heads").solutions
    own = RIGHT["heads"][0]
    assert check("heads", *own) == own

    def merge_heads(x):
        raise NotImplementedError
    assert check("heads", own[0], merge_heads) == (split, merge)
    half = check.run("heads", own[0], merge_heads)
    assert (half.status, half.passed, half.message) == ("wrong", 2, "merge_heads is not written yet.")


def test_of_several_names_the_message_says_which_is_unwritten(capsys):
    class Upsample:
        def __init__(self, channels):
            raise NotImplementedError
    down = find("resample").solutions[0]
    assert check.run("resample", down, Upsample).message == "Upsample is not written yet."

    def split_heads(x, heads):
        raise NotImplementedError
    check("heads", split_heads, RIGHT["heads"][0][1])
    assert "own. split_heads is not written yet. 4 tests are waiting." in capsys.readouterr().out


def test_the_solution_itself_does_not_count_as_an_answer(capsys):
    assert check("zero_sample", zero_conv) is zero_conv
    assert "This is the course's own" in capsys.readouterr().out and not store.path().exists()


def test_in_grading_the_solution_is_never_returned(monkeypatch):
    with check.grading():
        for answer in (stub, made(bias=True), zero_conv):
            with pytest.raises(NotRight, match="98.1 zero_sample"):
                check("zero_sample", answer)
        assert callable(check("zero_sample", made(bias=False)))
    assert check("zero_sample", stub) is zero_conv
    monkeypatch.setenv("SDLEARN_GRADING", "1")
    with pytest.raises(AssertionError):
        check("zero_sample", stub)


def test_run_returns_a_result_and_records_nothing():
    result = check.run("zero_sample", made(bias=True))
    assert isinstance(result, Result) and (result.status, result.passed, result.of) == ("wrong", 1, 3)
    assert result.seconds > 0 and not result.right and not store.path().exists()


@pytest.mark.parametrize("call, message", [
    (lambda: check("add_nois", good), "did you mean add_noise"), (lambda: hint("zzz"), "there is no exercise 'zzz'"),
    (lambda: check("heads", good), "asks for split_heads, merge_heads: pass 2 answers, not 1"),
    (lambda: hint("add_noise", 9), "has hints 1 to 4, not 9"),
])
def test_a_wrong_call_raises_an_error_that_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_a_result_in_place_of_the_function_is_reported():
    assert "pass the function itself" in check.run("add_noise", 3.0).message


def test_an_error_is_reported_with_its_line():
    def add_noise(schedule, x0, noise, t):
        x0 = [x0][3]
        return x0
    assert check.run("add_noise", add_noise).message == \
        "It raises IndexError: list index out of range, in the line `x0 = [x0][3]`."


def test_what_is_printed_is_shown_once_and_shortened():
    def add_noise(schedule, x0, noise, t):
        for i in range(20000):
            print("line", i, "x" * 300)
        return schedule.add_noise(x0, noise, t)
    result = check.run("add_noise", add_noise)
    lines = result.printed.splitlines()
    assert result.right and lines[0].startswith("line 0 xxx") and lines[-1] == "..." or len(lines) <= 13
    assert len(result.printed) < 2000 and result.printed.count("line 0 ") == 1


@pytest.mark.parametrize("count", [1, 11, 12, 13, 40])
def test_printed_output_ends_with_an_ellipsis_where_lines_were_left_out(count):
    def add_noise(schedule, x0, noise, t):
        for i in range(count):
            print("line", i)
        raise ValueError
    expected = [f"line {i}" for i in range(min(count, 12))] + (["..."] if count > 12 else [])
    assert check.run("add_noise", add_noise).printed.splitlines() == expected


@pytest.mark.parametrize("length", [99, 100, 101, 400])
def test_a_long_line_of_printed_output_is_cut_with_an_ellipsis(length):
    assert shorten_output("a\n" + "x" * length) == "a\n" + "x" * min(length, 100) + (" ..." if length > 100 else "")


# --- harmful answers ------------------------------------------------------------------------------------

counter = 0


def counting(schedule, x0, noise, t):
    """Right once, as long as nobody has counted."""
    global counter
    counter += 1
    return schedule.add_noise(x0, noise, t) * (1 if counter == 1 else 2)


def patching():
    torch.softmax = torch.Tensor.reshape_as = NoiseSchedule.add_noise = None
    nn.Linear.forward = lambda self, x: x


def doing(action):
    """A right answer that does something first."""
    def add_noise(schedule, x0, noise, t):
        action()
        return schedule.add_noise(x0, noise, t)
    return add_noise


def loop():
    while True:
        pass


def shielded():
    while True:
        try:
            time.sleep(9)
        except BaseException:
            pass


def recurse():
    recurse()


def raising(error):
    def action(*_):
        raise error
    return action


def ignoring():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    loop()


HARM = {
    "a loop": (loop, "not done after 1 seconds"),
    "a loop that catches everything": (shielded, "not done after"),
    "a loop that ignores signals": (ignoring, "not done after"),
    "a wait in C": (lambda: ctypes.CDLL(None).pause(), "not done after"),
    "a deadlock": (lambda: [lock := threading.Lock(), lock.acquire(), lock.acquire()], "not done after"),
    "endless printing": (lambda: [print("x" * 10000) for _ in iter(int, 1)], "not done after"),
    "exit": (lambda: sys.exit(0), "calls exit()"),
    "quit": (raising(SystemExit()), "calls exit()"),
    "an end without notice": (lambda: os._exit(0), "ends Python itself"),
    "an interrupt": (raising(KeyboardInterrupt()), "raises KeyboardInterrupt"),
    "an exception that is none": (raising(BaseException("odd")), "raises BaseException: odd"),
    "a crash": (lambda: ctypes.string_at(0), "crashes Python (SIGSEGV)"),
    "an abort": (os.abort, "crashes Python (SIGABRT)"),
    "a recursion": (recurse, "without end"),
    "100 GB of list": (lambda: [0] * (100 * 2**27), "more memory"),
    "100 GB of bytes": (lambda: bytearray(100 * 2**30), "more memory"),
    "100 GB of tensor": (lambda: torch.ones(25 * 2**30), "more memory"),
    "memory bit by bit": (lambda: [bytearray(2**26) for _ in range(1000)], "more memory"),
    "the default dtype": (lambda: torch.set_default_dtype(torch.float64), "default dtype"),
    "gradients switched off": (lambda: torch.set_grad_enabled(False), "leaves gradients switched"),
    "input": (lambda: input("?"), "raises EOFError"),
}
HARMLESS = {
    "threads": lambda: torch.set_num_threads(3),
    "noise": lambda: [torch.manual_seed(7), np.random.seed(1), random.seed(2)],
    "closed files": lambda: os.closerange(0, 3),
    "streams gone": lambda: [setattr(sys, "stdout", None), setattr(sys, "stderr", io.StringIO())],
    "another folder": lambda: [os.chdir("/"), sys.path.clear()],
    "a thread that stays": lambda: threading.Thread(target=loop, daemon=True).start(),
    "environment": lambda: os.environ.clear(),
}


def state():
    """The state of this process that an answer might change."""
    return (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_rng_state().tolist(),
            random.getstate(), os.getcwd(), sys.stdout, sys.path[:], dict(os.environ), torch.softmax, counter,
            torch.Tensor.reshape, NoiseSchedule.add_noise, signal.getsignal(signal.SIGINT))


@pytest.mark.parametrize("what", HARM)
def test_a_harmful_answer_is_reported_and_changes_nothing(what):
    action, words = HARM[what]
    before = state()
    result = check.run("add_noise", doing(action), seconds=1 if "not done" in words else None)
    assert (result.status, result.passed) == ("wrong", 0) and words in result.message, result
    assert state() == before
    assert check.run("add_noise", good).right


@pytest.mark.parametrize("then", [loop, int])
def test_processes_that_an_answer_starts_end_with_the_test(tmp_path, then):
    note = str(tmp_path / "pid")

    def start():
        process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
        with open(note, "a") as file:
            print(process.pid, file=file)
        then()
    check.run("add_noise", doing(start), seconds=1)
    pids = Path(note).read_text().split()
    assert pids
    wait_for_the_end_of(pids)


def wait_for_the_end_of(pids):
    end = time.monotonic() + 20             # a process that was killed takes a moment
    while any(alive(int(pid)) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to ask does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("what", HARMLESS)
def test_a_change_of_global_state_reaches_neither_the_next_test_nor_the_notebook(what):
    before = state()
    result = check.run("add_noise", doing(HARMLESS[what]))
    assert result.right, result
    assert state() == before


def test_tests_share_no_state():
    """A global counts from 1 in every test; what is patched, the reference even, is whole in the next."""
    result = check.run("add_noise", counting)
    assert result.passed == 2 and counter == 0          # the third test calls twice

    def add_noise(schedule, x0, noise, t):
        result = schedule.add_noise(x0, noise, t)       # is there each time, once in a test
        patching()
        return result
    before = state()
    assert check.run("add_noise", add_noise).passed == 2
    assert state() == before
    assert check.run("add_noise", good).right


def test_a_worker_that_an_answer_kills_is_replaced():
    result = check.run("add_noise", doing(lambda: os.kill(os.getppid(), signal.SIGKILL)), seconds=1)
    assert result.status == "unchecked" and "has ended" in result.message
    assert check.run("add_noise", good).right


@pytest.fixture
def without_fork(monkeypatch):
    """As on Windows: the tests of a check run in one process, which is then replaced."""
    sandbox.close()
    monkeypatch.setattr(sandbox, "FORK", False)
    yield
    sandbox.close()


def test_checks_work_without_fork(without_fork):
    before = state()
    assert check.run("add_noise", good).right
    for what in ("a loop that catches everything", "a crash"):
        action, words = HARM[what]
        result = check.run("add_noise", doing(action), seconds=1 if "not done" in words else None)
        ended = "has ended" in result.message if what == "a crash" else words in result.message
        assert ended and result.passed == 0, result
    result = check.run("add_noise", counting)
    assert result.passed == 2                           # deserialized again for every test
    assert state() == before


def test_an_answer_that_loops_ends_with_the_notebook():
    """Where the notebook's process is killed, no process of a check survives."""
    code = ("from sdlearn.exercises import check, sandbox\n"
            "import os, threading, time\n"
            "def add_noise(schedule, x0, noise, t):\n"
            "    print('in', os.getpid(), flush=True)\n"
            "    while True: pass\n"
            "def report():\n"
            "    while not (sandbox._worker and sandbox._worker.ready): time.sleep(0.01)\n"
            "    print(sandbox._worker.process.pid, flush=True)\n"
            "threading.Thread(target=report, daemon=True).start()\n"
            "check.run('add_noise', add_noise, seconds=60)\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    children = Path(f"/proc/{worker}/task/{worker}/children")
    if not children.exists():
        pytest.skip("no /proc to see processes in")
    while not (running := children.read_text().split()):
        time.sleep(0.01)
    process.kill()
    process.wait()
    wait_for_the_end_of([worker, *running])


# --- serialization --------------------------------------------------------------------------------------

SCALE, LOCK = 3, threading.Lock()


def even(n):
    return True if n == 0 else odd(n - 1)


def odd(n):
    return False if n == 0 else even(n - 1)


class Base(nn.Module):
    width = 2

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(self.width, self.width)

    @property
    def double(self):
        return 2 * self.width

    @staticmethod
    def three():
        return SCALE

    @classmethod
    def make(cls):
        return cls()


class Child(Base):
    def forward(self, x):
        return super().three() * self.layer(x)


def test_functions_and_classes_are_serialized_with_what_they_use():
    @functools.lru_cache(maxsize=8)
    def fib(n):
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    def counted():
        nonlocal count
        count += 1
        return count
    count = 10
    carried = deserialize(serialize((even, Child, fib, counted, torch.no_grad()(lambda: torch.is_grad_enabled()),
                           lambda x, *, y=SCALE: x + y + np.pi)))
    there, child, fibonacci, counting, switched, default = carried
    assert there is not even and there(10) and not there(7)
    assert child is not Child and child.make().double == 4 and child.three() == 3
    assert child()(torch.zeros(1, 2)).shape == (1, 2)
    assert (fibonacci(20), counting(), counting(), count) == (6765, 11, 12, 10)
    assert switched() is False and default(1) == 4 + np.pi


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    colour: Colour = Colour.RED
    tags: list = dataclasses.field(default_factory=list)


def test_enums_and_dataclasses_are_serialized():
    def answer():
        return dataclasses.replace(Point(1), x=2), Colour["BLUE"], Point(1) == Point(1, Colour.RED, [])
    point, blue, equal = deserialize(serialize((answer,)))[0]()
    assert (point.x, point.colour.name, point.tags, blue.value, equal) == (2, "RED", [], 2, True)
    assert type(point) is not Point


def test_globals_named_only_in_the_body_of_an_inner_class_are_serialized():
    def answer(x):
        class Scaled:
            factor = SCALE

            def __call__(self, x: Tensor) -> Tensor:
                return self.factor * x
        return Scaled()(x)
    assert deserialize(serialize((answer,)))[0](2) == 6


def test_a_variable_that_two_closures_share_is_shared_after_loading():
    def make():
        def add():
            nonlocal count
            count += 1
        count = 0
        return add, lambda: count
    add, count = deserialize(serialize(make()))
    add()
    assert count() == 1


def test_an_answer_above_the_size_limit_raises_an_error(monkeypatch):
    big = torch.zeros(1000)
    monkeypatch.setattr(serialization, "LARGEST", 3000)
    with pytest.raises(ValueError, match="pass large objects as arguments"):
        serialize((lambda: big,))
    result = check.run("add_noise", lambda schedule, x0, noise, t: big)
    assert result.status == "unchecked" and "pass large objects" in result.message


def test_a_global_that_cannot_be_pickled_raises_only_when_it_is_used():
    def add_noise(schedule, x0, noise, t):
        with LOCK:
            return schedule.add_noise(x0, noise, t)
    assert "`LOCK` of the notebook (lock) cannot be brought into the check" in check.run("add_noise", add_noise).message

    def unused(schedule, x0, noise, t):
        return schedule.add_noise(x0, noise, t) if t is not None else LOCK
    assert check.run("add_noise", unused).right
    with pytest.raises(NameError, match="`x` of the notebook"):
        len(Missing("x", "file"))


# --- description of a difference ----------------------------------------------------------------------------

@pytest.mark.parametrize("got, expected, message", [
    (torch.zeros(2, 3), torch.zeros(3, 2), "has shape (2, 3) where it must be (3, 2)"),
    ([1.0], torch.zeros(1), "is a list where it must be a tensor"),
    (torch.zeros(2).double(), torch.zeros(2), "is float64 where it must be float32"),
    (torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([1.0, 2.0, 3.0]), "is NaN where it must be 3 (at [2])"),
    (torch.tensor(1.00002), torch.tensor(1.0), None), (torch.tensor(1.001), torch.tensor(1.0), "is 1.00"),
    (torch.tensor([torch.inf, torch.nan]), torch.tensor([torch.inf, torch.nan]), None),
    (torch.tensor([torch.inf]), torch.tensor([-torch.inf]), "is inf where it must be -inf"),
    ((1, 2.0), [1, 2.5], "item 2 of 2, is 2 where it must be 2.5"), ([1], [1, 2], "has 1 items where there must be 2"),
    ({"a": 1}, {"a": 2}, "at 'a', is 1 where it must be 2"), ({"b": 1}, {"a": 1}, "a dictionary of ['a']"),
    (None, 3, "is None where it must be a number, 3"), (True, 1, "is a bool"),
    ("x", None, "is 'x' where it must be None"),
    (torch.tensor([True]), torch.tensor([False]), "is 1 where it must be 0"),
])
def test_differences(got, expected, message):
    found = describe_difference(got, expected)
    assert found is None if message is None else message in found


@pytest.mark.parametrize("make", [
    lambda x: torch.tensor([x, x / 2]), lambda x: [x], lambda x: {"x": torch.tensor(x)},
    lambda x: (torch.tensor([x]), 1)])
def test_the_tolerance_is_relative_to_the_largest_expected_value(make):
    for expected in (5.0, 1.0, 1e-2, 1e-5, -1e-5):
        for relative, tol in ((1e-4, 1e-4), (1e-2, 1e-2)):
            assert describe_difference(make(expected * (1 + 0.9 * relative)), make(expected), tol) is None
            assert describe_difference(make(expected * (1 + 1.2 * relative)), make(expected), tol) is not None
    for got, expected in ((1e-5, 0.0), (1e-9, 0.0), (torch.inf, 1.0), (torch.nan, 0.0)):
        assert describe_difference(make(got), make(expected)) is not None
    assert describe_difference(make(1e-11), make(0.0)) is None               # rounding where zero is expected


def test_a_tensors_tolerance_is_that_of_its_largest_finite_value():
    expected = torch.tensor([1e-3, 10.0, torch.inf])
    assert describe_difference(expected + torch.tensor([9e-4, 0, 0]), expected) is None
    assert describe_difference(expected + torch.tensor([1.2e-3, 0, 0]), expected) is not None
    assert describe_difference(torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3])) is not None


@pytest.mark.parametrize("change, message", [
    (lambda x: -x, "the negative"), (lambda x: 2.5 * x, "2.5 times"), (lambda x: x.mT, "axes 0 and 1 are swapped"),
    (lambda x: x.reshape(2, 6), "in another shape"), (lambda x: x + 1, None), (lambda x: x.flip(0), None),
    (lambda x: x.double(), None),
])
def test_resemblances(change, message):
    x = randn(3, 4)
    found = describe_resemblance(change(x), x)
    assert found is None if message is None else message in found


def test_arguments_changed_in_place_and_a_missing_return_are_rejected():
    def spoils(schedule, x0, noise, t):
        return x0.mul_(2)

    def pops(schedule, x0, noise, t):
        return t.pop()
    x = torch.ones(2, 2)
    for answer, words in ((spoils, "`x0` in place"), (pops, "`t` in place"), (lambda *_: None, "returns None")):
        with pytest.raises(Wrong, match=words):
            Answer(find("add_noise"), "add_noise", answer)(None, x, x, [1, 2])
    assert x.eq(1).all()
    with pytest.raises(Wrong, match="no parameter `weight`: it has none"):
        with_weights(nn.Identity(), {"weight": x})


def test_violated_properties_raise_an_error_with_their_message():
    require_sums(torch.full((3, 4), 0.25), 1, -1, "which axis?")
    require_permutation([3, 1, 2], [1, 2, 3], "x")
    for call, message in [
        (lambda: require_sums(torch.full((3, 4), 0.25), 1, 0, "which axis did softmax run over?"),
         "Along axis 0 the sum is 0.75 where it must be 1: which axis did softmax run over?"),
        (lambda: require_permutation([1, 1], [1, 2], "An item is missing"), "An item is missing."),
        (lambda: require_shape([1], (1,)), "The result is a list where it must be a tensor."),
    ]:
        with pytest.raises(Wrong, match=re.escape(message)):
            call()


@pytest.mark.parametrize("got", [
    [1, 1, 2], [1, 2, 2, 2], [1, 2, 2, 3], [1, 2], [2, 2, 2], [], [1, 2, 3], [1, 2, 2, 2, 1]])
def test_a_permutation_has_each_item_equally_often(got):
    for order in ([1, 2, 2], [2, 1, 2], [2, 2, 1]):
        require_permutation(order, [1, 2, 2], "An item is missing")
        with pytest.raises(Wrong, match="An item is missing"):
            require_permutation(got, order, "An item is missing")


@pytest.mark.parametrize("off", [2e-4, -2e-4, 0.5, torch.nan])
def test_a_wrong_sum_in_one_place_raises_an_error(off):
    x = torch.full((3, 4), 0.25)
    x[1, 2] += off
    for dim, total in ((1, 1.0), (0, 0.75)):
        with pytest.raises(Wrong, match=f"Along axis {dim}"):
            require_sums(x, total, dim, "why?")


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 2), (2, 3, 1), (6,), (), (2, 4)])
def test_another_shape_with_the_same_number_of_items_is_rejected(shape):
    require_shape(torch.zeros(2, 3), (2, 3))
    with pytest.raises(Wrong, match=re.escape(f"shape {shape} where it must be (2, 3)")):
        require_shape(torch.zeros(shape), (2, 3))


@pytest.mark.parametrize("weights, message", [
    ({"weight": torch.ones(2, 2)}, "a parameter `bias`, which must not be there"),
    ({"weight": torch.ones(2, 2), "bias": torch.ones(3)}, "`bias` has shape (2,) where it must be (3,)"),
    ({"weight": torch.ones(2, 2), "bias": torch.ones(2), "scale": torch.ones(2)}, "no parameter `scale`"),
])
def test_parameters_of_other_names_and_shapes_are_reported(weights, message):
    with pytest.raises(Wrong, match=re.escape(message)):
        with_weights(nn.Linear(2, 2), weights)
    with pytest.raises(Wrong, match="must make an nn.Module"):
        with_weights(lambda x: x, weights)
    layer = with_weights(nn.Linear(2, 1), {"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    assert layer(torch.tensor([[2.0, 3.0]])).item() == 6


# --- authors ----------------------------------------------------------------------------------------------

def test_an_invalid_definition_of_an_exercise_raises_an_error():
    lesson = Lesson(97, "Wrong")
    given = {"grade": "guided", "minutes": 1, "asks": "x", "hints": ["a", "b"]}
    for place, changes, words in [(1, {"grade": "easy"}, "no grade 'easy'"), (1, {"name": "add_noise"}, "exists")]:
        with pytest.raises(ValueError, match=words):
            lesson.exercise(place, euler, **given | changes)
    one = lesson.exercise(1, euler, **given | {"name": "one"})
    try:
        with pytest.raises(ValueError, match="no step 'first'"):
            one.test("first")
        one.test("edge case")(print)
        with pytest.raises(ValueError, match="comes after"):
            one.test("shape")
        with pytest.raises(ValueError, match="does not ask for 'two'"):
            one.mistake("x", of="two")
        with pytest.raises(ValueError, match="97.1 one exists already"):
            lesson.exercise(1, euler, **given | {"name": "other"})
    finally:
        del REGISTERED["one"]


def test_stubs_are_recognised():
    class Written(nn.Module):
        def forward(self, x):
            return x

    class Stub(nn.Module):
        def __init__(self):
            super().__init__()

        def forward(self, x, *rest, y=1, **more):
            """Here."""
            raise NotImplementedError("write me")

    def half(x):
        if x:
            raise NotImplementedError
        return x
    assert is_stub(stub) and is_stub(Stub) and not is_stub(Written)
    assert not any(map(is_stub, (half, good, print, zero_conv)))


# --- hints, solutions, progress -----------------------------------------------------------------------------

def test_hints_continue_at_the_next_level_and_end_at_the_solution(capsys):
    for _ in range(4):
        hint("zero_sample")
    hint("zero_sample", 1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ", 1)[0] for line in lines] == [f"98.1 zero_sample, hint {i} of 3" for i in (1, 2, 3, 3, 1)]
    assert 'solution("zero_sample")' in lines[2] and store.record(find("zero_sample")).hints == 3
    assert json.loads(store.path().read_text())["exercises"]["zero_sample"]["hints"] == 3


def test_a_solution_is_the_packages_source(capsys):
    solution("make_timesteps")
    printed = capsys.readouterr().out
    assert "def make_timesteps(schedule: NoiseSchedule, num_inference_steps: int" in printed
    assert "four more spacings" in printed
    solution("add_noise")
    printed = capsys.readouterr().out
    assert printed.index("def add_noise(self") < printed.index("def _alpha_sigma_like(self")
    assert "\n    \"\"\"The forward process, x_t = alpha x0" in printed      # indented as in the package


def test_progress_counts_solved_exercises(capsys):
    store.update(find("ddim"), done=True, attempts=1)
    store.update(find("euler"), attempts=1)
    progress()
    lines = capsys.readouterr().out.splitlines()
    of = sum(one.lesson.number == 3 for one in COURSE)
    third = next(line for line in lines if line.startswith("03"))
    assert re.fullmatch(rf"03 Noise and samplers +#+\.+  1 of {of}", third)
    of = sum(one.lesson.number == 4 for one in COURSE)
    assert next(line for line in lines if line.startswith("04")).endswith(f" 0 of {of}")


@pytest.mark.parametrize("text", [
    "{", "[]", '{"exercises": {"ddim": {"id": "3.6", "done": 1}}}', '{"exercises": 3}', "\0"])
def test_a_damaged_progress_file_is_renamed_and_reported(text, capsys):
    store.path().write_text(text)
    hint("ddim")
    assert "is damaged: it is renamed" in capsys.readouterr().out
    assert store.path().with_suffix(".damaged.json").read_text() == text
    hint("ddim")
    out = capsys.readouterr().out
    assert "hint 2 of 4" in out and "damaged" not in out


def test_progress_under_an_old_name_is_read_as_the_new_ones(monkeypatch):
    monkeypatch.setattr(store, "RENAMED", {"oldest_name": "ddim", "old_name": "ddim", "old_euler": "euler"})
    held = {"oldest_name": {"id": "3.6", "done": True, "attempts": 2, "hints": 1},
            "old_name": {"id": "3.6", "attempts": 1, "hints": 3}, "ddim": {"id": "3.6", "attempts": 4},
            "old_euler": {"id": "3.7", "done": True, "attempts": 1}}
    store.path().write_text(json.dumps({"version": 1, "exercises": held}))
    assert store.record(find("ddim")) == store.Record("3.6", done=True, attempts=7, hints=3)
    assert store.update(find("euler"), hints=1) == ""
    written = json.loads(store.path().read_text())["exercises"]
    assert written.keys() == {"ddim", "euler"} and written["euler"]["done"] and written["ddim"]["attempts"] == 7


@pytest.mark.parametrize("call", [lambda name: check(name, good), hint, solution, find])
def test_an_old_name_of_an_exercise_raises_an_error_that_gives_the_new_one(call, monkeypatch):
    monkeypatch.setitem(store.RENAMED, "old_name", "add_noise")
    with pytest.raises(ValueError, match="the exercise 'old_name' is now called 'add_noise'"):
        call("old_name")


def test_renamed_exercises_lead_to_exercises_of_the_course():
    assert set(store.RENAMED.values()) <= set(NAMES) and not set(store.RENAMED) & set(NAMES)


def test_a_progress_file_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDLEARN_PROGRESS", str(tmp_path / "file" / "progress.json"))
    hint("ddim")
    hint("ddim")
    out = capsys.readouterr().out
    assert "hint 2 of 4" in out and out.count("could not be saved") == 2
    mine = made(bias=False)
    assert check("zero_sample", mine) is mine


def test_a_write_that_fails_leaves_the_old_file(monkeypatch):
    store.update(find("ddim"), attempts=1)
    before = store.path().read_text()
    monkeypatch.setattr(store.os, "replace", raising(OSError(28, "No space left on device")))
    assert "No space left" in store.update(find("ddim"), attempts=1)
    assert store.path().read_text() == before and os.listdir(store.path().parent) == ["progress.json"]


def test_cards_escape_html_of_the_learner():
    card = Card("orange", "3.1 x", "1 of 4", ("It raises <b>: `a < b` and", "an ` alone"), "plain", "<script>")
    page = card._repr_html_()
    assert "<script>" not in page and "<b>:" not in page and "a &lt; b</code>" in page and "an ` alone" in page
    assert repr(card) == "plain" and "http" not in page


# --- in a notebook ------------------------------------------------------------------------------------------

CELLS = ["""import os, sys, time, torch, ctypes
from sdlearn.exercises import check, hint, progress, solution, sandbox
from sdlearn.schedule import NoiseSchedule
FACTOR = 1.0
def add_noise(schedule, x0, noise, t):
    raise NotImplementedError
add_noise = check("add_noise", add_noise)
assert add_noise is NoiseSchedule.add_noise and sandbox._worker is None""", """
def shares(schedule, x0, t):
    return schedule._alpha_sigma_like(x0, t)
def add_noise(schedule, x0, noise, t):
    print("at", t)
    alpha, sigma = shares(schedule, x0, t)
    return FACTOR * (alpha * x0 + sigma * noise)
mine = add_noise
add_noise = check("add_noise", add_noise)
assert add_noise is mine""", """
def add_noise(schedule, x0, noise, t):
    return x0[9]
add_noise = check("add_noise", add_noise)""", """
def doing(action):
    def add_noise(schedule, x0, noise, t):
        action()
        return x0
    return add_noise
def loop():
    while True: pass
def fork():
    os.fork(); loop()
for action in (loop, fork, sys.exit, lambda: exit(), lambda: ctypes.string_at(0), lambda: os._exit(3),
               lambda: bytearray(10**11), lambda: [print("x" * 1000) for _ in range(10**5)]):
    print(check.run("add_noise", doing(action), seconds=2).message)""", """
import asyncio, threading
threading.Timer(1.0, lambda: os.kill(os.getpid(), 2)).start()
try:
    check.run("add_noise", doing(loop), seconds=60)
except KeyboardInterrupt:
    print("interrupted")
print(check.run("add_noise", mine).right, torch.ones(1000, 1000).sum().item())""", """
from torch import nn
from sdlearn.attention import attend
class CrossAttention(nn.Module):
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
    def forward(self, x, context):
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))
CrossAttention = check("CrossAttention", CrossAttention)""", """hint("ddim")
solution("euler")
progress()"""]


def test_in_a_kernel():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=180, kernel_name="python3").execute()
    plain = [[output.get("text") or output["data"]["text/plain"] for output in cell.outputs] for cell in notebook.cells]
    assert plain[0] == ["3.1 add_noise: not written yet: the course continues with its own. 4 tests are waiting."]
    assert plain[1] == ["3.1 add_noise: right, 4 of 4.\nIt printed:\n    at 400"]
    assert plain[2] == ["3.1 add_noise: 0 of 4. It raises IndexError: index 9 is out of bounds for dimension 0 with "
                        "size 2, in the line `return x0[9]`."]
    words = ("not done after 2 seconds", "not done after", "calls exit()", "calls exit()", "SIGSEGV",
             "ends Python itself", "more memory", "The result is")
    for line, word in zip("".join(plain[3]).splitlines(), words, strict=True):
        assert word in line
    assert "".join(plain[4]).splitlines() == ["interrupted", "True 1000000.0"]
    assert plain[5][0].startswith("4.4 CrossAttention: right, 6 of 6.")
    data = [output["data"] for cell in notebook.cells for output in cell.outputs if "data" in output]
    assert all("text/html" in one or "text/markdown" in one for one in data) and len(data) == 7
