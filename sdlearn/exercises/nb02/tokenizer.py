"""Exercises of notebook 02: byte-pair encoding: merging, learning merges, encoding a word."""

from collections import Counter
from itertools import islice, pairwise

from ...tokenizer import WORD_END, build_vocabulary, learn_merges, merge, merge_steps, to_symbols
from ..testing import require
from . import lesson


def spelled(symbols) -> str:
    """Symbols as one string, for a message. Raises Wrong unless they are a list of strings."""
    require(isinstance(symbols, list) and all(isinstance(one, str) for one in symbols),
            f"It gives {symbols!r} where it must give a list of strings")
    return " ".join(symbols)


# --- 2.1 ----------------------------------------------------------------------------------------------

joined = lesson.exercise(
    1, merge, grade="guided", minutes=4,
    asks="Write `merge(symbols, pair)`: a new list in which every occurrence of the pair is joined, from left "
         "to right.",
    hints=["Walk along the list with an index: where the pair begins, take two symbols, elsewhere one.",
           "At the last symbol there is no next one: `symbols[i + 1:i + 2]` is then empty, and raises nothing.",
           "A `while` loop, since the index advances by 2 or by 1."])


@joined.test("shape")
def a_list_of_strings(merge):
    merge.agrees(lambda answer: spelled(answer(["c", "a", "t</w>"], ("x", "y"))), what="Without the pair, the result")


@joined.test("value")
def one_pair(merge):
    merge.agrees(lambda answer: spelled(answer(["c", "a", "t</w>"], ("a", "t</w>"))), what="The result")


@joined.test("value")
def every_occurrence(merge):
    merge.agrees(lambda answer: spelled(answer(list("banana"), ("a", "n"))), what="Of b a n a n a, with (a, n), it")


@joined.test("edge case")
def overlapping_and_single(merge):
    merge.agrees(lambda answer: spelled(answer([*"aaa", "a</w>"], ("a", "a"))), what="Of a a a a</w> it")
    merge.agrees(lambda answer: spelled(answer(["a</w>"], ("a", "n"))), what="Of a single symbol it")


@joined.test("edge case")
def symbols_not_letters(merge):
    merge.agrees(lambda answer: spelled(answer(["ca", "n", "a", "n"], ("a", "n"))),
                 what="Of ca n a n, with (a, n), it")


@joined.mistake("only the first occurrence is joined")
def first_only(symbols, pair):
    for i, two in enumerate(pairwise(symbols)):
        if two == pair:
            return [*symbols[:i], "".join(pair), *symbols[i + 2:]]
    return symbols


@joined.mistake("the second symbol of a joined pair is still there: advance by two")
def second_kept(symbols, pair):
    return ["".join(pair) if two == pair else two[0] for two in pairwise([*symbols, ""])]


@joined.mistake("the last symbol is lost: the loop ends one too early")
def last_lost(symbols, pair):
    merged, i = [], 0
    while i < len(symbols) - 1:
        found = (symbols[i], symbols[i + 1]) == pair
        merged.append("".join(pair) if found else symbols[i])
        i += 2 if found else 1
    return merged


@joined.mistake("the index runs past the end where the last symbol has no next one")
def past_the_end(symbols, pair):
    merged, i = [], 0
    while i < len(symbols):
        found = symbols[i] == pair[0] and symbols[i + 1] == pair[1]
        merged.append("".join(pair) if found else symbols[i])
        i += 2 if found else 1
    return merged


@joined.mistake("no pair is found: a slice of a list is a list, and a list never equals a tuple")
def never_equal(symbols, pair):
    return symbols


@joined.mistake("the text is searched, not the symbols: `ca n` is not the pair (a, n)")
def by_replacing(symbols, pair):
    return " ".join(symbols).replace(" ".join(pair), "".join(pair)).split()


@joined.mistake("it is joined from the right: of three in a row, the first two belong together")
def from_the_right(symbols, pair):
    merged = merge(symbols[::-1], pair[::-1])
    return ["".join(pair) if one == "".join(pair[::-1]) else one for one in merged][::-1]


# --- 2.2 ----------------------------------------------------------------------------------------------

learn = lesson.exercise(
    2, learn_merges, grade="on your own", minutes=12,
    asks="Write the generator `learn_merges(words)`, words a dictionary of how often each word occurs: yield the pair "
         "of neighbours that occurs most often, merge it everywhere, and so on. Of equals, the smallest pair.",
    beyond="The package's recounts only the words that a merge changed: that makes tens of thousands of merges "
           "affordable.",
    hints=["Spell each word with `to_symbols`, once, and keep how often it occurs.",
           "In a loop: a `Counter` of pairs, to which each `pairwise(symbols)` of a word adds the word's number.",
           "Most often first, then the smallest pair: `min(counts, key=lambda pair: (-counts[pair], pair))`.",
           "`yield` the pair, then `merge` it in every word, and count again. No pair left: `return`."])

