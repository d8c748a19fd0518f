"""Prompts in other wordings: what the fixed set holds, the ratio to the captions' words, errors, and counts drawn."""

import math
import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sdlearn.data import CORE, FULL, OBJECTS, draw_scene
from sdlearn.data.captions import NUMERALS, OPENINGS, RELATION_PHRASES, write_caption
from sdlearn.data.world import BACKGROUNDS, COLOURS, HELD_OUT_COUNTS, RELATIONS
from sdlearn.evaluation import (
    Detection,
    Detections,
    JudgedImage,
    ObjectSpec,
    Prompt,
    SceneSpec,
    Verdict,
    compose_prompt_scene,
    judge_image,
    visible_colour,
)
from sdlearn.evaluation.command import FIGURES
from sdlearn.evaluation.judge import WEIGHTS
from sdlearn.evaluation.page import format_counts, format_wordings, save_evaluation
from sdlearn.evaluation.sampling import evaluate_scenes
from sdlearn.evaluation.scoring import clustered_error, compute_scores, count_confusion
from sdlearn.evaluation.tasks import (
    CAPTION_WORDING,
    OTHER_WORDINGS,
    load_other_wordings,
    make_prompts,
    reword_as_captions,
)
from sdlearn.evaluation.wordings import compare_wordings, ratio_of_means

shipped = pytest.mark.skipif(not (WEIGHTS / "model.safetensors").exists(), reason="no weights of the judge are there")
PROMPTS = load_other_wordings(CORE.objects)
KINDS = {"colour after the noun", "bare nouns", "the", "beside", "sentences", "capitals and plurals", "unknown words",
         "three parts"}


def tokens(text: str) -> tuple[str, ...]:
    """What of a text reaches the text encoder: words and marks, in lower case."""
    return tuple(re.findall(r"\w+|[^\w\s]", text.lower()))


# --- the set ----------------------------------------------------------------------------------------

def test_there_are_sixteen_prompts_of_each_kind_and_no_two_alike():
    assert len(PROMPTS) == len({tokens(prompt.text) for prompt in PROMPTS}) == 128
    assert Counter(prompt.kind for prompt in PROMPTS) == dict.fromkeys(KINDS, 16)
    assert {prompt.task for prompt in PROMPTS} == {OTHER_WORDINGS}


def test_the_first_prompts_have_as_many_of_each_kind():
    assert Counter(one.kind for one in make_prompts(CORE.objects, count=40, tasks=[OTHER_WORDINGS])) == dict.fromkeys(
        KINDS, 5)


def test_all_objects_are_asked_for_about_as_often():
    named = Counter(thing.name for prompt in PROMPTS for thing in prompt.spec.objects)
    assert named.keys() == set(CORE.objects) and 5 <= min(named.values()) and max(named.values()) <= 8


def test_what_is_asked_for_can_be_drawn_and_judged():
    for prompt in PROMPTS:
        wanted = prompt.spec
        assert wanted.relation in (None, *RELATIONS) and wanted.background in (None, *BACKGROUNDS), prompt.text
        assert len({thing.name for thing in wanted.objects}) == len(wanted.objects) and len(wanted.instances) <= 3
        for thing in wanted.objects:
            assert thing.count in (1, *NUMERALS)
            assert thing.colour is None or (thing.colour in COLOURS and OBJECTS[thing.name].tintable)
            assert thing.colour is None or thing.colour != visible_colour(thing.name, None), prompt.text
        drawn = compose_prompt_scene(prompt, seed=1)
        found = tuple(Detection(o.name, o.box, 0.9, visible_colour(o.name, o.colour)) for o in drawn.objects)
        found = Detections(found, drawn.background)
        assert judge_image(wanted, found).right, prompt.text
        assert not wanted.background or judge_image(wanted, found).background


def test_no_combination_is_held_out():
    for prompt in PROMPTS:
        assert not prompt.spec.held_out, prompt.text
        assert not {(thing.count, thing.name) for thing in prompt.spec.objects} & HELD_OUT_COUNTS, prompt.text


def test_the_texts_say_what_is_wanted():
    plurals = {"a pair": 2, "a couple": 2, "a trio": 3, "both": 2}
    for prompt in PROMPTS:
        text, wanted = prompt.text.lower(), prompt.spec
        for thing in wanted.objects:
            assert OBJECTS[thing.name].noun(thing.count) in text and (thing.colour or "") in text, prompt.text
            if thing.count > 1:
                said = {number for number, words in NUMERALS.items() for word in words if word in tokens(text)}
                said |= {number for phrase, number in plurals.items() if phrase in text}
                assert thing.count in said, prompt.text
        assert (wanted.background or "") in text
        named = {colour for colour in (*COLOURS, *BACKGROUNDS) if colour in tokens(text)}
        assert named <= {wanted.background, *(thing.colour for thing in wanted.objects)}, prompt.text


