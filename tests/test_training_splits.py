"""Training draws scenes of the training split, and whatever is measured is measured on scenes of the test split, in the
world that a stage is given."""

import sys

import numpy as np
import pytest
import torch
from models import one_thread  # noqa: F401
from recipes import scene_config, untrained_base

from sdlearn.data import CORE, FULL, WORLDS
from sdlearn.data import draw_scene as scene_of_seed
from sdlearn.training import card, stages
from sdlearn.training.clip import hard_negative_accuracy, relation_accuracy, retrieval_accuracy
from sdlearn.training.unet import UNetRecipe, validation_prompts
from sdlearn.training.vae import measure_scaling_factor

HARD = WORLDS["hard"]


@pytest.fixture(scope="module")
def config():
    return scene_config()


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = untrained_base(config, tmp_path_factory.mktemp("run"))
    (folder / "scaling_factor.txt").write_text("1.0")           # so that no scenes are drawn to measure it
    return folder


@pytest.fixture
def asked(monkeypatch):
    """The (split, world) of every scene that any module draws by its seed."""
    found = []

    def recorded(seed, split="train", world=FULL):
        found.append((split, world))
        return scene_of_seed(seed, split, world)

    for name, module in list(sys.modules.items()):
        if name.startswith("sdlearn") and getattr(module, "draw_scene", None) is scene_of_seed:
            monkeypatch.setattr(module, "draw_scene", recorded)
    return found


SMALL = {"vae": {}, "clip": {}, **dict.fromkeys(("unet", "edges", "depth"), {"first": 4, "capacity": 60}),
         "inpaint": {"first": 4, "capacity": 60, "first_masks": 1, "masks": 1}}


@pytest.mark.parametrize("stage", SMALL)
def test_batches_are_of_the_training_split_in_the_stages_world(config, run, tmp_path, asked, stage):
    recipe = stages.STAGES[stage].make(config, run, world=HARD, batch_size=4, **SMALL[stage])
    recipe.batch(torch.Generator().manual_seed(0))
    assert set(asked) == {("train", HARD)}


@pytest.mark.parametrize("stage", ["unet", "edges", "inpaint"])
def test_losses_of_reports_are_of_the_test_split(config, run, asked, stage):
    recipe = stages.STAGES[stage].make(config, run, world=HARD, batch_size=4, **SMALL[stage])
    asked.clear()
    network = stages.load_trained_unet(config, run) if stage == "unet" else recipe.model
    losses = {"unet": "shuffled_caption_losses", "edges": "shuffled_hint_losses",
              "inpaint": "shuffled_conditioning_losses"}[stage]
    getattr(recipe, losses)(network, count=2)
    assert asked == [("test", HARD)] * 2


def test_figures_are_of_the_test_split(config, run, asked, tmp_path):
    vae = stages.load_trained_vae(config, run)
    clip = stages.make_clip(config, run, batch_size=2)
    encoders, tokenizer = clip.model, clip.tokenizer
    for measure in (
        lambda: stages.make_vae(config, run, world=HARD).report(vae, tmp_path, 1),
        lambda: validation_prompts(4, HARD),
        lambda: retrieval_accuracy(encoders, tokenizer, count=3, world=HARD),
        lambda: hard_negative_accuracy(encoders, tokenizer, count=3, world=HARD),
        lambda: relation_accuracy(encoders, tokenizer, count=3, world=HARD),
        lambda: card.autoencoder_psnr(vae, count=3, world=HARD),
        lambda: card.autoencoder_by_size(vae, count=1, world=HARD),
        lambda: card.image_to_text_accuracy(encoders, tokenizer, [np.zeros((128, 128, 3), np.uint8)], ["a cat"],
                                            others=3, world=HARD),
    ):
        asked.clear()
        measure()
        assert {split for split, _ in asked} == {"test"} and asked.count(("test", HARD)) >= 3


def test_the_scaling_factor_and_the_tokenizer_are_of_the_training_split(config, run, asked, tmp_path):
    measure_scaling_factor(stages.load_trained_vae(config, run), count=16)
    assert len(asked) >= 16 and set(asked) == {("train", FULL)}
    asked.clear()
    stages.train_tokenizer(config, tmp_path, captions=5)
    assert asked == [("train", WORLDS["rich-full"])] * 5


def test_a_card_tells_drawn_images_from_real_scenes(config, run, monkeypatch, tmp_path):
    """The choice among captions is of what the U-Net draws, then of the prompts' own scenes through the autoencoder."""
    prompts, seen = validation_prompts(3, CORE), []
    for name in ("retrieval_accuracy", "autoencoder_psnr", "autoencoder_by_size", "reconstruction_under_noise"):
        monkeypatch.setattr(card, name, lambda *_: {}, raising=False)
    monkeypatch.setattr(card, "image_to_text_accuracy", lambda clip, tokenizer, images, prompts, world:
                        seen.append((np.stack(list(images)), list(prompts), world)) or float(len(seen)))
    monkeypatch.setattr(UNetRecipe, "shuffled_caption_losses", lambda *_: {})
    parts, figures, images = card.measure(config, run, prompts, CORE)
    (drawn, asked_for, world), (through, captions, same) = seen
    assert np.array_equal(drawn, np.stack(images)) and asked_for == prompts and world == same == CORE
    assert captions == prompts[1:]                              # the first prompt is no scene's
    real = [scene_of_seed(seed, "test", CORE) for seed in range(2)]
    assert [one.caption for one in real] == captions
    wanted = card.to_images(torch.cat([parts.vae.decode(parts.vae.encode(card.to_tensor([one.image])).mode())
                                       for one in real]))
    assert np.array_equal(through, wanted)
    assert [value for name, value in figures.items() if "prompts" in name] == [1.0, 2.0]
