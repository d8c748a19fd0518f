"""Prompts in other wordings beside prompts for the same scenes in the captions' words."""

from collections.abc import Sequence

from .sampling import JudgedImage
from .scoring import clustered_error, mean
from .tasks import CAPTION_WORDING, OTHER_WORDINGS

ALL = "all"


def compare_wordings(judged: Sequence[JudgedImage]) -> dict[str, dict[str, float | None]]:
    """By kind of wording, and of "all": shares of right images and backgrounds in both wordings, and the ratio.

    judged: the images of `tasks.load_other_wordings` and of `tasks.reword_as_captions` of them, in the same order;
    others are ignored. Empty where there are none.
    """
    pairs = list(zip(*([one for one in judged if one.prompt.task == task]
                       for task in (OTHER_WORDINGS, CAPTION_WORDING)), strict=True))
    kinds = list(dict.fromkeys(other.prompt.kind for other, _ in pairs))
    table = {kind: _compared([pair for pair in pairs if pair[0].prompt.kind == kind]) for kind in kinds}
    return table | ({ALL: _compared(pairs)} if pairs else {})


def _compared(pairs: list[tuple[JudgedImage, JudgedImage]]) -> dict[str, float | None]:
    shares = {"images": len(pairs)}
    for place, name in enumerate(("other wording", "captions' words")):
        verdicts = [pair[place].verdict for pair in pairs]
        grounds = [one.background for one in verdicts if one.background is not None]
        shares[name] = mean([one.right for one in verdicts])
        shares[f"background, {name}"] = mean(grounds) if grounds else None
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for other, plain in pairs:
        groups.setdefault(other.prompt.text, []).append((other.verdict.right, plain.verdict.right))
    ratio, error = ratio_of_means(list(groups.values()))
    return shares | {"ratio": ratio, "standard error of the ratio": error}


def ratio_of_means(groups: Sequence[Sequence[tuple[float, float]]]) -> tuple[float | None, float | None]:
    """mean(a) / mean(b) over the pairs (a, b) of all groups, and its standard error, clustered by group.

    The error is that of the ratio estimator (Cochran 1977, "Sampling techniques", section 6.5), linearised: the
    clustered error of the mean of a - ratio b, over the mean of b. None where b is 0 throughout, and, as an error, of a
    single group.
    """
    firsts, seconds = zip(*(pair for group in groups for pair in group), strict=True)
    if not any(seconds):
        return None, None
    ratio = mean(firsts) / mean(seconds)
    error = clustered_error([[a - ratio * b for a, b in group] for group in groups])
    return ratio, None if error is None else error / mean(seconds)
