"""CLIP's tokenizer: byte-level byte-pair encoding (BPE), from scratch.

Text becomes token ids in four steps, and each is one function here:

    clean        "A  Red CAT's hat"  ->  "a red cat's hat"
    split        "a red cat's hat"   ->  a | red | cat | 's | hat
    to_symbols   "cat"               ->  c  a  t</w>              one symbol for each byte of UTF-8
    merge_steps  c a t</w>           ->  c at</w>  ->  cat</w>    the merges, in the order they were learnt

Since every byte is a symbol, any text has ids and no text is "unknown"; since whole words that are
frequent end as one symbol, usual captions have few. `</w>` marks the end of a word, so that "cat" the word
and "cat" the beginning of "catalogue" are different tokens.

Sources: Sennrich et al. 2016 (Neural machine translation of rare words with subword units, BPE), Radford
et al. 2019 (GPT-2, BPE on bytes) and 2021 (CLIP). Files are read and written in `checkpoint.tokenizer`.

Which tokenizer is followed. OpenAI's original, open_clip and transformers give the same ids for usual
captions, and part ways beyond them. This file follows `transformers.CLIPTokenizer`, which is what the
Stable Diffusion pipelines of today run, and which needs no further library:

- Nothing is repaired. The originals turn `&amp;` into `&` (html.unescape, twice), and their ftfy mends
  broken encodings, makes curly quotes straight, ligatures and full-width letters plain, and drops control
  characters: with them "don’t" is "don't", here it is three words and the quote is a symbol.
- Text is composed first (NFC), so "e" followed by an accent is the one letter "é" (ftfy does so too).
- White space is Unicode's White_Space. Python counts U+001C to U+001F as well: here they are symbols.
- Lower case is taken character by character: a Greek sigma at the end of a word has no final form.
- "<|startoftext|>" and "<|endoftext|>" written in a text, in lower case, are those tokens wherever they
  stand. The original finds them in upper case too, but not behind other symbols; open_clip never.
- Only the apostrophe with s, t, re, ve, m, ll, d is an ending; the original also takes the long s, "'ſ".

Two differences are kept. In the published folders of SD 2.x the padding token is "!", id 0, and with it
transformers turns every "!" of a text into padding. Those models were trained with open_clip, which reads
it as a word; so does this file, and only pads with id 0. And "<|ENDOFTEXT|>!", in upper case with a symbol
right behind it, ends in "|>!" like any run of symbols, where transformers cuts after "|>".

Characters newer than the Unicode tables of a library are symbols to it: what Python's `unicodedata` does not
know, and some combining marks of after 2016, which transformers does not compose past.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby, islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
LENGTH = 77                     # tokens of a prompt, start and end included
SPECIAL = re.compile(f"({re.escape(START)}|{re.escape(END)})")
SPACES = re.compile(r"[^\S\x1c-\x1f]+")     # Unicode's White_Space, which leaves out U+001C to U+001F
CONTRACTIONS = ("s", "t", "re", "ve", "m", "ll", "d")

Pair = tuple[str, str]


def _byte_symbols() -> dict[int, str]:
    """The printable symbol that stands for each byte, in the order of CLIP's ids.

    Bytes that print in Latin-1 stand for themselves and come first; the others (space, controls) borrow
    the characters from U+0100 on, so that a file of merges can be read and split at spaces.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


SYMBOL_OF = _byte_symbols()
BYTE_OF = {symbol: byte for byte, symbol in SYMBOL_OF.items()}


# ---------------------------------------------------------------------------- the four steps

def clean(text: str) -> str:
    """Composed (NFC), white space collapsed to single spaces, lower case."""
    text = SPACES.sub(" ", unicodedata.normalize("NFC", text))
    return "".join(map(str.lower, text))     # one by one: "Σ".lower() would look at its neighbours


