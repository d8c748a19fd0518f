"""Warnings for parts of a prompt that have no effect: words that the model was not trained on, truncated tokens."""

import difflib
import re
import textwrap
import unicodedata
from collections.abc import Iterator

from .. import prompt as prompts
from .settings import as_settings_error


class PromptWarning(UserWarning):
    """The prompt is used, but a part of it has no effect."""


class UnknownWordWarning(PromptWarning):
    """The prompt has a word that is not in the training captions."""


class LongPromptWarning(PromptWarning):
    """The prompt has more tokens than the text encoder has positions, and was truncated."""


def prompt_warnings(model, *texts: str, long_prompts: str = "cut") -> Iterator[tuple[type[PromptWarning], str]]:
    """Pairs of a warning's class and its message. Raises SettingsError for a prompt that cannot be parsed."""
    length = model.config.text.length
    for text in texts:
        lost = as_settings_error(prompts.get_truncated_text, text, model.tokenizer, length)
        if lost and long_prompts == "cut":
            yield LongPromptWarning, (
                f"the prompt is longer than {length} tokens; its end is cut off: "
                f"\"{textwrap.shorten(lost, 200, placeholder=' ...')}\"; long_prompts=\"chunks\" reads all of it")
    words = " ".join(map(prompts.remove_weights, texts)).lower()
    for word in sorted(model.tokenizer.added, key=len, reverse=True):     # learned embeddings, the longest first
        words = words.replace(word, " ")
    if model.world is not None and (unknown := unknown_words(words, model.world["words"])):
        yield UnknownWordWarning, (
            f"the model was never taught {', '.join(unknown)}; it will guess. "
            f"It knows {len(model.world['objects'])} objects, listed in model.world")


def unknown_words(text: str, known: list[str]) -> list[str]:
    """The words and pictographs of a text that are not in `known`, quoted, each with the closest known word."""
    found = []
    for word in re.findall(r"\w+|[^\w\s]", re.sub(r"['’]s\b", "", text.lower())):
        has_meaning = word[0].isalnum() or (not word.isascii() and unicodedata.category(word[0])[0] == "S")
        if has_meaning and word not in known and word not in found:
            found.append(word)
    near = {word: difflib.get_close_matches(word, known, n=1, cutoff=0.75) for word in found}
    return [f"'{word}'" + (f" (did you mean '{near[word][0]}'?)" if near[word] else "") for word in found]
