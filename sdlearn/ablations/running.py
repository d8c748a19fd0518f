"""Running an ablation: a plan that fits the minutes, one variant after the other, each stored when done; the result.

    runs/ablations/<name>/plan.json             the budget, as it was settled at the first call
    runs/ablations/<name>/<variant>/            record.json and images.npz, once the variant has ended

A variant that is done, of the same plan and the same model, is not run again. One that diverges ends there, with the
measurements so far; the others are run.
"""

import hashlib
import io
import math
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from ..checkpoint import CheckpointError, read_json, write_json
from ..checkpoint.shipped import SHIPPED
from ..data import contact_sheet
from ..files import write_atomically
from ..machine import describe_environment
from ..pipeline import StableDiffusion
from .ablation import Ablation, Measurement, Plan, Variant

RESULTS = SHIPPED / "ablations"
RECORD, IMAGES, PLAN = "record.json", "images.npz", "plan.json"
SHEET_BYTES = 150_000
ON_GPU = 1 / 6              # of the minutes on a CPU
TRAINING_SHARE = 0.7        # of the minutes; the rest is for what is measured
LEAST = 8                   # steps: one for each mark


# --- the plan -------------------------------------------------------------------------------------------

def default_minutes(ablation: Ablation, device: torch.device) -> float:
    return ablation.minutes * (1 if device.type == "cpu" else ON_GPU)


def load_or_fit_plan(ablation: Ablation, base: StableDiffusion, folder: Path, minutes: float | None = None) -> Plan:
    """The plan of a run, settled by a short trial at the first call and stored with the run.

    minutes: of this machine; the ablation's own unless given, for which the plan is cut short only on a machine that
    is slower than two CPU cores.
    """
    asked = {"minutes": minutes or default_minutes(ablation, base.device), "model": fingerprint(base)}
    file = folder / ablation.name / PLAN
    if file.exists():
        stored = read_json(file)
        if stored.get("asked") == asked and set(stored["plan"]) == set(asdict(ablation.plan)):
            return Plan(**stored["plan"])
    plan = fit_plan(ablation, base, asked["minutes"])
    with write_atomically(file) as partial:
        write_json(partial, {"asked": asked, "plan": asdict(plan)})
    return plan


def fit_plan(ablation: Ablation, base: StableDiffusion, minutes: float) -> Plan:
    """The ablation's plan, cut down to what so many minutes allow."""
    if ablation.afford:
        return ablation.afford(base, ablation.plan, minutes)
    plan = scale_plan(ablation.plan, minutes / default_minutes(ablation, base.device))
    seconds = sum(variant.steps * time_step(variant) for variant in ablation.variants(base, plan))
    share = min(1.0, TRAINING_SHARE * 60 * minutes / seconds) if seconds else 1.0
    return replace(plan, steps=max(min(LEAST, plan.steps), int(plan.steps * share)))


def scale_plan(plan: Plan, share: float) -> Plan:
    """Fewer scenes and prompts, in proportion; never more than the plan's."""
    least = {"scenes": 64, "unseen": 16, "prompts": 4}
    counts = {name: getattr(plan, name) for name in least}
    return replace(plan, **{name: min(count, max(least[name], round(count * share)))
                            for name, count in counts.items() if count is not None})


def time_step(variant: Variant, tries: int = 4) -> float:
    """What a step takes at which nothing is measured; 0 where there is none. The first is slower, and left out."""
    taken, start = [], time.perf_counter()
    steps = variant.run()
    try:
        for measurement in steps:
            now = time.perf_counter()
            if not measurement.figures:
                taken.append(now - start)
            if len(taken) > tries:
                break
            start = time.perf_counter()
    except FloatingPointError:          # will be told when the variant is run
        pass
    finally:
        steps.close()
    return median(taken[1:]) if len(taken) > 1 else 0.0


def fingerprint(base: StableDiffusion) -> str:
    """Of the weights that an ablation builds on."""
    digest = hashlib.sha256()
    for module in (base.unet, base.vae, base.text_encoder):
        for tensor in module.state_dict().values():
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- the run --------------------------------------------------------------------------------------------

def run_ablation(ablation: Ablation, base: StableDiffusion, plan: Plan,
                 folder: Path) -> Iterator[tuple[Variant, Measurement]]:
    """Run the variants that are not done yet, one after the other; yields every step."""
    for variant in ablation.variants(base, plan):
        target = variant_folder(folder, ablation, variant)
        same = describe_run(ablation, base, plan, variant)
        if load_record(target, same) is None:
            yield from run_variant(variant, target, same)


def run_variant(variant: Variant, target: Path, same: dict) -> Iterator[tuple[Variant, Measurement]]:
    measurements, last, ended, seconds = [], Measurement(0), None, 0.0
    steps, start = variant.run(), time.perf_counter()
    while True:
        try:
            measurement = next(steps)
        except StopIteration:
            break
        except FloatingPointError as error:         # Diverged, or an image that is not finite
            ended = str(error)
            break
        seconds += time.perf_counter() - start      # without what is done between two steps
        if measurement.figures:
            figures = {name: round_for_json(value) for name, value in measurement.figures.items()}
            measurements.append({"step": measurement.step, **figures})
            last = measurement if len(measurement.images) else last
        yield variant, measurement
        start = time.perf_counter()
    with write_atomically(target) as partial:
        partial.mkdir()
        if len(last.images):
            np.savez_compressed(partial / IMAGES, images=np.stack(last.images), captions=np.array(last.captions))
        write_json(partial / RECORD, {**same, "seconds": round(seconds, 2), "ended": ended,
                                      "measurements": measurements})