def split(text: str) -> list[str]:
    """Cut cleaned text into words: runs of letters, single digits, runs of anything else but space.

    As CLIP's pattern `'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+` cuts it. An apostrophe
    that stands alone takes the ending that follows: "it's" is "it" and "'s".
    """
    words, before = [], ""
    for kind, run in groupby(text, _kind):
        run = before_ending = "".join(run)
        if kind == "L" and before == "'":
            ending = next((e for e in CONTRACTIONS if run.startswith(e)), "")
            words[-1] += ending
            run = run[len(ending):]
        if kind == "N":
            words += run
        elif kind != " " and run:
            words.append(run)
        before = before_ending
    return words


def _kind(char: str) -> str:
    """L for a letter, N for a number, a space for a space, and P for all that is left."""
    kind = unicodedata.category(char)[0]
    return kind if kind in "LN" else " " if char == " " else "P"


def to_symbols(word: str) -> list[str]:
    """One symbol for each byte of the word in UTF-8, the last one marked as the word's end."""
    symbols = [SYMBOL_OF[byte] for byte in word.encode("utf-8")]
    return symbols[:-1] + [symbols[-1] + WORD_END]


def merge(symbols: list[str], pair: Pair) -> list[str]:
    """Join every occurrence of the pair, from left to right."""
    merged, i = [], 0
    while i < len(symbols):
        found = symbols[i] == pair[0] and symbols[i + 1:i + 2] == [pair[1]]
        merged.append(pair[0] + pair[1] if found else symbols[i])
        i += 2 if found else 1
    return merged


def merge_steps(symbols: list[str], ranks: dict[Pair, int]) -> Iterator[tuple[int | None, list[str]]]:
    """Merge the pair that was learnt first, until no known pair is left.

    Yields (None, the symbols given), then for each merge its rank (0 is the first learnt) and the symbols
    after it.
    """
    yield None, symbols
    while known := [pair for pair in pairwise(symbols) if pair in ranks]:
        pair = min(known, key=ranks.get)
        symbols = merge(symbols, pair)
        yield ranks[pair], symbols


def learn_merges(words: Counter) -> Iterator[Pair]:
    """The merges: again and again the pair of neighbours that occurs most often, while there are any.

    words: how often each word occurs; a pair counts once for each occurrence of its word. Of pairs that
    occur equally often, the one that comes first in the order of code points is taken, so that the same
    texts give the same vocabulary everywhere. No two merges make the same symbol: equal letters are always
    merged in the same order, whatever stands around them.
    """
    spelled = [to_symbols(word) for word in words]
    weights = list(words.values())
    counts, places = Counter(), defaultdict(set)        # of each pair: how often, and in which words
    for i, symbols in enumerate(spelled):
        for pair in pairwise(symbols):
            counts[pair] += weights[i]
            places[pair].add(i)

    while counts:
        most = max(counts.values())
        best = min(pair for pair, count in counts.items() if count == most)
        yield best
        for i in places.pop(best):                      # only words with the pair change
            after = merge(spelled[i], best)
            for pair in pairwise(spelled[i]):
                counts[pair] -= weights[i]
                if not counts[pair]:
                    del counts[pair]
            for pair in pairwise(after):
                counts[pair] += weights[i]
                places[pair].add(i)
            spelled[i] = after


def build_vocabulary(merges: Iterable[Pair]) -> dict[str, int]:
    """Id of each symbol in CLIP's order: 256 bytes, 256 bytes at a word's end, merges, start and end."""
    symbols = list(SYMBOL_OF.values())
    symbols += [symbol + WORD_END for symbol in symbols]
    symbols += [left + right for left, right in merges]
    return {symbol: i for i, symbol in enumerate([*symbols, START, END])}


def check_vocabulary(vocab: dict[str, int], merges: list[Pair]) -> None:
    """Raise ValueError unless any text has ids and each symbol can be reached."""
    ids = [i for i in vocab.values() if isinstance(i, int)]
    if len(ids) < len(vocab) or sorted(ids) != list(range(len(vocab))):
        raise ValueError(f"the ids of its {len(vocab)} symbols are not 0 to {len(vocab) - 1}, each once")
    basic = set(build_vocabulary([]))
    if missing := basic - set(vocab):
        raise ValueError(f"{len(missing)} of the bytes, start and end are not in the vocabulary, "
                         f"{min(missing)!r} for one")
    made = {left + right for left, right in merges}
    if unknown := {symbol for pair in merges for symbol in pair if symbol not in vocab} | (made - set(vocab)):
        raise ValueError(f"the merges use {len(unknown)} symbols without an id, {min(unknown)!r} for one")
    if orphans := set(vocab) - basic - made:
        raise ValueError(f"no merge makes {len(orphans)} of the symbols, {min(orphans)!r} for one, "
                         "so the list of merges is not complete")