WORDS = {"cat": 5, "car": 4, "tar": 6, "at": 1}
TIES = {"qx": 3, "zq": 3, "ab": 3}
OFTEN = {"xy": 9, "pq": 6, "pqr": 5, "uva": 1, "uvb": 1, "uvc": 1}


def first_merges(answer, words: dict, count: int) -> list[str]:
    return [" ".join(pair) for pair in islice(answer(words), count)]


@learn.test("shape")
def pairs_one_by_one(learn_merges):
    found = list(islice(learn_merges(WORDS), 2))
    require(all(isinstance(pair, tuple) and len(pair) == 2 for pair in found),
            f"It gives {found} where it must yield pairs, each a tuple of two symbols")


@learn.test("value")
def the_first(learn_merges):
    learn_merges.agrees(lambda answer: first_merges(answer, OFTEN, 1), what="The list of the first merge")


@learn.test("value")
def one_builds_on_the_other(learn_merges):
    learn_merges.agrees(lambda answer: first_merges(answer, WORDS, 6), what="The list of 6 merges")


@learn.test("value")
def of_equals_the_smallest(learn_merges):
    learn_merges.agrees(lambda answer: first_merges(answer, TIES, 4), what="Where pairs occur equally often, the list")


@learn.test("edge case")
def twice_in_a_word(learn_merges):
    words = {"oxoxo": 3, "ab": 5}
    learn_merges.agrees(lambda answer: first_merges(answer, words, 2), what="Of oxoxo and ab, the list")


@learn.test("edge case")
def until_no_pair_is_left(learn_merges):
    words = {"a": 7, "ab": 2, "é": 1}
    learn_merges.agrees(lambda answer: first_merges(answer, words, 9), what="Of a, ab and é, the list")


def learner(count=None, spell=to_symbols, choose=None, again=True, join=merge):
    """A `learn_merges` with another way to count a word's pairs, to spell it, or to choose among the pairs."""
    count = count or (lambda symbols, times: Counter(list(pairwise(symbols)) * times))
    choose = choose or (lambda counts: min(counts, key=lambda pair: (-counts[pair], pair)))

    def learn_merges(words):
        texts = [(spell(word), times) for word, times in words.items()]
        counts = None
        while True:
            if again or counts is None:
                counts = Counter()
                for symbols, times in texts:
                    counts.update(count(symbols, times))
            if not counts:
                return
            best = choose(counts)
            yield best
            texts = [(join(symbols, best), times) for symbols, times in texts]
            if not again:
                del counts[best]
    return learn_merges


for diagnosis, answer in [
    ("every word counts once: a pair counts as often as its word occurs",
     learner(count=lambda symbols, times: Counter(pairwise(symbols)))),
    ("the pair is not merged in the words, so it is found again and again",
     learner(join=lambda symbols, pair: symbols)),
    ("the pairs are counted once, at the start: recount after each merge", learner(again=False)),
    ("of pairs that occur equally often this takes the one met first: take the smallest",
     learner(choose=lambda counts: max(counts, key=counts.get))),
    ("of pairs that occur equally often this takes the largest: take the smallest",
     learner(choose=lambda counts: max(counts, key=lambda pair: (counts[pair], pair)))),
    ("the end of a word is not marked: spell words with `to_symbols`", learner(spell=list)),
    ("a pair that occurs twice in a word counts twice",
     learner(count=lambda symbols, times: Counter(dict.fromkeys(pairwise(symbols), times)))),
    ("this is the pair that occurs least often",
     learner(choose=lambda counts: min(counts, key=lambda pair: (counts[pair], pair)))),
]:
    learn.mistake(diagnosis)(answer)


def until_error(choose):
    """It continues where no pair is left, and there `min` or `max` raises."""
    def endless(words):
        yield from learn_merges(words)
        yield choose(Counter())
    return endless


for chooser in (lambda counts: min(counts, key=counts.get), lambda counts: max(counts.values()),
                lambda counts: counts.most_common(1)[0]):
    learn.mistake("where no pair is left, it must end: the best of nothing raises an error")(until_error(chooser))


# --- 2.3 ----------------------------------------------------------------------------------------------

def encode_word(word: str, ranks: dict[tuple[str, str], int], vocab: dict[str, int]) -> list[int]:
    """Ids of a word: its symbols, merged in the order in which the merges were learnt."""
    *_, (_, symbols) = merge_steps(to_symbols(word), ranks)
    return [vocab[symbol] for symbol in symbols]


