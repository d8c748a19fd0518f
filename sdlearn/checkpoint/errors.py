"""What can be wrong with a checkpoint, each in a sentence that names the file."""

from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint cannot be read or written; the message names the file and what to do."""


class TensorMismatch(CheckpointError):
    """The tensors of a file are not those that its config describes.

    The first line of the message is a sentence with the counts, then follows every tensor.
    `missing` and `unexpected` are names; `misshaped` holds (name, shape in the file, shape wanted).
    `against` is what the file was compared with, `advice` ends the sentence.
    """

    def __init__(self, file: Path, missing: list[str], unexpected: list[str],
                 misshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]], *,
                 against: str = "the config.json beside it",
                 advice: str = "both files must come from one model"):
        self.file, self.missing, self.unexpected, self.misshaped = file, missing, unexpected, misshaped
        counts = [f"{len(names)} {what}" for names, what in (
            (missing, "missing"), (unexpected, "unexpected"), (misshaped, "of another shape")) if names]
        names = [*missing, *unexpected, *(name for name, _, _ in misshaped)]
        lines = [f"{file} does not fit {against}: of its tensors, {', '.join(counts)}, "
                 f"the first being '{names[0]}'; {advice}."]
        lines += [f"  missing: {name}" for name in missing]
        lines += [f"  unexpected: {name}" for name in unexpected]
        lines += [f"  of another shape: {name} is {list(found)}, the config asks for {list(wanted)}"
                  for name, found, wanted in misshaped]
        super().__init__("\n".join(lines))


class TensorsNotFinite(CheckpointError):
    """Tensors of a file hold NaN or infinity; `names` are all of them, a line each behind the sentence."""

    def __init__(self, file: Path, names: list[str], dtype: object):
        self.file, self.names = file, names
        lines = [f"{file} holds NaN or infinity, as {dtype}, in {len(names)} of its tensors, the first being "
                 f"'{names[0]}'; the file is damaged, or {dtype} is too small for it: use another copy, or "
                 "float32."]
        super().__init__("\n".join([*lines, *(f"  not finite: {name}" for name in names)]))


def first_line(error: BaseException) -> str:
    """The first line of an error's message: the sentence without the list of tensors."""
    return (str(error).splitlines() or [type(error).__name__])[0]