def round_for_json(value: float) -> float | None:
    """Five digits are enough; JSON knows no NaN."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def describe_run(ablation: Ablation, base: StableDiffusion, plan: Plan, variant: Variant) -> dict:
    return {"ablation": ablation.name, "variant": variant.name, "changed": dict(variant.changed), "plan": asdict(plan),
            "model": fingerprint(base)}


def variant_folder(folder: Path, ablation: Ablation, variant: Variant) -> Path:
    return folder / ablation.name / re.sub(r"[^a-z0-9.]+", "-", variant.name.lower()).strip("-")


def load_record(target: Path, same: dict) -> dict | None:
    """The record of a variant that was run to its end under the same plan, on the same model."""
    if not (target / RECORD).exists():
        return None
    record = rename_readings(read_json(target / RECORD))
    return record if {name: record.get(name) for name in same} == same else None


def rename_readings(record: dict) -> dict:
    """A record whose measurements have the key of earlier versions, under today's."""
    return {"measurements" if key == "readings" else key: value for key, value in record.items()}


# --- the result -----------------------------------------------------------------------------------------

def write_results(ablation: Ablation, base: StableDiffusion, plan: Plan, folder: Path, out: Path = RESULTS) -> Path:
    """Write the figures of all variants as <name>.json and their images as <name>.png; gives the first's path.

    Raises CheckpointError for a variant that has not been run.
    """
    records, images, captions = {}, [], []
    for variant in ablation.variants(base, plan):
        target = variant_folder(folder, ablation, variant)
        if (record := load_record(target, describe_run(ablation, base, plan, variant))) is None:
            raise CheckpointError(f"'{variant.name}' of the ablation '{ablation.name}' has not been run in {folder}; "
                                  f"run `ablate {ablation.name}` to its end first")
        records[variant.name] = {name: record[name] for name in ("changed", "seconds", "ended", "measurements")}
        if (target / IMAGES).exists():
            with np.load(target / IMAGES) as stored:
                images += list(stored["images"])
                captions += stored["captions"].tolist()
    file = out / f"{ablation.name}.json"
    with write_atomically(file) as partial:
        write_json(partial, {**describe_ablation(ablation, base, plan), "variants": records})
    if images:
        with write_atomically(file.with_suffix(".png")) as partial:
            partial.write_bytes(encode_png(contact_sheet(images, captions, ablation.columns)))
    return file


def describe_ablation(ablation: Ablation, base: StableDiffusion, plan: Plan) -> dict:
    """What was varied, on which model, under which plan, on which machine and when."""
    status, why = describe_scale(ablation, base, plan)
    budget = {name: value for name, value in asdict(plan).items() if value is not None}
    return {"ablation": ablation.name, "question": ablation.question, "varied": ablation.varied, "status": status,
            "scale": why, "budget": budget, "notes": list(ablation.notes),
            "model": {"name": base.config.name, "fingerprint": fingerprint(base)},
            **describe_environment(base.device)}


def describe_scale(ablation: Ablation, base: StableDiffusion, plan: Plan) -> tuple[str, str]:
    """("full" or "small", why): full is the shipped model itself under the whole plan."""
    why = []
    if ablation.network == "small":
        why.append("networks of a lesson, trained from nothing within minutes, not the shipped model's size")
    why += [f"{name.replace('_', ' ')}: {getattr(plan, name)} of {whole}" for name, whole in
            asdict(ablation.plan).items() if getattr(plan, name) != whole and isinstance(whole, (int, float))]
    name = base.config.name
    return ("small", "; ".join(why)) if why else ("full", f"the model '{name}' itself, and the whole plan")


def encode_png(sheet: Image.Image, limit: int = SHEET_BYTES) -> bytes:
    """A sheet as PNG below `limit` bytes: with as many colours as fit, and where even few are too many, smaller."""
    while True:
        for colours in (256, 128, 64, 32):
            buffer = io.BytesIO()
            sheet.quantize(colours, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
            if buffer.tell() <= limit:
                return buffer.getvalue()
        sheet = sheet.resize((sheet.width * 3 // 4, sheet.height * 3 // 4), Image.Resampling.LANCZOS)


def load_ablation(name: str, folder: Path = RESULTS) -> dict:
    """The result of an ablation, as `write_results` wrote it. Raises CheckpointError where there is none."""
    file = Path(folder) / f"{name}.json"
    if not file.exists():
        there = ", ".join(sorted(one.stem for one in Path(folder).glob("*.json"))) or "none"
        raise CheckpointError(f"there is no result of an ablation '{name}' in {folder} (there are: {there}); run "
                              f"`ablate {name}`")
    result = read_json(file)
    return result | {"variants": {key: rename_readings(one) for key, one in result["variants"].items()}}