def test_side_by_side_asks_for_both_and_for_no_relation():
    for prompt in PROMPTS:
        if prompt.kind == "beside":
            assert prompt.spec.relation is None and len(prompt.spec.objects) == 2
        if re.search(r"\b(beside|next to|near|both)\b", prompt.text):
            assert prompt.spec.relation is None


def test_no_text_is_one_that_the_captions_have():
    """Neither those of random scenes, nor those of scenes of just what a prompt asks for."""
    texts = {tokens(prompt.text): prompt.text for prompt in PROMPTS}
    captions = {tokens(draw_scene(seed, world=world).caption) for world in (CORE, FULL) for seed in range(1000)}
    for prompt in PROMPTS:
        drawn = compose_prompt_scene(prompt, seed=0)
        captions |= {tokens(write_caption(drawn, random.Random(f"{prompt.text} {i}"))) for i in range(60)}
    assert len(captions) > 4000 and not [texts[found] for found in captions & texts.keys()]


def test_a_model_of_few_objects_is_asked_for_these_alone():
    few = load_other_wordings(["cat", "tree", "star"])
    assert 0 < len(few) < 10 and all({t.name for t in p.spec.objects} <= {"cat", "tree", "star"} for p in few)


# --- the same in the captions' words ----------------------------------------------------------------

def test_each_prompt_has_one_for_the_same_scene_in_the_words_of_captions():
    plain = reword_as_captions([*make_prompts(CORE.objects, count=2, tasks=["counting"]), *PROMPTS])
    assert [(one.spec, one.kind) for one in plain] == [(one.spec, one.kind) for one in PROMPTS]
    assert {one.task for one in plain} == {CAPTION_WORDING} and plain == reword_as_captions(PROMPTS)
    ways = "|".join(way for ways in RELATION_PHRASES.values() for way in ways)
    thing = r"(an?|two|three|2|3) [a-z ]+?"
    ground = r"(on|against|with) an? \w+ background"
    shape = rf"({'|'.join(set(OPENINGS))}){thing}(, {thing})?( (and|{ways}) {thing})?( {ground})?"
    for prompt in plain:
        assert re.fullmatch(shape, prompt.text), prompt.text
    [three] = [two.text for one, two in zip(PROMPTS, plain, strict=True) if one.text.startswith("three things")]
    assert three.endswith("a rocket, a smiling face and a hat")


def judged(prompt, right, background=None):
    return JudgedImage(prompt, 0, np.zeros((8, 8, 3), np.uint8),
                       Verdict(right, (), background, Detections((), "white")))


def test_wordings_are_compared_by_kind_and_as_a_whole():
    first, second = (Prompt(OTHER_WORDINGS, text, SceneSpec((ObjectSpec("cat"),)), kind)
                     for text, kind in (("cat", "bare nouns"), ("the cat", "the")))
    others = [judged(first, True, True), judged(first, False, False), judged(second, False), judged(second, False)]
    plain = [judged(replace(one.prompt, task=CAPTION_WORDING, text="a cat"), right, True if i < 2 else None)
             for i, (one, right) in enumerate(zip(others, (True, True, True, False), strict=True))]
    counting = judged(Prompt("counting", "two cats", SceneSpec((ObjectSpec("cat", 2),))), True)
    table = compare_wordings([counting, *others, *plain])
    assert list(table) == ["bare nouns", "the", "all"]
    assert [table[kind]["ratio"] for kind in table] == pytest.approx([0.5, 0.0, 1 / 3])
    assert [table[kind]["images"] for kind in table] == [2, 2, 4]
    assert table["bare nouns"]["background, other wording"] == 0.5 and table["the"]["background, other wording"] is None
    assert table["bare nouns"]["background, captions' words"] == 1 and table["bare nouns"]["captions' words"] == 1
    assert table["the"]["standard error of the ratio"] is None and table["all"]["standard error of the ratio"] > 0
    assert compare_wordings([counting]) == {}


def test_the_error_of_a_ratio_by_hand():
    """Means 2/4 and 3/4, ratio 2/3; a - 2/3 b adds up to 2/3 and -2/3: sqrt(2/1 * 8/9) / 4 = 1/3, over 3/4."""
    assert ratio_of_means([[(1, 1), (1, 1)], [(0, 1), (0, 0)]]) == pytest.approx((2 / 3, 4 / 9))
    assert ratio_of_means([[(1, 0)], [(0, 0)]]) == (None, None)
    assert ratio_of_means([[(1, 1)] * 5, [(0, 0)] * 5])[1] == 0, "in step, whatever the prompt"


