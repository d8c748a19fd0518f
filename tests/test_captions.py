"""Captions by the grammar: each is read back by a small parser and compared with its scene."""

import json
import random
import re
import tomllib
from collections import Counter
from dataclasses import replace

import pytest

from sdlearn.data import BACKGROUNDS, COLOURS, OBJECTS, draw_scene, draw_scenes, grammar, held_out, vocabulary
from sdlearn.data.captions import CAPTION_LABELS, caption_and_hard_negative, label_caption, write_caption
from sdlearn.data.description import describe
from sdlearn.data.grammar import MOODS, SYNONYMS, write_varied_caption
from sdlearn.data.world import COMPOSITIONS, CORE, RICH, RICH_FULL, WORLDS
from sdlearn.training.card import known_words

TINTS, GROUNDS = "|".join(COLOURS), "|".join([*BACKGROUNDS, "gray"])
GROUND_PHRASES = [      # each holds the background's colour once
    rf"\b(?:on|against|with|in front of|it has) an? (?:plain |solid )?({GROUNDS}) (?:background|backdrop)",
    rf"\b(?:on )?a background that is ({GROUNDS})\b", rf"\bwith ({GROUNDS}) in the background",
    rf"\bthe background (?:is|should be) ({GROUNDS})\b", rf"\b(?:background|everything on) ({GROUNDS})\b",
    rf"(?:\ban? )?\b({GROUNDS}) background\b",
    rf"\b(?:on|against) ({GROUNDS})\b(?=,|\.|;|!|\?|$| look like| for | in a )",
]
NOUNS = {noun: (name, several) for name in OBJECTS for several in (False, True)
         for noun in (OBJECTS[name].noun(1 + several), *(some[several] for some in SYNONYMS.get(name, ())))}
NOUN = "|".join(map(re.escape, sorted(NOUNS, key=len, reverse=True)))
SIZE_OF = {"small": "small", "little": "small", "tiny": "small", "large": "large", "big": "large", "huge": "large"}
SIZES, NUMERALS = "|".join(SIZE_OF), {"two": 2, "2": 2, "pair": 2, "couple": 2, "three": 3, "3": 3, "trio": 3}
OPINIONS = "|".join(grammar.OPINIONS)
OBJECT = re.compile(rf"""\b(?:(?P<number>two|three|2|3|pair|couple|trio)\ (?:of\ )?)?(?:(?:{OPINIONS})\ )?
    (?:(?P<size>{SIZES})\ )?(?:(?P<tint>{TINTS})(?:-colou?red)?\ )?(?P<noun>{NOUN})\b
    (?:\ (?:that|which)\ (?:is|are)(?:\ (?P<size_after>{SIZES})\b)?(?:\ and\b(?=\ (?:{TINTS})\b))?
     |\ in|\ colou?red|,|\ \()?
    (?:\ ?(?P<tint_after>{TINTS})\b(?!(?:-colou?red)?\ (?:{NOUN})\b))?""", re.VERBOSE)
