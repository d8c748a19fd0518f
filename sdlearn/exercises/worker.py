"""The worker process in which learners' code runs; `sandbox.py` is its client.

It reads requests from its standard input, and writes lines of JSON to its original standard output:

    request     8 bytes, its length; then a pickled dictionary {module, name, path, folder, answers, seconds, memory}
    answer      {"ready"}, {"printed", "test"}..., {"test", "passed", "message", "written", "place"}..., {"end"}

Where the system can fork, each test runs in its own fork of this process, which has imported PyTorch and never
used it: no threads, no locks, no state of an earlier test. The fork leads its own session, may take a given
amount of memory more than it has, and is killed with all its children when its time is up. Elsewhere the tests
of one check run here, one after the other, with the answer deserialized again for each; then the process ends,
and the client starts a new one.
"""

import importlib
import io
import json
import os
import pickle
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch

from .exercise import find
from .serialization import deserialize
from .testing import run_test, torch_state_restored

try:
    import resource
except ImportError:             # Windows
    resource = None

PRINTED = 4000          # characters of a test's output that are passed on
FULL = 77               # exit status for too much memory
TICK = 0.003            # seconds between two polls of a running test


def serve(fork: bool = hasattr(os, "fork")):
    """Answer requests until the input ends, or one only without `fork`."""
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    if fork:
        signal.signal(signal.SIGINT, signal.SIG_IGN)    # a notebook's "interrupt" is for the notebook
    torch.set_num_threads(1)
    _send(answers, {"ready": True})
    while request := _read(requests):
        try:
            _answer(request, requests, answers, fork)
        except Exception as error:                      # the exercise itself cannot be imported
            _send(answers, {"failed": "".join(traceback.format_exception_only(error)).strip()})
        _send(answers, {"end": True})
        if not fork:
            return


def _answer(request: dict, requests: int, answers: int, fork: bool):
    sys.path[:] = request["path"]
    os.chdir(request["folder"])
    importlib.import_module(request["module"])
    exercise = find(request["name"])
    for index, test in enumerate(exercise.tests):
        seconds = request["seconds"] or test.seconds
        _send(answers, {"test": index, "seconds": seconds})
        result = _run_in_fork(request, index, seconds, requests, answers) if fork else _run(request, index, answers)
        _send(answers, {"test": index, **result})
        if not result["passed"]:
            return


def _run(request: dict, index: int, answers: int) -> dict:
    """Run that test in this process."""
    sys.stdout = sys.stderr = _Printed(answers, index)
    sys.setrecursionlimit(1000)
    random.seed(0)
    torch.default_generator.manual_seed(0)
    with torch_state_restored():
        exercise = find(request["name"])
        try:
            functions = deserialize(request["answers"])
        except BaseException as error:
            message = f"It cannot be brought into the check ({type(error).__name__}: {error})."
            return {"passed": False, "message": message, "written": True, "place": None}
        return run_test(exercise, functions, index)


def _run_in_fork(request: dict, index: int, seconds: float, requests: int, answers: int) -> dict:
    """Run that test in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(requests)
            os.setsid()
            _limit(request["memory"], seconds)
            os.write(writing, json.dumps(_run(request, index, answers)).encode())
        finally:
            os._exit(0)         # without the exit handlers that the learner's code may have registered
    os.close(writing)
    status = _watch(child, seconds, requests)
    os.set_blocking(reading, False)
    try:
        result = json.loads(os.read(reading, 2**16))
    except (ValueError, BlockingIOError):               # it ended before it could report
        result = {"passed": False, "message": _ending(status, seconds), "written": True, "place": None}
    os.close(reading)
    return result


def _watch(child: int, seconds: float, requests: int) -> int | None:
    """Wait for the process; its exit status, or None where its time was up."""
    end, stopped = time.monotonic() + seconds, False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _kill(child, os.killpg)                     # processes that it may have started
            return None if stopped else status
        gone = bool(select.select([requests], [], [], TICK)[0])     # the client has closed the pipe
        if gone or time.monotonic() > end:
            _kill(child, os.killpg)
            _kill(child, os.kill)                       # it may not lead its session yet
            if gone:
                os._exit(0)
            stopped = True


def _kill(child: int, kill: Callable[[int, int], None]):
    try:
        kill(child, signal.SIGKILL)
    except OSError:
        pass


def _ending(status: int | None, seconds: float) -> str:
    if status is None:
        return f"It was not done after {seconds:g} seconds: does a loop have no end?"
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"It crashes Python ({name}): which call leaves Python, and with which arguments?"
    if os.WEXITSTATUS(status) == FULL:
        return "It asks for more memory than a check may take: how large is what it makes?"
    return "It ends Python itself, and the notebook with it: leave a function with `return`."


def _limit(memory: int, seconds: float):
    """Limit this process to `memory` bytes more than now, without core files; outside Linux a thread enforces it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cpu = int(seconds) + 5          # in case the parent is gone
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
        return
    start = _resident()

    def watch():
        while _resident() < start + memory:
            time.sleep(0.02)
        os._exit(FULL)
    threading.Thread(target=watch, daemon=True).start()


def _resident() -> int:
    """Peak resident memory of this process in bytes; macOS reports bytes, other systems kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Printed(io.TextIOBase):
    """Text stream that sends the first PRINTED characters to the client and drops the rest."""

    def __init__(self, answers: int, index: int):
        self.answers, self.index, self.left = answers, index, PRINTED

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.left > 0 and text:
            _send(self.answers, {"printed": text[:self.left], "test": self.index})
        self.left -= len(text)
        return len(text)


def _send(answers: int, message: dict):
    # The newline in front ends a line that a killed process left unfinished.
    data = f"\n{json.dumps(message)}\n".encode()
    while data:
        data = data[os.write(answers, data):]


def _read(requests: int) -> dict | None:
    head = _bytes(requests, 8)
    return pickle.loads(_bytes(requests, int.from_bytes(head, "big"))) if len(head) == 8 else None


def _bytes(requests: int, count: int) -> bytes:
    parts = []
    while count and (part := os.read(requests, min(count, 2**20))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
