"""What a model is asked for: GenEval's six tasks in the world of the scenes, held-out combinations, other wordings.

Ghosh et al. 2023, "GenEval": each prompt asks for things that a detector can count, locate and colour, so an image
is right or wrong. The prompts are fixed: the same objects give the same prompts, on every machine. Those of the
first seven tasks are drawn at random and worded as captions are; those of the eighth are written by hand.
"""

import random
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..data import BACKGROUNDS, COLOURS, OBJECTS
from ..data.captions import BACKGROUND_PHRASES, NUMERALS, OPENINGS, RELATION_PHRASES, with_article
from ..data.held_out import OTHER_WORDINGS_FILE
from ..data.world import COUNTS, HELD_OUT_COLOURS, HELD_OUT_COUNTS, HELD_OUT_PAIRS, RELATIONS, is_held_out
from .detector import visible_colour

PER_TASK = 100          # prompts of each task
BACKGROUND_SHARE = 0.8       # share of prompts that ask for a background, as in captions
TRIES = 200             # draws of a prompt before two may be of one text


@dataclass(frozen=True)
class ObjectSpec:
    """One of the things asked for: so many of an object, in a colour or in any."""

    name: str
    count: int = 1
    colour: str | None = None


@dataclass(frozen=True)
class SceneSpec:
    """What an image has to show. The relation is of the first thing to the second."""

    objects: tuple[ObjectSpec, ...]
    relation: str | None = None
    background: str | None = None       # judged apart: no task depends on it

    @property
    def instances(self) -> tuple[tuple[str, str | None], ...]:
        """(name, colour) of every object, one entry for each of a count."""
        return tuple((thing.name, thing.colour) for thing in self.objects for _ in range(thing.count))

    @property
    def held_out(self) -> bool:
        """Whether no scene of training holds this combination."""
        names, colours = zip(*self.instances, strict=True)
        return is_held_out(names, colours)


@dataclass(frozen=True)
class Prompt:
    """A prompt, the task it belongs to, and what is wanted in a form that can be checked."""

    task: str
    text: str
    spec: SceneSpec
    kind: str | None = None             # of its wording, where that is not the captions'


class TooFewObjects(ValueError):
    """A task cannot be made of the objects that are there."""


def one_object(objects: Sequence[str], rng: random.Random) -> SceneSpec:
    return SceneSpec((ObjectSpec(rng.choice(objects)),))


def two_objects(objects: Sequence[str], rng: random.Random) -> SceneSpec:
    first, second = rng.sample(objects, 2)
    return SceneSpec((ObjectSpec(first), ObjectSpec(second)))


def counting(objects: Sequence[str], rng: random.Random) -> SceneSpec:
    return SceneSpec((ObjectSpec(rng.choice(objects), count=rng.choice(tuple(COUNTS))),))


def draw_coloured(name: str, rng: random.Random) -> ObjectSpec:
    """An object in a colour that is not its natural one: so the prompt has to be heard."""
    return ObjectSpec(name, colour=rng.choice([colour for colour in COLOURS if colour != visible_colour(name, None)]))


def colours(objects: Sequence[str], rng: random.Random) -> SceneSpec:
    return SceneSpec((draw_coloured(rng.choice(select_tintable(objects)), rng),))


def position(objects: Sequence[str], rng: random.Random) -> SceneSpec:
    first, second = rng.sample(objects, 2)
    return SceneSpec((ObjectSpec(first), ObjectSpec(second)), relation=rng.choice(RELATIONS))


def colour_binding(objects: Sequence[str], rng: random.Random) -> SceneSpec:
    first, second = (draw_coloured(name, rng) for name in rng.sample(select_tintable(objects), 2))
    while first.colour == second.colour:
        second = draw_coloured(second.name, rng)
    return SceneSpec((first, second))


def held_out(objects: Sequence[str], rng: random.Random) -> SceneSpec:
    """One of the colours, counts and pairs that training never shows."""
    kinds = [some for some in (
        [SceneSpec((ObjectSpec(name, colour=colour),)) for colour, name in sorted(HELD_OUT_COLOURS) if name in objects],
        [SceneSpec((ObjectSpec(name, count=count),)) for count, name in sorted(HELD_OUT_COUNTS) if name in objects],
        [SceneSpec((ObjectSpec(a), ObjectSpec(b))) for a, b in sorted(map(sorted, HELD_OUT_PAIRS))
         if {a, b} <= set(objects)],
    ) if some]
    return rng.choice(rng.choice(kinds))


def select_tintable(objects: Sequence[str]) -> list[str]:
    return [name for name in objects if OBJECTS[name].tintable]


