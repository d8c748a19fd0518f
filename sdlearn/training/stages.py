"""The stages of training in their order, what each needs from the ones before, and shipping the result."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from ..checkpoint import CheckpointError, load_folder, load_tokenizer, save_tokenizer
from ..checkpoint.shipped import (
    DIFFERENCE_FILE,
    INPAINT,
    list_shipped_controlnets,
    load_shipped_controlnet,
    load_shipped_inpaint,
)
from ..clip import CLIP, TextEncoder
from ..config import ModelConfig
from ..data import WORLDS, draw_scene
from ..tokenizer import Tokenizer
from ..unet import UNet
from ..vae import VAE
from .clip import CLIPRecipe
from .concept import ConceptRecipe, LoRARecipe, WordRecipe
from .control import HINTS, ControlRecipe
from .inpaint import InpaintRecipe
from .judge import JudgeRecipe
from .loop import load_state, load_weights, save_state
from .unet import UNetRecipe
from .vae import VAERecipe, measure_scaling_factor


@dataclass(frozen=True)
class Phase:
    """A part of a stage's budget in `train all`."""

    share: float                # of the stage's seconds
    world: str | None = None    # whose scenes, a name of `WORLDS`; None: the recipe's own
    anneal: bool = False        # the learning rate falls to zero, and the average is of this phase alone


@dataclass(frozen=True)
class Stage:
    make: Callable
    minutes: float              # budget when none is given, for two CPU cores
    gpu_minutes: float = 1.0    # the same in `train all` on a GPU
    phases: tuple[Phase, ...] = (Phase(1.0),)       # of `train all`, one after the other
    settled_by: str | None = None       # a stage that learns from this one's output: `all` does not move it any more

    @property
    def usual_minutes(self) -> float:
        """Of `train all`, on the machine that this is."""
        return self.gpu_minutes if torch.accelerator.is_available() else self.minutes

    def spans(self, seconds: float) -> list[tuple[Phase, float, float]]:
        """The phases of a budget, each with the seconds of training at which it begins and ends."""
        spans, begin = [], 0.0
        for phase in self.phases:
            spans.append((phase, begin, begin := begin + phase.share * seconds))
        return spans


def read_trained_seconds(run: Path, stage: str) -> float | None:
    """How long a stage has been trained in a run, None for not at all. The main process reads it for all of them, as
    what follows from it must be the same in all."""
    state = load_state(run / f"{stage}-state.pt") if PartialState().is_main_process else None
    [seconds] = broadcast_object_list([None if state is None else state["progress"].get("seconds", 0.0)])
    return seconds


def train_tokenizer(config: ModelConfig, run: Path, captions: int = 20_000) -> Tokenizer:
    """The run's tokenizer; merges are learned from captions and common English words at the first call."""
    folder = run / "tokenizer"
    if not folder.exists():
        english = (Path(__file__).parent.parent / "data" / "english.txt").read_text(encoding="utf-8").split()
        texts = [draw_scene(seed, world=WORLDS["rich-full"]).caption for seed in range(captions)]
        save_tokenizer(folder, Tokenizer.train([*texts, *english], config.text.vocab_size))
    return load_tokenizer(folder)


def load_averaged(module, run: Path, stage: str):
    """`module` with the averaged weights of an earlier stage."""
    state = load_state(run / f"{stage}-state.pt")
    if state is None:
        raise FileNotFoundError(f"the stage '{stage}' has not been trained in '{run}': run `train {stage}` first")
    load_weights(module, state["average"])
    return module.eval().requires_grad_(False)


def load_trained_vae(config: ModelConfig, run: Path) -> VAE:
    """The run's autoencoder; its scaling factor is measured at the first call and kept beside the state."""
    file = run / "scaling_factor.txt"
    if not file.exists():
        file.write_text(f"{measure_scaling_factor(load_averaged(VAE(config.vae), run, 'vae')):.5f}")
    factor = float(file.read_text())
    return load_averaged(VAE(replace(config.vae, scaling_factor=factor)), run, "vae")


