"""What a caption says of a scene: groups of objects, their relation, the background; true, or changed in one thing."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .world import COLOURS, COUNTS, OBJECTS

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Group:
    """All objects of one kind and tint. `size` is a key of `SIZES`, or None where they differ in it."""

    name: str
    count: int
    colour: str | None      # None: the natural look
    size: str | None


@dataclass(frozen=True)
class Description:
    """The content of a caption. `relation` is of the first group to the second."""

    groups: tuple[Group, ...]
    relation: str | None
    background: str
    halves: bool = False    # whether the two objects of a relation lie on different sides of the image's centre


def group_objects(objects) -> tuple[Group, ...]:
    """The objects by kind and tint, in the order in which they come."""
    sizes: dict[tuple[str, str | None], list[str]] = {}
    for placed in objects:
        sizes.setdefault((placed.name, placed.colour), []).append(placed.size)
    return tuple(Group(name, len(some), colour, some[0] if len(set(some)) == 1 else None)
                 for (name, colour), some in sizes.items())


def describe(scene) -> Description:
    """All that is true of a scene and that a caption can say."""
    halves = False
    if scene.relation:
        axis = 0 if scene.relation in ("left", "right") else 1
        first, second = (placed.centre[axis] - scene.side / 2 for placed in scene.objects[:2])
        halves = first * second < 0
    return Description(scene.groups, scene.relation, scene.background, halves)


def swap_groups(description: Description) -> Description:
    """The same from the other end: "a cat to the left of a dog" is "a dog to the right of a cat"."""
    return replace(description, groups=description.groups[::-1], relation=OPPOSITE.get(description.relation))


def iter_hard_negatives(description: Description, rng: random.Random) -> Iterator[Description]:
    """Descriptions that differ in one thing each: the relation, a count, which kind has which count, whose tint is
    whose, a tint."""
    groups = description.groups
    if description.relation:
        yield replace(description, relation=OPPOSITE[description.relation])
    if several := [i for i, group in enumerate(groups) if group.count > 1]:
        i = several[0] if len(several) == 1 else rng.choice(several)
        yield _with(description, i, count=rng.choice([count for count in COUNTS if count != groups[i].count]))
    counts = [group.count for group in groups]
    if len(set(counts)) > 1:
        yield _exchange(description, "count", counts)
    tints = [group.colour for group in groups]
    if len(set(tints)) > 1 and all(OBJECTS[group.name].tintable for group in groups):
        yield _exchange(description, "colour", tints)
    if coloured := [i for i, tint in enumerate(tints) if tint]:
        tint = rng.choice([colour for colour in COLOURS if colour not in tints])
        yield _with(description, rng.choice(coloured), colour=tint)


def replace_object(description: Description, rng: random.Random) -> Description:
    """One kind of object is called something that is not in the scene."""
    named = {group.name for group in description.groups}
    other = rng.choice([name for name in OBJECTS if name not in named])
    return _with(description, rng.randrange(len(description.groups)), name=other)


def _with(description: Description, i: int, **changes) -> Description:
    groups = list(description.groups)
    groups[i] = replace(groups[i], **changes)
    return replace(description, groups=tuple(groups))


def _exchange(description: Description, what: str, values: list) -> Description:
    """Each group with this property of the next one."""
    return replace(description, groups=tuple(replace(group, **{what: value}) for group, value in
                                             zip(description.groups, values[1:] + values[:1], strict=True)))


def with_article(phrase: str) -> str:
    """`phrase` with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
