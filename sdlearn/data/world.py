"""What can be in a scene: objects, colours, backgrounds, sizes, relations, and what is held out.

Everything the course's model can know is listed here, and nowhere else. The art is
OpenMoji's (CC BY-SA 4.0); an object is a code point of it, a kind, and, where its main
colour can be exchanged for another, the two fills to replace (body and shade).
"""

from collections import Counter
from dataclasses import dataclass, replace

RED, RED_SHADE = "#ea5a47", "#d22f27"          # names of OpenMoji's own palette
ORANGE, ORANGE_SHADE = "#f4aa41", "#e27022"
YELLOW, YELLOW_SHADE = "#fcea2b", "#f1b31c"
GREEN, GREEN_SHADE = "#b1cc33", "#5c9e31"
BLUE, LIGHT_BLUE = "#61b2e4", "#92d3f5"
PURPLE, PURPLE_SHADE = "#b399c8", "#8967aa"
BROWN, BROWN_SHADE = "#a57939", "#6a462f"


@dataclass(frozen=True)
class ObjectType:
    """One kind of thing a scene can hold."""

    name: str
    kind: str
    code: str                               # OpenMoji code point, the name of its SVG
    fills: tuple[str, str] | None = None    # fills that a tint replaces: body, shade
    plural: str = ""

    @property
    def tintable(self) -> bool:
        return self.fills is not None

    def noun(self, count: int = 1) -> str:
        return self.name if count == 1 else self.plural or self.name + "s"


_TABLE = {
    "animal": [
        ("cat", "1F431"), ("dog", "1F436"), ("bird", "1F426", (BROWN, BROWN_SHADE)),
        ("fish", "1F41F", (LIGHT_BLUE, BLUE), "fish"), ("pig", "1F416"), ("cow", "1F404"),
        ("rabbit", "1F407"), ("frog", "1F438"), ("turtle", "1F422"), ("elephant", "1F418"),
        ("butterfly", "1F98B", (LIGHT_BLUE, BLUE), "butterflies"), ("duck", "1F986"), ("bee", "1F41D"),
        ("bear", "1F43B"), ("whale", "1F433"), ("owl", "1F989"),
    ],
    "food": [
        ("apple", "1F34E", (RED, RED_SHADE)), ("banana", "1F34C"), ("carrot", "1F955"), ("pizza", "1F355"),
        ("cake", "1F382", (YELLOW, YELLOW_SHADE)), ("strawberry", "1F353", None, "strawberries"),
        ("lemon", "1F34B"), ("mushroom", "1F344", (RED, RED_SHADE)), ("donut", "1F369", (YELLOW_SHADE, YELLOW)),
        ("cheese", "1F9C0", None, "cheeses"), ("pear", "1F350"), ("watermelon", "1F349"), ("burger", "1F354"),
    ],
    "vehicle": [
        ("car", "1F697", (RED, RED_SHADE)), ("bicycle", "1F6B2", (RED, RED_SHADE)), ("airplane", "2708"),
        ("rocket", "1F680", (RED, RED_SHADE)), ("train", "1F682"), ("boat", "26F5"),
        ("helicopter", "1F681", (RED, RED_SHADE)), ("van", "1F69A"),
    ],
    "plant": [
        ("tree", "1F333"), ("sunflower", "1F33B"), ("cactus", "1F335", None, "cactuses"), ("rose", "1F339"),
        ("palm tree", "1F334"), ("leaf", "1F341", (ORANGE, ORANGE_SHADE), "leaves"),
    ],
    "thing": [
        ("ball", "26BD"), ("balloon", "1F388", (RED, RED_SHADE)), ("book", "1F4D5", (RED_SHADE, RED)),
        ("key", "1F511", (ORANGE, ORANGE_SHADE)), ("umbrella", "2602", (PURPLE, PURPLE_SHADE)),
        ("chair", "1FA91", (YELLOW, YELLOW_SHADE)), ("house", "1F3E0"), ("lamp", "1F4A1"), ("cup", "2615"),
        ("hat", "1F3A9"), ("bell", "1F514", (YELLOW, YELLOW_SHADE)), ("gift", "1F381", (YELLOW, YELLOW_SHADE)),
        ("drum", "1F941", (RED, RED_SHADE)), ("shirt", "1F455", (BLUE, LIGHT_BLUE)),
    ],
    "face": [
        ("smiling face", "1F600"), ("sad face", "1F622"), ("ghost", "1F47B"), ("pumpkin", "1F383"),
    ],
    "sky": [
        ("sun", "2600"), ("moon", "1F319"), ("cloud", "2601"),
    ],
    "shape": [
        ("star", "2B50", (YELLOW, YELLOW_SHADE)), ("heart", "2764", (RED_SHADE, RED)),
    ],
}

# Never in a scene: kept so that textual inversion and DreamBooth have something new to teach.
_UNTAUGHT_TABLE = {
    "animal": [("penguin", "1F427"), ("octopus", "1F419", None, "octopuses")],
    "thing": [("teapot", "1FAD6"), ("castle", "1F3F0"), ("backpack", "1F392")],
    "face": [("robot", "1F916"), ("alien", "1F47D")],
    "sky": [("snowman", "26C4", None, "snowmen")],
}


def _read(table) -> dict[str, ObjectType]:
    return {row[0]: ObjectType(row[0], kind, *row[1:]) for kind, rows in table.items() for row in rows}


OBJECTS: dict[str, ObjectType] = _read(_TABLE)
UNTAUGHT: dict[str, ObjectType] = _read(_UNTAUGHT_TABLE)

