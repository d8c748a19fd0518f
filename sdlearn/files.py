"""Atomic writes: whoever reads a file sees its old contents or its new ones, never a part of them."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(target: str | Path) -> Iterator[Path]:
    """Yields a temporary path on the same file system, for a file or a folder, and renames it to `target` at the end.

        with write_atomically("model/card.json") as path:
            path.write_text(text)

    The folder that holds `target` is created where it is missing. A folder that exists is updated file by file: its
    other files are preserved. An error in the block leaves `target` as it was; so does a killed process, which can
    leave the temporary path behind. Raises OSError, in one sentence that names `target`, where it cannot be written.
    """
    target = Path(target)
    room = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        written = room / target.name
        yield written
        if written.is_dir() and target.is_dir():
            for file in sorted(path for path in written.rglob("*") if path.is_file()):
                (target / file.relative_to(written)).parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target / file.relative_to(written))
        else:
            os.replace(written, target)
    except OSError as error:
        raise OSError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)