encode = lesson.exercise(
    3, encode_word, grade="supported", minutes=7, also=[merge_steps],
    asks="Write `encode_word(word, ranks, vocab)`: spell the word, merge the pair that was learnt first (lowest rank) "
         "until no known pair is left, and give the ids of what remains.",
    hints=["`symbols = to_symbols(word)`, then a loop: which pairs of `pairwise(symbols)` are in `ranks`?",
           "Of those, the one of the lowest rank: `min(known, key=ranks.get)`. Join it with `merge`.",
           "No known pair left: `[vocab[symbol] for symbol in symbols]`."])

CORPUS = {"cat": 5, "car": 4, "tar": 6, "art": 7, "at": 1, "cart": 3, "scat": 2, "é": 2, "café": 2}
MERGES = list(learn_merges(CORPUS))
RANKS, VOCAB = {pair: rank for rank, pair in enumerate(MERGES)}, build_vocabulary(MERGES)
REACH = [("b", "c</w>"), ("a", "b"), ("a", "bc</w>")]      # "abc" is one symbol, but not by way of "ab"
CHAIN = [("b", "c"), ("a", "b"), ("c", "d</w>")]            # of "abcd", what is learnt first spoils the longer pieces


@encode.test("shape")
def a_list_of_ids(encode_word):
    def ids_of(answer):
        ids = answer("cat", RANKS, VOCAB)
        require(isinstance(ids, list) and all(isinstance(one, int) for one in ids),
                f"It gives {ids!r} where it must give a list of ids, whole numbers")
        return 0
    encode_word.agrees(ids_of)


@encode.test("value")
def words_of_the_corpus(encode_word):
    for word in ("cat", "art", "scat"):
        encode_word.agrees(lambda answer, word=word: answer(word, RANKS, VOCAB), what=f"Of '{word}' the list of ids")


@encode.test("value")
def earlier_merges_come_first(encode_word):
    for word, merges in (("abc", REACH), ("abcd", CHAIN)):
        given = word, {pair: rank for rank, pair in enumerate(merges)}, build_vocabulary(merges)
        encode_word.agrees(lambda answer, given=given: answer(*given), what=f"Of '{word}' the list of ids")


@encode.test("edge case")
def an_unknown_word(encode_word):
    for word in ("tractor", "x", "cafés"):
        encode_word.agrees(lambda answer, word=word: answer(word, RANKS, VOCAB), what=f"Of '{word}' the list of ids")


def encoder(choose=None, spell=to_symbols, once=False):
    """An `encode_word` that chooses another of the known pairs, or spells otherwise, or merges only once."""
    def encode_word(word, ranks, vocab):
        symbols = spell(word)
        while known := [pair for pair in pairwise(symbols) if pair in ranks]:
            symbols = merge(symbols, choose(known, ranks) if choose else min(known, key=ranks.get))
            if once:
                break
        return [vocab[symbol] for symbol in symbols]
    return encode_word


@encode.mistake("this takes the longest symbol each time, as WordPiece does: BPE goes by the order of its merges")
def longest_match(word, ranks, vocab):
    rest, ids = "".join(to_symbols(word)), []
    while rest:
        piece = max((symbol for symbol in vocab if rest.startswith(symbol)), key=len)
        ids.append(vocab[piece])
        rest = rest[len(piece):]
    return ids


@encode.mistake("where no known pair is left, the loop must end: `min` of nothing raises an error")
def without_end(word, ranks, vocab):
    return min([pair for pair in [] if pair in ranks], key=ranks.get)


@encode.mistake("not every pair was learnt, and one that was not has no rank: look only at those in `ranks`")
def every_pair_ranked(word, ranks, vocab):
    symbols = to_symbols(word)
    while len(symbols) > 1:
        symbols = merge(symbols, min(pairwise(symbols), key=lambda pair: ranks[pair]))
    return [vocab[symbol] for symbol in symbols]


@encode.mistake("pairs that were never learnt are merged too: stop where no known pair is left")
def all_merged(word, ranks, vocab):
    symbols = to_symbols(word)
    while len(symbols) > 1:
        symbols = merge(symbols, min(pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks))))
    return [vocab[symbol] for symbol in symbols]


for diagnosis, answer in [
    ("the leftmost known pair is merged: the one that was learnt first comes first",
     encoder(lambda known, ranks: known[0])),
    ("the pair that was learnt last is merged first", encoder(lambda known, ranks: max(known, key=ranks.get))),
    ("only one merge is made: go on until no known pair is left", encoder(once=True)),
    ("no merge is made: these are the bytes",
     lambda word, ranks, vocab: [vocab[symbol] for symbol in to_symbols(word)]),
    ("the end of the word is not marked: spell it with `to_symbols`",
     encoder(spell=lambda word: [one.removesuffix(WORD_END) for one in to_symbols(word)])),
    ("symbols are bytes, and a letter can have two of them: spell the word with `to_symbols`",
     encoder(spell=lambda word: [*word[:-1], word[-1] + WORD_END])),
]:
    encode.mistake(diagnosis)(answer)