# The world the first weights learn: the objects with the plainest shapes.
CORE_OBJECTS = (
    "cat", "dog", "fish", "pig", "frog", "elephant", "butterfly", "bear",
    "apple", "banana", "strawberry", "lemon", "mushroom", "pear", "car", "rocket",
    "tree", "sunflower", "cactus", "ball", "balloon", "book", "key", "umbrella",
    "house", "hat", "smiling face", "pumpkin", "sun", "moon", "star", "heart",
)

COLOURS: dict[str, tuple[str, str]] = {     # tint: body, shade
    "red": (RED, RED_SHADE),
    "orange": ("#f39237", "#d0650f"),
    "yellow": (YELLOW, YELLOW_SHADE),
    "green": ("#6fb53a", "#3f7d20"),
    "blue": ("#4a9fe0", "#1e50a0"),
    "purple": ("#a678c8", "#6c4191"),
    "pink": ("#ffa7c0", "#e67a94"),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "grey": (196, 196, 196),
    "yellow": (255, 240, 130),
    "orange": (255, 200, 140),
    "pink": (255, 205, 220),
    "purple": (210, 190, 235),
    "blue": (170, 215, 250),
    "green": (190, 230, 160),
}

SIZES: dict[str, tuple[int, int]] = {       # pixels of the longer side, in a picture of 128
    "small": (28, 40),
    "medium": (44, 64),                     # never said in a caption
    "large": (72, 100),
}
SIZE_STEP = 4

RELATIONS = ("left", "right", "above", "below")
COUNTS = {2: "two", 3: "three"}
# How many of each kind a composition holds.
COMPOSITIONS = ((2, 1), (1, 2), (1, 1, 1), (3, 1), (1, 3), (2, 2), (2, 1, 1), (1, 2, 1), (1, 1, 2))

# Combinations that no training scene holds; the judge's seventh task asks for exactly these.
HELD_OUT_COLOURS = frozenset({
    ("blue", "apple"), ("purple", "car"), ("green", "star"), ("yellow", "balloon"), ("pink", "book"),
    ("orange", "umbrella"), ("red", "fish"), ("green", "heart"), ("blue", "mushroom"), ("yellow", "butterfly"),
    ("purple", "key"), ("red", "gift"), ("pink", "rocket"), ("orange", "shirt"),
})
HELD_OUT_COUNTS = frozenset({
    (2, "cat"), (3, "star"), (2, "tree"), (3, "balloon"), (2, "fish"), (3, "apple"), (2, "rocket"),
    (3, "heart"), (2, "pumpkin"), (3, "ball"),
})
HELD_OUT_PAIRS = frozenset(frozenset(pair) for pair in (
    ("dog", "umbrella"), ("pig", "balloon"), ("frog", "hat"), ("car", "tree"), ("rocket", "moon"),
    ("fish", "book"), ("elephant", "ball"), ("house", "sun"), ("banana", "star"), ("butterfly", "cactus"),
    ("pear", "key"), ("bear", "smiling face"), ("pumpkin", "ghost"), ("bee", "rose"),
))


@dataclass(frozen=True)
class World:
    """Which scenes are drawn, and how often each form of scene."""

    objects: tuple[str, ...] = tuple(OBJECTS)
    single: float = 0.35        # one object
    count: float = 0.15         # two or three of the same
    pair: float = 0.40          # two objects, in one of the four relations
    triple: float = 0.10        # three objects
    tinted: float = 0.6         # share of the objects that take a tint which have one
    colourful: float = 0.0      # share of scenes in which every object takes a tint
    composition: float = 0.0    # three or four objects of two or three kinds, each kind with a count of its own
    grammar: float = 0.0        # share of captions in the wordings of `grammar`; the others are in the simplest one


FULL = World()
CORE = World(objects=CORE_OBJECTS, single=0.5, count=0.1, pair=0.4, triple=0.0)
# What is hard to learn, often: counts, places, and two tints at once, which only one in fifty scenes of `CORE` has.
HARD = World(objects=CORE_OBJECTS, single=0.2, count=0.2, pair=0.6, triple=0.0, tinted=0.85, colourful=0.5)
# The hard scenes, and compositions among them ("two red stars and a green heart"), captioned as people write.
RICH = replace(HARD, single=0.18, count=0.16, pair=0.48, composition=0.18, grammar=0.6)
# The same of all objects, single ones more often: what the text encoder and its tokenizer learn from.
RICH_FULL = replace(FULL, single=0.3, count=0.15, pair=0.4, triple=0.0, composition=0.15, colourful=0.2, grammar=0.6)
# One thing at a time, of four that look nothing alike: what a small U-Net learns within a lesson.
CLASSROOM = World(objects=("apple", "star", "tree", "sun"), single=1.0, count=0.0, pair=0.0, triple=0.0)
WORLDS = {"classroom": CLASSROOM, "core": CORE, "hard": HARD, "rich": RICH, "full": FULL, "rich-full": RICH_FULL}


def world_name(world: World) -> str:
    """What a world is called in `WORLDS`; of one that is not there, "another"."""
    return next((name for name, known in WORLDS.items() if known == world), "another")


def is_held_out(names: tuple[str, ...], colours: tuple[str | None, ...]) -> bool:
    """Whether a scene holds a combination that training never sees: a colour, a count of one kind, a pair of kinds.

    `names` and `colours` give each object's.
    """
    if any((colour, name) in HELD_OUT_COLOURS for colour, name in zip(colours, names, strict=True)):
        return True
    if any((count, name) in HELD_OUT_COUNTS for name, count in Counter(names).items()):
        return True
    return any(frozenset((a, b)) in HELD_OUT_PAIRS for a in names for b in names)