GENEVAL: dict[str, Callable[[Sequence[str], random.Random], SceneSpec]] = {
    "one object": one_object, "two objects": two_objects, "counting": counting, "colours": colours,
    "position": position, "colour binding": colour_binding,
}
HELD_OUT = "held out"
DRAWN = {**GENEVAL, HELD_OUT: held_out}
OTHER_WORDINGS, CAPTION_WORDING = "other wordings", "the same in captions' words"
TASKS = (*DRAWN, OTHER_WORDINGS)


def make_prompts(objects: Sequence[str], *, count: int = PER_TASK, seed: int = 0,
                tasks: Sequence[str] = TASKS) -> list[Prompt]:
    """`count` prompts of each task about these objects; a smaller count gives the first of a larger one.

    The six tasks ask for combinations that training may show, "held out" for those that it never does. Of "other
    wordings" there are as many as `load_other_wordings` gives, whatever the count and the seed. Raises ValueError for
    an object or a task that does not exist, TooFewObjects where a task cannot be made.
    """
    objects = sorted(set(objects))
    if strange := [name for name in objects if name not in OBJECTS]:
        raise ValueError(f"the judge does not know {', '.join(strange)}; its objects are {', '.join(OBJECTS)}")
    if strange := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"there is no task '{strange[0]}'; the tasks are {', '.join(TASKS)}")
    return [prompt for task in tasks for prompt in (
        load_other_wordings(objects)[:count] if task == OTHER_WORDINGS else _of_task(task, objects, count, seed))]


def load_other_wordings(objects: Sequence[str]) -> list[Prompt]:
    """The prompts of `data/other_wordings.toml` that ask for these objects alone; the kinds of wording take turns.

    Raises TooFewObjects where there is none.
    """
    prompts = [Prompt(OTHER_WORDINGS, one["text"], SceneSpec(tuple(ObjectSpec(**thing) for thing in one["objects"]),
                                                          one.get("relation"), one.get("background")), one["kind"])
               for one in tomllib.loads(OTHER_WORDINGS_FILE.read_text(encoding="utf-8"))["prompts"]]
    found = [prompt for prompt in prompts if {thing.name for thing in prompt.spec.objects} <= set(objects)]
    if not found:
        raise _too_few(OTHER_WORDINGS, objects)
    return found


def reword_as_captions(prompts: Sequence[Prompt]) -> list[Prompt]:
    """For each prompt in another wording one that asks for the same scene in the captions' words."""
    return [replace(prompt, task=CAPTION_WORDING,
                    text=write_prompt(prompt.spec, random.Random(f"sdlearn {prompt.text}")))
            for prompt in prompts if prompt.task == OTHER_WORDINGS]


def _of_task(task: str, objects: list[str], count: int, seed: int) -> list[Prompt]:
    rng = random.Random(f"sdlearn prompts {seed} {task}")
    made: list[Prompt] = []
    texts: set[str] = set()
    for _ in range(count):
        for _ in range(TRIES):                      # with very few objects, the last try may be a text that is there
            prompt = _drawn(task, objects, rng)
            if prompt.text not in texts:
                break
        made.append(prompt)
        texts.add(prompt.text)
    return made


def _drawn(task: str, objects: list[str], rng: random.Random) -> Prompt:
    wanted = _wanted(task, objects, rng)
    if rng.random() < BACKGROUND_SHARE:
        wanted = replace(wanted, background=rng.choice(tuple(BACKGROUNDS)))
    return Prompt(task, write_prompt(wanted, rng), wanted)


def _wanted(task: str, objects: list[str], rng: random.Random) -> SceneSpec:
    for _ in range(TRIES):
        try:
            wanted = DRAWN[task](objects, rng)
        except (ValueError, IndexError):            # a sample of more than there are, a choice from nothing
            break
        if wanted.held_out == (task == HELD_OUT):
            return wanted
    raise _too_few(task, objects)


def _too_few(task: str, objects: Sequence[str]) -> TooFewObjects:
    return TooFewObjects(f"the task '{task}' cannot be made of {len(objects)} objects ({', '.join(objects[:8])} ...); "
                         "give more of them, or leave the task out")


def write_prompt(wanted: SceneSpec, rng: random.Random) -> str:
    """A text that asks for it, in the words of captions."""
    things = [_phrase(thing, rng) for thing in wanted.objects]
    joint = f" {rng.choice(RELATION_PHRASES[wanted.relation])} " if wanted.relation else " and "
    phrase = joint.join(filter(None, (", ".join(things[:-1]), things[-1])))
    text = rng.choice(OPENINGS) + phrase
    if wanted.background:
        ground = rng.choice(BACKGROUND_PHRASES).replace("a {}", with_article(wanted.background))
        text = f"{text} {ground}"
    return text


def _phrase(thing: ObjectSpec, rng: random.Random) -> str:
    phrase = " ".join(filter(None, (thing.colour, OBJECTS[thing.name].noun(thing.count))))
    return with_article(phrase) if thing.count == 1 else f"{rng.choice(NUMERALS[thing.count])} {phrase}"
