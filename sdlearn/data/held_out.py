"""Texts that training never renders, so that a model can be evaluated on wordings that it has not seen."""

import re
import tomllib
from functools import cache
from pathlib import Path

# Hand-written prompts of the evaluation: [[prompts]] with a `text` each, and what the image has to show.
OTHER_WORDINGS_FILE = Path(__file__).with_name("other_wordings.toml")


def normalize(text: str) -> str:
    """Lower case, words one space apart, no punctuation but "&": equal for texts that differ in no word."""
    return " ".join(re.findall(r"[\w&]+", re.sub(r"['\u2019]", "", text.lower())))


@cache
def held_out_texts(file: Path = OTHER_WORDINGS_FILE) -> frozenset[str]:
    """The normalized texts of the file; none where there is no file."""
    prompts = tomllib.loads(file.read_text(encoding="utf-8"))["prompts"] if file.exists() else []
    return frozenset(normalize(prompt["text"]) for prompt in prompts)


def is_held_out_text(text: str) -> bool:
    """Whether this is one of the held-out texts, whatever its capitals and punctuation."""
    return normalize(text) in held_out_texts()
