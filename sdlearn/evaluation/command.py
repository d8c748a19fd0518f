"""How well a model follows prompts: the whole of it, as a table, figures and a sheet of failures."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from ..checkpoint import write_json
from ..data import SIDE
from ..files import write_atomically
from .autoencoder import SCENES, autoencoder_psnr
from .card import load_figures
from .judge import Judge, load_judge
from .metrics import frechet_distance, vision_features
from .report import (
    Column,
    column_to_dict,
    describe_environment,
    failure_sheet,
    format_number,
    format_row,
    format_table,
    make_column,
    pick_failures,
    results_to_dicts,
    with_caption_wording,
)
from .sampling import JudgedImage, compose_prompt_scene, evaluate, evaluate_scenes
from .tasks import PER_TASK, Prompt, make_prompts, reword_as_captions

FIGURES = "evaluation.json"
FRECHET = "Fréchet distance to scenes"
DEFAULTS, AUTOENCODER = "model's defaults", "autoencoder on unseen scenes"


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is to be measured. Raises ValueError for what cannot be."""

    prompts: int = PER_TASK             # of each task
    seeds: int = 4                      # images of each prompt
    guidance: tuple[float, ...] | None = None       # None: the model's default scale alone
    steps: int | None = None            # None: the model's default
    sampler: str = "dpmpp_2m"

    def __post_init__(self):
        for name, most in (("prompts", 1000), ("seeds", 100)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; give a whole number from 1 to {most}")

    def for_model(self, model) -> "EvaluationPlan":
        """The plan with the model's default settings where there were none."""
        default = model.config.sampling
        return replace(self, steps=default.num_inference_steps if self.steps is None else self.steps,
                       guidance=(default.guidance_scale,) if self.guidance is None else self.guidance)


def check_plan(model, plan: EvaluationPlan, out: Path):
    """Raises ValueError for a plan, a model or a folder with which nothing could be measured or kept."""
    for scale in plan.for_model(model).guidance:
        model.validate(num_inference_steps=plan.steps, sampler=plan.sampler, guidance_scale=scale)
    if model.world is None:
        raise ValueError(f"'{model.config.name}' does not say which objects it was taught, so it cannot be asked for "
                         "them; evaluate a model that was trained on the scenes")
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{out} cannot be written: {above} is no folder that may be written to")


def run_evaluation(model, plan: EvaluationPlan, out: Path, *, judge: Judge | None = None,
        watch: Callable = lambda items, **_: items) -> str:
    """Measure a model, write figures and failures into `out`, and give the table.

    watch(items, total=, desc=) hands its items on and may show how far they are, as tqdm does. Raises what `check_plan`
    and `evaluate` raise; nothing is written then.
    """
    check_plan(model, plan, out)
    plan = plan.for_model(model)
    judge = judge or load_judge(device=model.device)
    objects = model.world["objects"]
    drawn = make_prompts(objects, count=plan.prompts)
    prompts = [*drawn, *reword_as_captions(drawn)]
    figures = {"model": model.config.name, **describe_environment(), "settings": asdict(plan),
               DEFAULTS: asdict(model.config.sampling),
               AUTOENCODER: autoencoder_psnr(model.vae, objects, count=min(SCENES, 5 * plan.prompts)),
               "judge on unseen scenes": (load_figures() or {}).get("unseen scenes"), "columns": {}, "images": {}}
    columns, features, sees = [], {}, can_encode_images(model)
    for title, judged, kept in iter_columns(model, plan, prompts, judge):
        judged = list(watch(judged, total=len(prompts) * plan.seeds, desc=title))
        columns.append(make_column(title, judged, model.clip))
        figures["columns"][title] = column_to_dict(columns[-1])
        if sees:
            features[title] = vision_features(model.clip, [one.image for one in with_caption_wording(judged)])
        if kept:
            figures["images"][title] = results_to_dicts(judged)
        write_results(out, figures, pick_failures(judged) if kept else [], title)
    plain = [prompt for prompt in prompts if prompt.kind is None]
    if not sees or len(plain) * plan.seeds < 2:
        return format_table(columns)
    figures[FRECHET] = frechet_distances(features, floor_features(model, plan, plain))
    write_results(out, figures, [], "")
    return format_table(columns) + "\n" + format_frechet(figures[FRECHET], columns)


def can_encode_images(model) -> bool:
    """Whether the model has an image encoder that sees its images, and the scenes, at their size."""
    return model.clip is not None and model.clip.vision_model.config.image_size == model.config.image_size == SIDE


def floor_features(model, plan: EvaluationPlan, prompts: Sequence[Prompt]) -> Tensor:
    """Features of other scenes of the same prompts, as many."""
    return vision_features(model.clip, [compose_prompt_scene(prompt, plan.seeds + seed).image for prompt in prompts
                                        for seed in range(plan.seeds)])


def frechet_distances(features: dict[str, Tensor], others: Tensor) -> dict[str, float]:
    """Fréchet distances of all columns to the real scenes, by title; "floor": of other scenes, as many, to these."""
    real = features.pop("scenes")
    return {title: frechet_distance(some, real) for title, some in features.items()} | {
        "floor": frechet_distance(others, real)}


def format_frechet(found: dict[str, float], columns: Sequence[Column]) -> str:
    return format_row("Fréchet distance", [format_number(found.get(one.title)) for one in columns]) + (
        f"\nOf the encoders' features, to the scenes; as many other scenes of the same prompts: {found['floor']:.3f}")


def iter_columns(model, plan: EvaluationPlan, prompts: Sequence[Prompt],
                 judge: Judge) -> Iterator[tuple[str, Iterator[JudgedImage], bool]]:
    """What is judged, one after the other: a title, the images, and whether each of them is told in the figures."""
    for scale in plan.guidance:
        yield f"w = {scale:g}", evaluate(model, prompts, seeds=plan.seeds, judge=judge, steps=plan.steps,
                                         sampler=plan.sampler, guidance=scale), True
    for title, vae in (("ceiling", model.vae), ("scenes", None)):
        yield title, evaluate_scenes(prompts, seeds=plan.seeds, vae=vae, judge=judge), False


def write_results(out: Path, figures: dict, failures: Sequence[JudgedImage], title: str):
    """After every pass, so that what is done is kept when a later one is stopped."""
    with write_atomically(out) as beside:
        write_json(beside / FIGURES, figures)
        if failures:
            failure_sheet(failures).save(beside / f"failures {title}.png".replace(" = ", " ").replace(" ", "-"))
