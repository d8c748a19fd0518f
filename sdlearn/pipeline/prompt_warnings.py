"""What of a prompt will not be heard: words the model was never taught, and what is cut off."""

import difflib
import re
import unicodedata


class PromptWarning(UserWarning):
    """The prompt runs, but not all of it will be heard."""


class UnknownWordWarning(PromptWarning):
    """The prompt has a word that the model was never taught."""


class LongPromptWarning(PromptWarning):
    """The prompt has more tokens than the text encoder has places, and was cut."""


def unknown_words(text: str, known: list[str]) -> list[str]:
    """The words and pictographs of a text that are not in `known`, quoted, with what may have been meant."""
    found = []
    for word in re.findall(r"\w+|[^\w\s]", re.sub(r"['’]s\b", "", text.lower())):
        told = word[0].isalnum() or (not word.isascii() and unicodedata.category(word[0])[0] == "S")
        if told and word not in known and word not in found:
            found.append(word)
    near = {word: difflib.get_close_matches(word, known, n=1, cutoff=0.75) for word in found}
    return [f"'{word}'" + (f" (did you mean '{near[word][0]}'?)" if near[word] else "") for word in found]