DIRECTION = {"left": "left", "right": "right", "above": "above", "over": "above", "at the top": "above",
             "below": "below", "under": "below", "beneath": "below", "underneath": "below", "at the bottom": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
WORD = re.compile(rf"\b({'|'.join(DIRECTION)})\b")


def read_back(caption: str):
    """The background's colour or None, the objects as (name, count, tint, size), and the relation of the first one
    to the second or None, all that a caption says."""
    text, ground = caption.lower(), None
    for phrase in GROUND_PHRASES:
        if found := re.search(phrase, text):
            assert ground is None, f"the background is said twice: {caption}"
            ground = found[1].replace("gray", "grey")
            text = text.replace(found[0], "", 1)
    found = list(OBJECT.finditer(text))
    objects = []
    for match in found:
        name, several = NOUNS[match["noun"]]
        count = NUMERALS.get(match["number"], 1)
        assert (count > 1) == several or OBJECTS[name].noun(2) == name, caption
        assert not (match["tint"] and match["tint_after"]), caption
        objects.append((name, count, match["tint"] or match["tint_after"],
                        SIZE_OF.get(match["size"] or match["size_after"])))
    rest = OBJECT.sub("", text)
    assert not re.search(rf"\b({TINTS}|{GROUNDS}|{SIZES})\b", rest), f"a word of no object: {caption} | {rest}"
    return ground, objects, relation_of(text.replace("one above the other", "side by side"), found)


def relation_of(text, found):
    words = list(WORD.finditer(text))
    if not words or len(found) != 2:
        assert not words
        return None
    said = DIRECTION[words[0][0]]
    if len(words) == 2:                                         # "a cat on the left and a dog on the right"
        assert DIRECTION[words[1][0]] == OPPOSITE[said]
        return said
    if re.search(r"\b(its|it)\b", text):                        # "a dog with a cat to its left"
        return OPPOSITE[said]
    at = words[0].start()
    if at < found[0].start():                                   # "to the left of a dog is a cat"
        return OPPOSITE[said]
    assert found[0].end() <= at < found[1].start(), text        # "a cat to the left of a dog"
    return said


def free_captions(world, count, start=0, split="train"):
    for one in draw_scenes(start, count, split, world):
        yield one, write_varied_caption(describe(one), random.Random(one.seed))


@pytest.mark.parametrize("world", [RICH, RICH_FULL])
def test_captions_by_the_grammar_are_true_and_leave_out_no_tint_or_count(world):
    relations = Counter()
    for one, caption in free_captions(world, 4000):
        ground, objects, relation = read_back(caption)
        assert ground in (None, one.background), caption
        groups = {group.name: group for group in one.groups}
        assert len(objects) == len(groups) and {name for name, *_ in objects} == set(groups), caption
        for name, count, tint, size in objects:
            assert (count, tint) == (groups[name].count, groups[name].colour), caption
            assert size in (None, groups[name].size), caption
        if relation:
            first, second = (next(placed for placed in one.objects if placed.name == name) for name, *_ in objects)
            axis = 0 if relation in ("left", "right") else 1
            assert (first.centre[axis] < second.centre[axis]) == (relation in ("left", "above")), caption
            assert abs(first.centre[axis] - second.centre[axis]) > abs(first.centre[1 - axis] - second.centre[1 - axis])
        if re.search("side by side|next to|beside", caption.lower()):
            assert one.relation in ("left", "right"), caption
        if re.search("one above the other", caption.lower()):
            assert one.relation in ("above", "below"), caption
        relations[relation] += 1
    assert min(relations[relation] for relation in OPPOSITE) > 100 and relations[None] > 1000


def test_each_half_is_named_only_where_an_object_lies_in_it():
    seen = 0
    for one, caption in free_captions(RICH, 4000):
        if found := re.search(r"(on the left|at the top)\b(?! of)(?!.*\b(of|its|it)\b)", caption.lower()):
            axis = 0 if "left" in found[0] else 1
            centres = sorted(placed.centre[axis] for placed in one.objects)
            assert centres[0] < one.side / 2 < centres[1], caption
            seen += 1
    assert seen > 30


def shape(caption: str) -> str:
    """A caption with its nouns, colours, sizes, numbers and opinions taken out of account, and its capitals."""
    text = re.sub(rf"\b(?:{OPINIONS}|{SIZES}) (?!and )", "", caption.lower())
    text = re.sub(rf"\b({GROUNDS}|{TINTS})\b", "C", re.sub(rf"\b({NOUN})\b", "N", text))
    return re.sub(r"\ban\b", "a", re.sub(r"\b(two|three|2|3)\b", "K", text))


def test_there_are_hundreds_of_shapes():
    shapes = Counter(shape(caption) for one, caption in free_captions(RICH, 6000) if len(one.objects) == 1)
    assert len(shapes) > 300, "of a single object alone"
    every = Counter(shape(caption) for _, caption in free_captions(RICH, 6000))
    assert len(every) > 2000 and every.most_common(1)[0][1] < 0.02 * 6000


@pytest.mark.parametrize("phrase", [
    "that (is|are) (red|blue|green)", "which (is|are)", r" in (red|blue|green)\b", "coloured", "colored", r"^the ",
    r"^one ", "a single", "^(cat|dog|apple|book|star|tree|car)", "next to", "beside", "side by side",
    "one above the other", " & ", "both", "together with", "along with", "as well as", "plus", "a pair of",
    "a couple of", "a trio of", "2 ", "3 ", "exactly two", "on (white|grey|yellow|pink)",
    "^(white|grey|yellow|pink) background", "the background is", "^(draw|please draw|paint)", "show me", "^i want",
    "i would like", r"\?$", "^can you draw", "^what would .* look like", "^there (is|are)", "^to the left of",
    " is above ", "to its left", "with .* above it", "kitten|puppy|automobile", "little", "tiny", "huge", "big",
    "lovely", "beautiful", "sketch", "illustration", "gray", r"\.$", "!$"])
def test_wordings_of_all_kinds_come(phrase):
    assert any(re.search(phrase, caption.lower()) for caption in FREE)


FREE = [caption for _, caption in free_captions(RICH, 3000)]


def test_english_of_captions_by_the_grammar():
    for caption in FREE:
        text = caption.lower()
        assert not re.search(r"  |^ | $|\s[,.;?!]|[,.;?!]{2}|\{|\}|,$", caption), caption
        assert not re.search(r"\ba [aeiou]|\ban (?![aeiou])", text), caption
        assert not re.search(r"\bthere is (two|three|2|3|a (pair|couple|trio))\b", text), caption
        assert not re.search(r"\bthere are (an? (?!pair|couple|trio|group|set)|one )", text), caption
        assert not re.search(r"\bboth (two|three|2|3|a (pair|couple|trio)|exactly)", text), caption
        assert not re.search(r"\b(\w+) \1\b", text), f"a word twice: {caption}"
    assert any(caption.isupper() for caption in FREE) and any(caption.istitle() for caption in FREE)
    assert 0.15 < sum(caption[0].isupper() for caption in FREE) / len(FREE) < 0.75


def test_harmless_words_are_no_words_of_the_world():
    """What a caption adds around its objects names no object, colour, size or direction."""
    harmless = {word for mood in MOODS for text in (*mood.frames, *mood.tails, *mood.ends)
                for word in re.findall(r"[a-z]+", re.sub(r"\{[^}]*\}", "", text.lower()))}
    nouns = {word for noun in NOUNS for word in noun.split()} - {"of"}
    assert not harmless & (nouns | {*COLOURS, *BACKGROUNDS} | {*SIZE_OF} | {"left", "right", "top", *DIRECTION})


@pytest.mark.parametrize("name", ["rich", "rich-full"])
def test_four_in_ten_captions_are_in_the_simple_wording(name):
    """They have its words and no others; the rest uses the whole vocabulary of the grammar, and no word beyond it."""
    world = WORLDS[name]
    plain, known = vocabulary(world.objects), vocabulary(world.objects, grammar=True)
    captions = [one.caption for one in draw_scenes(0, 12_000, world=world)]
    words = [set(re.findall(r"[a-z0-9]+", caption.lower())) for caption in captions]
    rare = {noun.split()[0] for name in world.objects for _, noun in SYNONYMS.get(name, ())}     # of a count
    assert known - rare <= set().union(*words) <= known
    simple = r"(an? (picture|drawing|image) of )?(an? |two |three |2 |3 )[a-z ,0-9]+( an? \w+ background)?"
    share = sum(some <= plain and re.fullmatch(simple, caption) is not None
                for some, caption in zip(words, captions, strict=True)) / len(captions)
    assert 0.38 < share < 0.5


def test_a_seed_gives_the_same_caption():
    captions = [draw_scene(seed, world=RICH).caption for seed in range(200)]
    assert captions == [draw_scene(seed, world=RICH).caption for seed in range(200)]
    assert len(set(captions)) > 190
    one = draw_scene(4, world=RICH)
    assert len({write_caption(one, random.Random(i), 1.0) for i in range(50)}) > 45
    assert write_caption(one, random.Random(3)) == write_caption(one, random.Random(3), 0.0)


def test_the_grammar_changes_no_image():
    for seed in range(30):
        plain, free = (draw_scene(seed, world=replace(RICH, grammar=share)) for share in (0.0, 1.0))
        assert plain.objects == free.objects and plain.background_rgb == free.background_rgb


def test_answers_follow_the_caption():
    """Kinds in the order in which they are named, and the relation of the first to the second."""
    counts = set()
    for one, caption in free_captions(RICH, 3000):
        relation, *rest = [answers[i] for answers, i in zip(CAPTION_LABELS, label_caption(caption, one), strict=True)]
        _, objects, said = read_back(caption)
        unused = [(None, None, None)] * (3 - len(objects))
        assert list(zip(rest[3:6], rest[:3], rest[6:], strict=True)) == [part[:3] for part in objects] + unused, caption
        assert relation == said, caption
        counts.add(tuple(filter(None, rest[:3])))
    assert counts == {(1,), (2,), (3,), (1, 1), *COMPOSITIONS}


@pytest.mark.parametrize("world", [RICH, RICH_FULL])
def test_hard_negatives_by_the_grammar_are_false_in_one_thing(world):
    changes = Counter()
    for one in draw_scenes(0, 2500, world=world):
        true, wrong = caption_and_hard_negative(one, random.Random(one.seed), 1.0)
        assert (true, wrong) == caption_and_hard_negative(one, random.Random(one.seed), 1.0)
        (ground, objects, relation), (other_ground, others, other_relation) = read_back(true), read_back(wrong)
        assert ground == other_ground and len(objects) == len(others)
        different = {what for what, pair in zip(("object", "count", "tint", "size"),
                                                zip(zip(*objects, strict=True), zip(*others, strict=True), strict=True),
                                                strict=True) if pair[0] != pair[1]}
        if relation != other_relation:
            different.add("relation")
            assert other_relation == OPPOSITE[relation]
        assert len(different) == 1 and different <= {"object", "count", "tint", "relation"}, (true, wrong)
        for what in different:
            place = ("object", "count", "tint", "relation").index(what)
            exchanged = what in ("count", "tint") and sum(
                a[place] != b[place] for a, b in zip(objects, others, strict=True)) > 1
            changes[what + " exchanged" * exchanged] += 1
    assert set(changes) == {"object", "count", "count exchanged", "tint", "tint exchanged", "relation"}
    assert min(changes.values()) > 25


# --- texts that are held out ------------------------------------------------------------------------

@pytest.fixture
def holds_out(tmp_path, monkeypatch):
    """Makes texts the held-out ones."""
    def hold_out(*texts):
        file = tmp_path / "texts.toml"
        file.write_text("".join(f"[[prompts]]\ntext = {json.dumps(text)}\n" for text in texts), encoding="utf-8")
        texts = held_out.held_out_texts(file)
        monkeypatch.setattr(held_out, "held_out_texts", lambda: texts)
        return texts
    yield hold_out


def test_held_out_texts_are_compared_without_capitals_and_punctuation(holds_out):
    texts = holds_out("What would a RED apple look like?", "I'd like 2 cats & a dog!")
    assert len(texts) == 2
    assert held_out.is_held_out_text("what would a red apple look like")
    assert held_out.is_held_out_text("  I’d like 2 cats & a dog. ")
    assert not held_out.is_held_out_text("what would a red apple look like to you")


def test_training_never_renders_a_held_out_text(holds_out):
    before = [draw_scene(seed, world=RICH).caption for seed in range(300)]
    pairs = [caption_and_hard_negative(draw_scene(seed, world=RICH), random.Random(seed), 0.6) for seed in range(100)]
    holds_out(*(caption.upper() + "!" for caption in before[:100]), *(text for pair in pairs[:50] for text in pair))
    after = [draw_scene(seed, world=RICH) for seed in range(300)]
    assert not any(held_out.is_held_out_text(one.caption) for one in after)
    assert sum(a == one.caption for a, one in zip(before[100:], after[100:], strict=True)) > 150
    apart = [caption_and_hard_negative(one, random.Random(one.seed), 0.6) for one in after[:100]]
    assert not any(held_out.is_held_out_text(text) for pair in apart for text in pair)
    assert sum(a == b for a, b in zip(pairs[50:], apart[50:], strict=True)) > 30


def test_without_a_file_no_text_is_held_out(tmp_path):
    assert held_out.held_out_texts(tmp_path / "none.toml") == frozenset()


def test_prompts_in_other_wordings_are_held_out():
    texts = [prompt["text"] for prompt in
             tomllib.loads(held_out.OTHER_WORDINGS_FILE.read_text(encoding="utf-8"))["prompts"]]
    assert len(texts) > 100 and all(map(held_out.is_held_out_text, texts))
    assert not any(held_out.is_held_out_text(one.caption) for one in draw_scenes(0, 5000, world=RICH))


def test_a_model_knows_the_words_of_the_captions_it_was_trained_on():
    """So the warning of unknown words fits the weights, whichever captions the package words by now."""
    plain, free = known_words(CORE, ["core", "hard"]), known_words(CORE, ["core", "hard", "rich"])
    assert plain == sorted(vocabulary(CORE.objects)) and "kitten" not in plain and "beside" not in plain
    assert free == sorted(vocabulary(CORE.objects, grammar=True)) and {"kitten", "beside"} < set(free)
    assert known_words(CORE, ["another"]) == plain