# ---------------------------------------------------------------------------- the tokenizer

class EncodingSteps(NamedTuple):
    """What happened to one word: its `merge_steps`, none for a word that is kept whole, and its ids."""

    word: str
    steps: list[tuple[int | None, list[str]]]
    ids: list[int]

    def __str__(self) -> str:
        rows = [(" ".join(symbols), "bytes" if rank is None else f"merge {rank}")
                for rank, symbols in self.steps]
        width = max((len(symbols) for symbols, _ in rows), default=0)
        head = f"{self.word}  ->  {' '.join(map(str, self.ids))}"
        return "\n".join([head, *(f"    {symbols:{width}}   {note}" for symbols, note in rows)])


def _room(length: int) -> int:
    if length < 2:
        raise ValueError(f"A row of {length} tokens has no room for start and end: ask for 2 or more.")
    return length - 2


class Tokenizer:
    """Text to token ids and back.

    merges: pairs of symbols in the order they were learnt. vocab: id of each symbol, by default CLIP's
    order (see `vocabulary`).
    pad_with_end: fill a row up with the end token (SD 1.x) or with id 0 (SD 2.x).
    """

    def __init__(self, merges: Iterable[Pair], vocab: dict[str, int] | None = None,
                 pad_with_end: bool = True):
        self.merges = [tuple(pair) for pair in merges]
        self.vocab = build_vocabulary(self.merges) if vocab is None else dict(vocab)
        self.pad_with_end = pad_with_end
        check_vocabulary(self.vocab, self.merges)
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.symbols = sorted(self.vocab, key=self.vocab.get)      # symbol of each id
        self.start, self.end = self.vocab[START], self.vocab[END]
        self.added: dict[str, list[int]] = {}          # words added later, and the ids each stands for
        self._ids = {START: [self.start], END: [self.end]}         # of words seen before

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pad_with_end: bool = True) -> "Tokenizer":
        """Learn the merges from texts. Fewer than `vocab_size` ids if the texts run out of pairs."""
        if isinstance(texts, str):
            raise TypeError("Tokenizer.train takes many texts: give a list of strings, not one string.")
        free = vocab_size - len(build_vocabulary([]))
        if free < 0:
            raise ValueError(f"A vocabulary of {vocab_size} is too small: bytes, start and end alone "
                             "take 514 ids, so ask for 514 or more.")
        words = Counter()
        for text, times in Counter(texts).items():
            for word in split(clean(text)):
                words[word] += times
        return cls(islice(learn_merges(words), free), pad_with_end=pad_with_end)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: the rows that the token embedding needs."""
        return len(self.symbols)

    @property
    def pad(self) -> int:
        """The id that fills up a row."""
        return self.end if self.pad_with_end else 0

    def split_words(self, text: str) -> list[str]:
        """The words of a text, cleaned; added tokens and written-out start and end tokens stay whole."""
        if not isinstance(text, str):
            raise TypeError(f"A text must be a string, not {type(text).__name__}.")
        if lone := re.search("[\ud800-\udfff]", text):
            raise ValueError(f"The text is not valid Unicode: character {lone.start()} is half a surrogate "
                             "pair, so remove it or decode the text again.")
        words = []
        for part in SPECIAL.split(text):
            words += [part] if part in (START, END) else self._plain_words(clean(part))
        return words

    def _plain_words(self, text: str) -> list[str]:
        if not self.added:
            return split(text)
        longest_first = sorted(self.added, key=len, reverse=True)
        pattern = f"({'|'.join(map(re.escape, longest_first))})"
        words = []
        for part in re.split(pattern, text):
            words += [part] if part in self.added else split(part)
        return words

    def _is_whole(self, word: str) -> bool:
        return word in (START, END) or word in self.added

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start and end. Raises ValueError for half a surrogate pair."""
        return [i for word in self.split_words(text) for i in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        if word not in self._ids:
            *_, (_, symbols) = merge_steps(to_symbols(word), self.ranks)
            self._ids[word] = [self.vocab[symbol] for symbol in symbols]
        return self._ids[word]

    def __call__(self, texts: str | list[str], length: int = LENGTH) -> Tensor:
        """Rows of ids for the text encoder: start, the text, end, padding.

        Returns (B, length) of int64, B the number of texts (1 for a string). A longer text is cut so that
        start and end stay; `get_truncated_text` returns what is lost.
        """
        room, rows = _room(length), []
        for text in [texts] if isinstance(texts, str) else texts:
            row = [self.start, *self.encode(text)[:room], self.end]
            rows.append(row + [self.pad] * (length - len(row)))
        return torch.tensor(rows, dtype=torch.long).reshape(-1, length)

    def get_truncated_text(self, text: str, length: int = LENGTH) -> str:
        """The part of a text that a row of `length` tokens does not hold, cleaned; "" if all of it fits."""
        return self._text(self.encode(text)[_room(length):])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of one row of ids: what stands between start and the first end.

        Words come back in lower case and one space apart ("cat's hat!" as "cat 's hat !"). Bytes that are
        not UTF-8, as in half a character, become U+FFFD. Raises ValueError for an id that is not there.
        """
        try:
            ids = [int(i) for i in ids]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError("decode takes one row of ids: decode a batch row by row.") from error
        ids = ids[1:] if ids[:1] == [self.start] else ids
        return self._text(ids[:ids.index(self.end)] if self.end in ids else ids)

    def _text(self, ids: list[int]) -> str:
        text = b""
        for symbol in self.convert_ids_to_tokens(ids):
            if self._is_whole(symbol):
                text += symbol.encode("utf-8") + b" "
            else:
                text += bytes(BYTE_OF[char] for char in symbol.removesuffix(WORD_END))
                text += b" " if symbol.endswith(WORD_END) else b""
        return text.decode("utf-8", errors="replace").strip(" ")

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's symbol for each id, such as "cat</w>"."""
        symbols = []
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"There is no token with id {i}: ids go from 0 to {self.vocab_size - 1}.")
            symbols.append(self.symbols[i])
        return symbols

    def show_work(self, text: str) -> list[EncodingSteps]:
        """`encode`, merge by merge: prints what happens to each word and returns it."""
        works = []
        for word in self.split_words(text):
            steps = [] if self._is_whole(word) else list(merge_steps(to_symbols(word), self.ranks))
            works.append(EncodingSteps(word, steps, list(self._encode_word(word))))
            print(works[-1])
        return works

    def add_token(self, word: str, n: int = 1) -> list[int]:
        """Give a new word n ids of its own, the next free ones, and return them (textual inversion).

        The word stands for all n ids in a text; "<toy>_1", "<toy>_2" … for its second, third, as diffusers
        names them. It is found wherever it is written, in either case and inside other words too: choose
        one that nothing else contains, such as "<toy>". The text encoder's embedding needs n more rows.
        """
        key = clean(word)
        if n < 1:
            raise ValueError(f"A token needs at least one id, not {n}.")
        if not key or " " in key or SPECIAL.search(key):
            raise ValueError(f"{word!r} cannot be a token: use one word without spaces, such as '<toy>'.")
        names = [key, *(f"{key}_{i}" for i in range(1, n))]
        if taken := [name for name in names if name in self.added or name in self.vocab]:
            raise ValueError(f"The tokenizer has {taken[0]!r} already: choose another word, such as '<toy>'.")
        ids = list(range(self.vocab_size, self.vocab_size + n))
        self.symbols += names
        self.added |= {name: [i] for name, i in zip(names, ids, strict=True)} | {key: ids}
        self._ids |= {name: self.added[name] for name in names}
        return list(ids)