@shipped
def test_the_judge_finds_what_the_prompts_ask_for_in_real_scenes():
    found = list(evaluate_scenes(PROMPTS[::2], seeds=1))
    assert sum(one.verdict.right for one in found) / len(found) > 0.9
    assert sum(one.verdict.background in (True, None) for one in found) / len(found) > 0.9


# --- standard errors --------------------------------------------------------------------------------

def test_a_clustered_error_by_hand():
    """Three prompts with two seeds: means 1, 1/2, 0; their deviation is 1/2, so the error of the mean 1/2 / sqrt(3)."""
    assert clustered_error([[1, 1], [1, 0], [0, 0]]) == pytest.approx(0.5 / math.sqrt(3))
    # Unequal groups: mean 3/5, sums of deviations 4/5, -1/5 and -3/5: sqrt(3/2 * 26/25) / 5.
    assert clustered_error([[1, 1], [1, 0], [0]]) == pytest.approx(math.sqrt(1.5 * 26 / 25) / 5)
    assert clustered_error([[1, 0]]) is None and clustered_error([[1], [1]]) == 0


def test_seeds_of_one_prompt_do_not_make_an_error_smaller():
    values = [1, 0, 0, 1, 1, 1, 0, 1]
    few, many = (clustered_error([[value] * seeds for value in values]) for seeds in (1, 50))
    assert many == pytest.approx(few) and few == pytest.approx(np.std(values, ddof=1) / math.sqrt(8))


def test_errors_of_tasks_are_clustered_by_the_text_of_the_prompt():
    none = Detections((), "white")
    right, wrong = Verdict(True, (), None, none), Verdict(False, ("0 cat",), None, none)
    prompts = [Prompt("one object", text, SceneSpec((ObjectSpec("cat"),))) for text in ("a", "b", "a", "b")]
    told = compute_scores(prompts, [right, wrong, right, wrong])
    assert told.errors["one object"] == pytest.approx(clustered_error([[1, 1], [0, 0]])) == 0.5
    assert told.overall_error is None and compute_scores(prompts[:1], [right]).errors["one object"] is None


# --- counts -----------------------------------------------------------------------------------------

def cats(count):
    return Detections(tuple(Detection("cat", (0, 0, 9, 9), 0.9, None) for _ in range(count)), "white")


def test_counts_that_are_asked_for_and_drawn():
    asked = [("one object", 1, 1), ("one object", 1, 2), ("counting", 2, 3), ("counting", 2, 3), ("counting", 3, 0),
             ("counting", 3, 7), ("colours", 1, 5)]
    prompts = [Prompt(task, "", SceneSpec((ObjectSpec("cat", n),))) for task, n, _ in asked]
    table = count_confusion(prompts, [judge_image(p.spec, cats(m)) for p, (*_, m) in zip(prompts, asked, strict=True)])
    assert table == {1: {1: 1, 2: 1}, 2: {3: 2}, 3: {0: 1, 7: 1}}
    page = format_counts({"columns": {"w = 3": {"overall": 0.5, "counts": {"2": {"1": 1, "3": 2, "5": 3, "9": 2}}},
                               "ceiling": {"counts": {"2": {"2": 8}}}}})
    assert "| two | w = 3, 8 images | 0.0 | 12.5 | 0.0 | 25.0 | 62.5 |" in page
    assert "| two | ceiling, 8 images | 0.0 | 0.0 | 100.0 | 0.0 | 0.0 |" in page
    assert format_counts({"columns": {"w = 3": {"overall": 0.5}, "ceiling": {}}}) == []


def test_the_page_has_a_row_for_each_kind_of_wording():
    one = {"images": 8, "other wording": 0.25, "captions' words": 0.5, "ratio": 0.5,
           "standard error of the ratio": 0.125, "background, other wording": None, "background, captions' words": 1.0}
    page = format_wordings({"columns": {"w = 3": {"overall": 0.5, "wordings": {"the": one}}}})
    assert "| the | 8 | 25.0 | 50.0 | 50.0 ± 12.5 | - | 100.0 |" in page
    assert format_wordings({"columns": {"ceiling": {}}}) == []


# --- keeping ----------------------------------------------------------------------------------------

def test_figures_of_few_prompts_are_not_kept(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (tmp_path / FIGURES).write_text('{"settings": {"prompts": 39}, "pictures": {}}')
    with pytest.raises(ValueError, match="39 prompts of each task are too few.*--prompts 40"):
        save_evaluation(tmp_path, tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["model_index.json"]
