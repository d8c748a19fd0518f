"""Client of the sandbox, the worker process in which learners' code runs (`worker.py`).

**Why a process.** A loop in C, a crash or a hundred gigabytes cannot be stopped from inside Python, so an
answer never runs in the notebook's own process, and nothing that it changes is the notebook's.
**Why not a fork of the notebook.** A kernel has threads, its own and PyTorch's, and a fork of it may hang
on a lock that one of them held; macOS and CUDA forbid it outright, Windows has none. So a fresh Python is
started once, and the answer is sent there by value (`serialization.py`); where the system can fork, each test
runs in a fork of that process, which has no threads (30 ms). Starting it takes as long as importing PyTorch.

**What it does not stop**: an answer that is meant to deceive. It runs as the same user, and can reach files and
the test that checks it. On Windows only the time is limited, not the memory.
"""

import atexit
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

START = 180.0           # seconds for a Python to start and to import PyTorch, on a slow disk
GRACE = 15.0            # seconds after a test's limit in which the worker must report that it is over
EXIT = 2.0              # seconds that the worker has to end by itself
MEMORY = 2**30          # bytes that an answer may take

FORK = hasattr(os, "fork")
_lock = threading.Lock()
_worker: "Worker | None" = None


class SandboxError(RuntimeError):
    """The worker process could not be started, or has ended."""


class Worker:
    """A running worker process. A thread reads its messages, since a pipe has no timeout on Windows."""

    def __init__(self, fork: bool = FORK):
        self.fork = fork
        command = [sys.executable, "-c", f"from {__package__}.worker import serve; serve(fork={fork})"]
        folders = [os.path.abspath(folder) for folder in sys.path]
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        own_group = {"start_new_session": True} if os.name == "posix" \
            else {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(folders)}, **own_group)
        except OSError as error:
            raise SandboxError(f"the process that runs it could not be started ({error})") from error
        self.messages: queue.SimpleQueue = queue.SimpleQueue()
        self.ready = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        for line in self.process.stdout:
            try:
                self.messages.put(json.loads(line))
            except ValueError:              # empty, or cut off
                continue
        self.messages.put(None)

    def next(self, seconds: float) -> dict | None:
        """The next message, or None after that many seconds. Raises SandboxError when the process has ended."""
        try:
            message = self.messages.get(timeout=seconds)
        except queue.Empty:
            return None
        if message is None:
            raise SandboxError("the process that ran it has ended")
        return message

    def start(self):
        """Wait until it is ready."""
        if not self.ready:
            if self.next(START) is None:
                raise SandboxError(f"the process that runs it did not start within {START:g} seconds")
            self.ready = True

    def send(self, request: dict):
        data = pickle.dumps(request)
        try:
            self.process.stdin.write(len(data).to_bytes(8, "big") + data)
            self.process.stdin.flush()
        except OSError as error:
            raise SandboxError("the process that runs it has ended") from error

    def close(self):
        """End the process. A forking worker sees its input close first, and then ends the fork that runs."""
        try:
            self.process.stdin.close()
        except OSError:
            pass
        if self.fork and self.ready:
            try:
                self.process.wait(EXIT)
            except subprocess.TimeoutExpired:
                pass
        self.process.kill()
        self.process.wait()


def run_request(request: dict) -> Iterator[dict]:
    """Yields the answers to a request: {"printed"} messages and a result for each test, up to the first that fails.

    A worker that a test has ended, or that does not answer in time, is replaced. Raises SandboxError where no
    worker can be started.
    """
    with _lock:
        worker = _start_worker()
        try:
            yield from _read_answers(worker, request)
        except BaseException:           # also when the generator is closed, or the user interrupts
            close()
            raise
        if not worker.fork:             # it answers one request only: start the next one now
            close()
            _start_worker(wait=False)


def _read_answers(worker: Worker, request: dict) -> Iterator[dict]:
    worker.send(request)
    limit, current = START, 0           # until the first test begins: the exercises are imported
    end = time.monotonic() + limit
    while True:
        answer = worker.next(max(0.0, end - time.monotonic()))
        match answer:
            case None:
                message = f"It was not done after {limit:g} seconds: does a loop have no end?"
                close()
                yield {"test": current, "passed": False, "message": message, "written": True, "place": None}
                return
            case {"seconds": limit, "test": current}:
                end = time.monotonic() + limit + (GRACE if worker.fork else 0)
            case {"end": _}:
                return
            case {"failed": why}:
                raise SandboxError(f"the exercise could not be loaded there: {why}")
            case _:
                yield answer


def _start_worker(wait: bool = True) -> Worker:
    global _worker
    for attempt in (1, 2):              # a worker that has ended since is replaced once
        if _worker is None or _worker.process.poll() is not None:
            _worker = Worker(FORK)
        if not wait:
            return _worker
        try:
            _worker.start()
            return _worker
        except BaseException as error:
            close()
            if attempt == 2 or not isinstance(error, SandboxError):
                raise
    return _worker


def close():
    """End the worker; the next check starts another."""
    global _worker
    if _worker is not None:
        _worker.close()
        _worker = None


atexit.register(close)