def start_from(folder: Path, run: Path, config: ModelConfig | None = None) -> list[str]:
    """Fill an empty `run` with the weights of a model folder, so that it goes on from them; the stages filled.

    What the run has already stays. The optimiser starts anew, as its state is not shipped. Where `config` asks
    for a U-Net of another shape, autoencoder and encoders alone are taken. Raises CheckpointError for a folder
    that is no model or that lacks the image encoder.
    """
    parts = load_folder(folder)
    if parts.clip is None:
        raise CheckpointError(f"{folder} has no image encoder; give a model folder that `train package` has written")
    figures = folder / "figures.json"
    told = json.loads(figures.read_text(encoding="utf-8"))["training"] if figures.exists() else {}
    if not (run / "tokenizer").exists():
        save_tokenizer(run / "tokenizer", parts.tokenizer)
    filled = []
    modules = {"vae": parts.vae, "clip": parts.clip}
    if config is None or config.unet == parts.config.unet:
        modules |= {"unet": parts.unet, **load_adapters(folder)}
    for stage, module in modules.items():
        if not (file := run / f"{stage}-state.pt").exists():
            weights = module.state_dict()
            save_state(file, {"model": weights, "average": weights, "progress": told.get(stage, {})})
            filled.append(stage)
    if "vae" in filled:
        (run / "scaling_factor.txt").write_text(f"{parts.vae.config.scaling_factor:.5f}")
    return filled


def load_adapters(folder: Path) -> dict[str, nn.Module]:
    """The ControlNets and the inpainting U-Net of a model folder, by stage."""
    modules = {name: load_shipped_controlnet(folder, name)
               for name in list_shipped_controlnets(folder) if name in HINTS}
    if (folder / INPAINT / DIFFERENCE_FILE).exists():
        modules["inpaint"] = load_shipped_inpaint(folder).unet
    return modules


def make_vae(config: ModelConfig, run: Path, **options) -> VAERecipe:
    return VAERecipe(config, **options)


def make_clip(config: ModelConfig, run: Path, **options) -> CLIPRecipe:
    return CLIPRecipe(config, train_tokenizer(config, run), **options)


def load_frozen_parts(config: ModelConfig, run: Path) -> tuple[VAE, TextEncoder, Tokenizer, Path]:
    """What the stages on latents take from the ones before, on the device where they will make the latents."""
    device = PartialState().device
    text = load_averaged(CLIP(config.text, config.vision), run, "clip").text_model.to(device)
    return load_trained_vae(config, run).to(device), text, train_tokenizer(config, run), run


def make_judge(config: ModelConfig, run: Path, **options) -> JudgeRecipe:
    return JudgeRecipe(**options)


def load_trained_unet(config: ModelConfig, run: Path) -> UNet:
    return load_averaged(UNet(config.unet), run, "unet").to(PartialState().device)


def make_unet(config: ModelConfig, run: Path, **options) -> UNetRecipe:
    return UNetRecipe(config, *load_frozen_parts(config, run), **options)


def make_control(config: ModelConfig, run: Path, *, hint: str, **options) -> ControlRecipe:
    return ControlRecipe(config, load_trained_unet(config, run), *load_frozen_parts(config, run), hint=hint, **options)


def make_inpaint(config: ModelConfig, run: Path, **options) -> InpaintRecipe:
    return InpaintRecipe(config, load_trained_unet(config, run), *load_frozen_parts(config, run), **options)


def make_concept(config: ModelConfig, run: Path, *, kind: type[ConceptRecipe], **options) -> ConceptRecipe:
    return kind(config, load_trained_unet(config, run), *load_frozen_parts(config, run), **options)


CONCEPTS = {kind.name: kind for kind in (WordRecipe, LoRARecipe)}
HARD = (Phase(1.0, "hard"),)
# What the shipped U-Net went through: the common scenes first, then the hard ones, at last to rest.
CORE_THEN_HARD = (Phase(0.50, "core"), Phase(0.44, "hard"), Phase(0.06, "hard", anneal=True))
# Minutes on two CPU cores, then on one data-centre GPU. Those on a GPU are planned, not measured: 22 in all, so that
# latents and sheets, too, fit into 25. The U-Net's part is smaller there: the autoencoder waits for scenes, which the
# CPU draws, and each stage spends some of its minutes on being compiled.
STAGES = {
    "vae": Stage(make_vae, 40, 3.5, settled_by="unet"),
    "clip": Stage(make_clip, 10, 1.5, settled_by="unet"),
    "unet": Stage(make_unet, 600, 10, CORE_THEN_HARD),
    **{hint: Stage(partial(make_control, hint=hint), 60, 1.5, HARD) for hint in HINTS},
    "inpaint": Stage(make_inpaint, 120, 2, HARD),
    **{name: Stage(partial(make_concept, kind=kind), 6, 1) for name, kind in CONCEPTS.items()},
}
JUDGE = {JudgeRecipe.name: Stage(make_judge, 40)}      # of no model, so no part of `train all`
