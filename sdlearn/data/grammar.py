"""A grammar of captions as people write them: fragments, labels, requests, wishes, questions and statements.

The tables hold the wordings, and an entry that comes twice is twice as likely. A template's fields are filled by the
functions below the tables. Every choice takes exactly one number from the generator, whatever the description holds, so
two descriptions that differ in one thing are worded alike: hard negatives differ from true captions in that thing only.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .description import Description, Group, swap_groups, with_article
from .world import BACKGROUNDS, COLOURS, OBJECTS

# --- words for one object ---------------------------------------------------------------------------

SYNONYMS = {            # singular, plural; only where the art shows just that
    "cat": (("kitten", "kittens"), ("kitty", "kitties")), "dog": (("puppy", "puppies"), ("doggy", "doggies")),
    "rabbit": (("bunny", "bunnies"),), "turtle": (("tortoise", "tortoises"),), "cactus": (("cactus plant", "cacti"),),
    "donut": (("doughnut", "doughnuts"),), "burger": (("hamburger", "hamburgers"),),
    "pizza": (("slice of pizza", "slices of pizza"),), "mushroom": (("toadstool", "toadstools"),),
    "car": (("automobile", "automobiles"),), "bicycle": (("bike", "bikes"),),
    "airplane": (("plane", "planes"), ("aeroplane", "aeroplanes")), "rocket": (("space rocket", "space rockets"),),
    "train": (("locomotive", "locomotives"),), "boat": (("sailboat", "sailboats"),),
    "van": (("truck", "trucks"), ("lorry", "lorries")), "leaf": (("maple leaf", "maple leaves"),),
    "ball": (("soccer ball", "soccer balls"), ("football", "footballs")), "hat": (("top hat", "top hats"),),
    "lamp": (("light bulb", "light bulbs"),), "gift": (("present", "presents"),),
    "smiling face": (("smiley", "smileys"), ("happy face", "happy faces")),
    "sad face": (("crying face", "crying faces"),), "moon": (("crescent moon", "crescent moons"),),
}
SYNONYM_SHARE = 0.15
SIZE_SHARE = 0.4
SIZE_WORDS = ({"small": "small", "large": "large"}, {"small": "small", "large": "big"},
              {"small": "little", "large": "big"}, {"small": "tiny", "large": "huge"})
# Harmless in front of any noun: so that a word which says nothing about the image changes nothing in it.
OPINIONS = ("nice", "lovely", "beautiful", "wonderful", "charming", "great", "perfect", "simple", "adorable", "amazing",
            "awesome", "brilliant", "classic", "cool", "cute", "decent", "delightful", "elegant", "fabulous", "famous",
            "fancy", "fantastic", "friendly", "funny", "gorgeous", "important", "interesting", "lucky", "magnificent",
            "marvellous", "neat", "ordinary", "pleasant", "precious", "regular", "remarkable", "special", "splendid",
            "stylish", "superb", "sweet", "typical", "unusual")
OPINION_SHARE = 0.12
NUMBERS = ({2: "two", 3: "three"},) * 5 + ({2: "2", 3: "3"},) * 2 + (
    {2: "a pair of", 3: "a trio of"}, {2: "a pair of", 3: "a group of three"}, {2: "a couple of", 3: "a set of three"},
    {2: "exactly two", 3: "exactly three"})
# {o} opinion, {s} size, {c} colour, {n} noun
COLOURED = ("{o} {s} {c} {n}",) * 6 + (
    "{o} {s} {n} that {is} {c}", "{o} {s} {n} that {is} {c}", "{o} {s} {n} which {is} {c}", "{o} {s} {n} in {c}",
    "{o} {s} {n} in {c}", "{o} {s} {n} coloured {c}", "{o} {s} {n} colored {c}", "{o} {s} {c}-coloured {n}",
    "{o} {s} {c}-colored {n}", "{o} {n} that {is} {s and c}")
ALONE = (*COLOURED, "{o} {s} {n}, {c},", "{o} {s} {n} ({c})")    # where nothing else is named
PLAIN = ("{o} {s} {n}",) * 6 + ("{o} {n} that {is} {s}",)

# --- several objects --------------------------------------------------------------------------------

LISTS = {
    1: ("{a}",),
    2: ("{a} and {b}",) * 5 + ("{a} & {b}", "{a} & {b}", "{a} with {b}", "{a} together with {b}", "{a} along with {b}",
                               "{a} as well as {b}", "{a} plus {b}", "{a} and also {b}", "both {a} and {b}"),
    3: ("{a}, {b} and {c}",) * 3 + ("{a}, {b}, and {c}", "{a}, {b}, and {c}", "{a} and {b} and {c}", "{a}, {b} & {c}",
                                    "{a} with {b} and {c}", "{a} together with {b} and {c}", "{a} plus {b} and {c}",
                                    "{a} and {b}, and also {c}"),
}
RELATION_WORDS = (
    {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"},
    {"left": "to the left of", "right": "to the right of", "above": "above", "below": "under"},
    {"left": "left of", "right": "right of", "above": "over", "below": "under"},
    {"left": "on the left of", "right": "on the right of", "above": "above", "below": "beneath"},
    {"left": "to the left of", "right": "to the right of", "above": "over", "below": "underneath"},
)
ITS = (
    {"left": "to its left", "right": "to its right", "above": "above it", "below": "below it"},
    {"left": "on its left", "right": "on its right", "above": "over it", "below": "under it"},
    {"left": "on the left of it", "right": "on the right of it", "above": "above it", "below": "beneath it"},
)
SIDES = {"left": ("on the left", "on the right"), "right": ("on the right", "on the left"),
         "above": ("at the top", "at the bottom"), "below": ("at the bottom", "at the top")}
RELATED = ("{a}{,} {rel} {b}",) * 6 + ("{a} that is {rel} {b}", "{a}{,} placed {rel} {b}", "{b} with {a} {its}",
                                       "{b} with {a} {its}", "{b} and, {its}, {a}")
HALVES = ("{a} {side} and {b} {other}", "{side} {a}, {other} {b}")      # where each lies in a half of its own
NEAR = (                # that two objects lie side by side is said without saying which is where
    {"across": "{a} next to {b}", "down": "{a} and {b}, one above the other"},
    {"across": "{a} beside {b}", "down": "{a} and {b}, one above the other"},
    {"across": "{a} and {b} next to each other", "down": "{a} and {b} one above the other"},
    {"across": "{a} and {b} side by side", "down": "{a} and {b} one above the other"},
)
RELATED_SHARE, NEAR_SHARE, HALVES_SHARE = 0.65, 0.5, 0.2       # of pairs; of the others; of those in halves
# Statements of a relation, in place of "there is ..." and its like
CLAUSES = ("{a} {is} {rel} {b}", "{a} {is} {rel} {b}", "{rel} {b} {is} {a}", "{rel} {b} there {is} {a}")
CLAUSE_SHARE = 0.5

# --- the whole caption ------------------------------------------------------------------------------

IMAGES = ("picture", "picture", "image", "drawing", "illustration", "photo", "sketch", "painting", "cartoon", "graphic")
IMAGE_ADJECTIVES = ("",) * 8 + ("nice", "simple", "lovely", "beautiful", "pretty", "cheerful", "funny", "clean",
                                "detailed", "friendly", "modern", "fun", "cute", "bright", "minimalist", "digital")
LEADS = ("",) * 12 + ("hi, ", "hello, ", "okay, ")
UNSAID, WITHIN, BEFORE, AFTER = range(4)
GROUND_PLACES = (UNSAID,) * 4 + (WITHIN,) * 10 + (BEFORE,) * 3 + (AFTER,) * 3
# {x} colour of the background, {an x} the same with its article
GROUNDS_WITHIN = ("on {an x} background",) * 4 + (
    "against {an x} background", "in front of {an x} background", "on {x}", "on {x}", "against {x}",
    "on a plain {x} background", "on a solid {x} background", "on {an x} backdrop", "against {an x} backdrop",
    "on a background that is {x}", "with {x} in the background", "with {an x} background", "with {an x} background")
ON_GROUND = ("on {an x} background, ", "against {an x} background, ", "on {x}, ")
GROUND_TITLE = ("{x} background: ", "{x} background, ", "{an x} background with ")
GROUND_TOLD = (". The background is {x}.", ". The background is {x}.", "; the background is {x}", ", {x} background",
               ", {x} background", ". {X} background.", ", background {x}")
GROUND_WISHED = (". The background should be {x}.", ". Make the background {x}.", ". Use {an x} background.",
                 ". Put everything on {x}.", ". I want {an x} background.")
STYLES = ("",) * 16 + (", cartoon style", ", flat design", ", simple style", ", high quality", ", digital art",
                       ", clean lines", ", minimalist", " in a simple style")
REASONS = ("",) * 10 + (" for me", " for my daughter", " for a poster", " for a friend", " for a card", ", please")
A, THE, ONE, SINGLE, BARE, MIXED = "a", "the", "one", "a single", "", "mixed"


@dataclass(frozen=True)
class Mood:
    """Sentences of one mood. Articles of single objects; how the background is said before and after; how it ends."""

    frames: tuple[str, ...]
    articles: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    tails: tuple[str, ...]
    ends: tuple[str, ...]


FRAGMENT = Mood(("{scene}",), (A,) * 6 + (THE, THE, ONE, SINGLE, BARE, BARE, BARE, MIXED), ON_GROUND + GROUND_TITLE,
                GROUND_TOLD, STYLES, ("", "", "", "."))
LABEL = Mood(("{image} of {scene}",) * 4 + ("{image} showing {scene}", "{image} that shows {scene}",
                                           "{image} depicting {scene}"),
             (A,) * 6 + (THE, ONE, SINGLE, MIXED), GROUND_TITLE[:2],
             (*GROUND_TOLD, ". It has {an x} background."), STYLES,
             ("", "", "", "."))
REQUEST = Mood(("draw {scene}", "draw {scene}", "please draw {scene}", "paint {scene}", "please paint {scene}",
                "show me {scene}", "show {scene}", "make {image} of {scene}", "create {image} of {scene}",
                "draw me {scene}", "give me {image} of {scene}", "generate {image} of {scene}", "sketch {scene}"),
               (A,) * 6 + (THE, ONE, SINGLE, MIXED), ON_GROUND, GROUND_WISHED, REASONS, ("", "", ".", ".", "!"))
WISH = Mood(("I want {scene}", "I would like {scene}", "I'd like to see {scene}", "I want to see {scene}",
             "I need {image} of {scene}", "let me see {scene}", "I would love {image} of {scene}",
             "I am looking for {image} of {scene}"),
            (A,) * 6 + (THE, ONE, SINGLE, MIXED), ON_GROUND[:2], GROUND_WISHED, REASONS, ("", "", ".", "."))
QUESTION = Mood(("can you draw {scene}", "can you show me {scene}", "could you paint {scene}",
                 "could you please draw {scene}", "would you draw {scene}", "can I see {scene}", "may I see {scene}",
                 "can I have {image} of {scene}", "could you make {image} of {scene}", "will you draw {scene}",
                 "how about {scene}", "do you have {image} of {scene}", "what would {scene} look like",
                 "what would {scene} look like"),
                (A,) * 6 + (THE, ONE, SINGLE, MIXED), (), GROUND_WISHED, ("",), ("?", "?", "?", ""))
STATEMENT = Mood(("there {is} {scene}",) * 4 + ("here {is} {scene}", "this is {image} of {scene}",
                                               "the {picture} shows {scene}", "this {picture} shows {scene}",
                                               "you can see {scene}", "I see {scene}", "we see {scene}",
                                               "in the {picture} there {is} {scene}"),
                 (A,) * 6 + (ONE, SINGLE), ON_GROUND[:2], GROUND_TOLD, ("",), ("", ".", "."))
MOODS = (FRAGMENT,) * 7 + (LABEL,) * 3 + (REQUEST,) * 3 + (WISH,) * 2 + (QUESTION,) * 2 + (STATEMENT,) * 4
AS_IS, SENTENCE, TITLE, CAPITALS = range(4)
CASES = (AS_IS,) * 12 + (SENTENCE,) * 6 + (TITLE, CAPITALS)


def write_varied_caption(description: Description, rng: random.Random) -> str:
    """A text by the grammar. Sizes, the relation and the background are sometimes unsaid; tints and counts never."""
    mood = _pick(rng, MOODS)
    turned = rng.random() < 0.4 and len(description.groups) == 2
    description = swap_groups(description) if turned else description
    frame, fields = _pick(rng, mood.frames), _image_fields(rng)
    clause = rng.random() < CLAUSE_SHARE and mood is STATEMENT
    scene, is_clause = _word_objects(description, mood, clause, rng)
    before, within, after = _word_background(description, mood, frame, scene, rng)
    lead, tail, end = (_pick(rng, table) for table in (LEADS, mood.tails, mood.ends))
    text = scene if is_clause else frame.replace("{scene}", "{scene}" + within)
    text = _fill(text, scene=scene, **fields, **{"is": "are" if description.groups[0].count > 1 else "is"})
    text = (lead if mood in (REQUEST, QUESTION) and not before else "") + before + text + (within if is_clause else "")
    text += "" if "please" in frame or (tail.startswith(" for") and re.search("me|see|show", frame)) else tail
    sentences = after.startswith(". ")
    text += ("?" if mood is QUESTION else end or ".") + after[1:] if sentences else after + end
    return _set_case(re.sub(r",(?=[.,;!?]|$)", "", text), _pick(rng, CASES), sentences)


def _word_objects(description: Description, mood: Mood, clause: bool, rng: random.Random) -> tuple[str, bool]:
    """The objects in their relation, and whether that is a clause: it has a verb."""
    groups, relation = description.groups, description.relation
    articles, alone = _pick(rng, mood.articles), mood in (FRAGMENT, LABEL) and len(groups) == 1
    things, has_clause = zip(*(_noun_phrase(group, articles, alone, rng) for group in groups), strict=True)
    related, near, halves = (rng.random() < share for share in (RELATED_SHARE, NEAR_SHARE, HALVES_SHARE))
    clauses, forms, listing, near_form, half_form, words, its = (
        _pick(rng, table) for table in (CLAUSES, RELATED, LISTS[len(groups)], NEAR, HALVES, RELATION_WORDS, ITS))
    fields = dict(zip("abc", things, strict=False)) | {"is": "is"}
    if not relation or not (related or near):
        if listing.startswith("both") and (any(group.count > 1 for group in groups) or mood is STATEMENT):
            listing = "{a} and {b}"
        return _fill(listing, **fields), False
    if not related:
        return _fill(near_form["across" if relation in ("left", "right") else "down"], **fields), False
    comma = "," if re.search(" (that|which) is ", things[0]) and mood is not QUESTION else ""
    fields |= {"rel": words[relation], "its": its[relation], ",": comma,
               "side": SIDES[relation][0], "other": SIDES[relation][1]}
    if clause:
        return _fill(clauses, **fields), True
    if description.halves and halves:
        return _fill(half_form if mood is FRAGMENT and articles != BARE else HALVES[0], **fields), False
    if has_clause[0] and (" that is " in forms or "{its}" in forms):
        forms = RELATED[0]
    return _fill(forms, **fields), False


def _noun_phrase(group: Group, articles: str, alone: bool, rng: random.Random) -> tuple[str, bool]:
    """Number or article, adjectives and noun ("a small star that is red", "the two cats"); and whether the templates
    that were chosen have a relative clause, which depends on no property of the group."""
    number, sizes, sized = _pick(rng, NUMBERS), _pick(rng, SIZE_WORDS), rng.random()
    opinion, valued = _pick(rng, OPINIONS), rng.random() < OPINION_SHARE
    other_noun, which = rng.random() < SYNONYM_SHARE, rng.random()
    coloured, plain = _pick(rng, ALONE if alone else COLOURED), _pick(rng, PLAIN)
    mixed = _pick(rng, (A, THE, ONE))
    article = mixed if articles == MIXED else articles
    size = sizes.get(group.size, "") if sized < SIZE_SHARE else ""
    opinion = opinion if valued and article != BARE else ""
    form = coloured if group.colour else plain if size and article != BARE else PLAIN[0]
    if form == plain and " that " in form or "{s and c}" in form:
        size = size.replace("little", "small")              # nobody says "a cat that is little"
    colour = group.colour or ""
    phrase = _fill(form, o=opinion, s=size, c=colour, n=_noun(group, other_noun, which),
                   **{"is": "is" if group.count == 1 else "are", "s and c": f"{size} and {colour}" if size else colour})
    phrase, clause = phrase.strip(), any(re.search("that|which", template) for template in (coloured, plain))
    if group.count > 1:
        number = number[group.count]
        phrase = f"the {number} {phrase}" if article == THE and " " not in number else f"{number} {phrase}"
    else:
        phrase = with_article(phrase) if article == A else f"{article} {phrase}".strip()
    return phrase, clause


def _noun(group: Group, other: bool, which: float) -> str:
    if other and (found := SYNONYMS.get(group.name)):
        return found[int(which * len(found))][group.count > 1]
    return OBJECTS[group.name].noun(group.count)


def _word_background(description: Description, mood: Mood, frame: str, scene: str,
                     rng: random.Random) -> tuple[str, str, str]:
    """What is said of the background before, within and after the sentence."""
    colour = description.background
    colour = "gray" if rng.random() < 0.3 and colour == "grey" else colour
    place = _pick(rng, GROUND_PLACES)
    within, before, after = (_pick(rng, table) for table in (GROUNDS_WITHIN, mood.before or ("",), mood.after))
    if place == BEFORE and (not mood.before or frame.startswith(("this ", "the "))):
        place = AFTER
    if place == WITHIN and within.startswith("with ") and " with " in scene:
        within = GROUNDS_WITHIN[0]
    said = ["", "", ""]
    if place != UNSAID:
        at, text = {BEFORE: (0, before), WITHIN: (1, " " + within), AFTER: (2, after)}[place]
        said[at] = _fill(text, x=colour, X=colour.capitalize(), **{"an x": with_article(colour)})
    return tuple(said)


def _image_fields(rng: random.Random) -> dict[str, str]:
    picture = f"{_pick(rng, IMAGE_ADJECTIVES)} {_pick(rng, IMAGES)}".strip()
    return {"picture": picture, "image": with_article(picture)}


def _set_case(text: str, case: int, sentences: bool) -> str:
    if case == CAPITALS:
        return text.upper()
    if case == TITLE and not sentences:
        return " ".join(word[:1].upper() + word[1:] for word in text.split())
    return text[:1].upper() + text[1:] if case == SENTENCE or sentences else text


def _pick(rng: random.Random, options: Sequence):
    return options[int(rng.random() * len(options))]


def _fill(template: str, **fields: str) -> str:
    """The template with its {fields} filled; spaces of empty ones are left out. Fields may have any name."""
    return re.sub(" +", " ", re.sub(r"\{([^}]+)\}", lambda match: fields[match[1]], template))


def list_phrases(objects: Sequence[str]) -> Iterator[str]:
    """All wordings that the grammar can put into captions of these objects, {fields} of templates included."""
    yield from (*OPINIONS, *ALONE, *PLAIN, *IMAGES, *IMAGE_ADJECTIVES, *LEADS, *GROUNDS_WITHIN, *RELATED, *HALVES,
                *CLAUSES, *COLOURS, *BACKGROUNDS, "gray", "is are", "the one a single an")
    for table in (*NUMBERS, *SIZE_WORDS, *RELATION_WORDS, *ITS, *NEAR):
        yield from table.values()
    for forms in (*LISTS.values(), *SIDES.values()):
        yield from forms
    for mood in set(MOODS):
        yield from (*mood.frames, *mood.before, *mood.after, *mood.tails)
    for name in objects:
        yield from (OBJECTS[name].noun(1), OBJECTS[name].noun(2))
        yield from (noun for nouns in SYNONYMS.get(name, ()) for noun in nouns)
