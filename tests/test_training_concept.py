"""One new thing, taught at full length: two stages of training, stored beside the base that alone can use them."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from models import one_thread  # noqa: F401
from recipes import scene_config, untrained_base

from sdlearn.checkpoint import CheckpointError, Parts, load_folder, save_folder
from sdlearn.checkpoint.shipped import CONCEPT, INFO_FILE, LORA_FILE, WORD_FILE, Concept, load_concept, save_concept
from sdlearn.finetune import Embedding, new_lora
from sdlearn.images import to_tensor
from sdlearn.pipeline import StableDiffusion
from sdlearn.training import adapters, concept, stages
from sdlearn.training.loop import fit, load_state, save_state


@pytest.fixture(scope="module")
def config():
    return scene_config()


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    return untrained_base(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def recipes(config, run):
    """Both stages' recipes, for tests that leave them as they are."""
    return {stage: stages.STAGES[stage].make(config, run) for stage in stages.CONCEPTS}


@pytest.fixture
def model(config, run, tmp_path):
    """The folder of a model that the run's base is."""
    vae, text, tokenizer, _ = stages.load_frozen_parts(config, run)
    parts = Parts(replace(config, vision=None, vae=vae.config), tokenizer, text, vae,
                  stages.load_trained_unet(config, run))
    return save_folder(tmp_path / "model", parts, dtype=torch.float16)


@pytest.mark.parametrize("stage", ["word", "lora"])
def test_what_learns_learns_and_everything_else_keeps_its_bits(config, run, stage):
    recipe = stages.STAGES[stage].make(config, run)
    frozen = {name: value.clone() for part in (recipe.unet, recipe.text_encoder, recipe.vae)
              for name, value in part.state_dict().items()}
    batch = recipe.batch(torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(recipe.model.parameters(), lr=3e-2)
    losses = []
    for _ in range(30):
        loss, _ = recipe.loss(recipe.model, *batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1e-4
    for part in (recipe.unet, recipe.text_encoder, recipe.vae):
        assert all(torch.equal(value, frozen[name]) for name, value in part.state_dict().items())
    assert all(one.grad is None for part in (recipe.unet, recipe.text_encoder) for one in part.parameters())
    figures, pixels, prompts = recipe.looked_at(recipe.model, count=1)
    assert set(figures) == {"fidelity", "fidelity elsewhere", "class kept"} and len(pixels) == len(prompts) == 3
    assert all(0 <= value <= 1 for value in figures.values())


def test_half_of_a_loras_images_are_of_the_class(recipes):
    recipe = recipes["lora"]
    seen = recipe.rows(torch.Generator().manual_seed(0))
    assert (seen < concept.TAUGHT).sum() == (seen >= concept.TAUGHT).sum() == recipe.batch_size // 2
    said = [recipe.caption(row) for row in seen.tolist()]
    assert sum(concept.RARE in caption for caption in said) == recipe.batch_size // 2
    assert all(concept.CLASS in caption for caption in said)
    assert len(recipe.latents) == concept.TAUGHT + concept.PRIOR
    word = recipes["word"]
    assert len(word.latents) == concept.TAUGHT and concept.WORD in word.caption(0)
    assert concept.RARE not in word.caption(0)
    assert torch.equal(word.latents, recipe.latents[:concept.TAUGHT])


@pytest.mark.parametrize("stage", ["word", "lora"])
@pytest.mark.parametrize("draws, high", [
    (lambda learnt, background: concept.THING if learnt else concept.CLASS, {"fidelity", "fidelity elsewhere",
                                                                             "class kept"}),
    (lambda learnt, background: concept.CLASS, {"class kept"}),
    (lambda learnt, background: concept.THING, {"fidelity", "fidelity elsewhere"}),
    (lambda learnt, background: concept.THING if learnt and background == concept.GROUND else concept.CLASS,
     {"fidelity", "class kept"}),
], ids=["all learnt", "nothing learnt", "class forgotten", "learnt on one background alone"])
def test_figures_tell_what_was_learnt_and_what_was_forgotten(recipes, monkeypatch, stage, draws, high):
    """Images of what a model would draw, which knows the new thing and the class or takes one for the other."""
    recipe = recipes[stage]

    def drawn(prompts):
        shown = []
        for seed, prompt in enumerate(prompts):
            [background] = [word for word in (concept.GROUND, concept.ELSEWHERE) if word in prompt]
            name = draws(recipe.words in prompt, background)
            shown.append(concept.make_scenes(name, 1, 10 * seed, background)[0].image)
        return to_tensor(shown)

    monkeypatch.setattr(recipe, "drawn", drawn)
    figures, *_ = recipe.looked_at(recipe.model, count=2)
    assert {name for name, value in figures.items() if value > 0.85} == high
    assert all(value < 0.7 for name, value in figures.items() if name not in high)


@pytest.mark.parametrize("stage", ["word", "lora"])
def test_figures_are_of_images_that_the_averaged_weights_draw(recipes, monkeypatch, stage):
    """Not of those of the model that is being trained: drawn while the averaged ones are in place, and only then."""
    recipe = recipes[stage]
    averaged = copy.deepcopy(recipe.model)
    for value in averaged.parameters():
        torch.nn.init.normal_(value, std=0.3)

    def outputs(prompts):
        with torch.no_grad():
            context = recipe.text_encoder(recipe.tokenizer([prompts[0]])).hidden
            return recipe.unet(torch.ones(1, 4, 16, 16), torch.tensor([500]), context)

    found = []
    monkeypatch.setattr(recipe, "drawn", lambda prompts: found.append(outputs(prompts)) or torch.zeros(3, 3, 32, 32))
    *_, prompts = recipe.looked_at(averaged, count=1)
    with recipe.in_place(averaged):
        wanted = outputs(prompts)
    assert torch.equal(found[0], wanted) and not torch.equal(outputs(prompts), wanted)


def test_a_words_vectors_are_pulled_nowhere_but_by_the_loss(config, run, tmp_path):
    recipe = stages.STAGES["word"].make(config, run)
    recipe.report, recipe.loss = lambda *_: {}, lambda model, *batch: (0 * model.vectors.sum(), {})
    before = recipe.model.vectors.detach().clone()
    loop = fit(recipe, tmp_path, minutes=10, precision="no", compiled=False)
    for _ in range(3):
        next(loop)
    assert torch.equal(recipe.model.vectors, before)


def test_a_run_ships_what_it_taught_and_a_fresh_model_can_use_it(config, run, model, tmp_path):
    mine = shutil.copytree(run, tmp_path / "mine")
    assert adapters.package_concept(config, mine, model) == {} and not (model / CONCEPT).exists()
    learnt = {}
    for stage in stages.CONCEPTS:
        recipe = stages.STAGES[stage].make(config, mine, learning_rate=1e-2)
        for value in recipe.model.parameters():
            torch.nn.init.normal_(value, std=0.2)
        loop = fit(recipe, mine, minutes=10, precision="no", compiled=False)
        recipe.report = lambda *_: {}
        for _ in range(2):
            progress, _ = next(loop)
        weights = recipe.model.state_dict()
        save_state(mine / f"{stage}-state.pt", {"model": weights, "average": weights, "progress": vars(progress)})
        learnt[stage] = recipe.learnt(recipe.model)
    figures = adapters.package_adapters(config, mine, model, count=1)
    assert set(figures) == {"word", "lora"}
    found = load_concept(model)
    assert found.word.token == concept.WORD and torch.equal(found.word.vectors, learnt["word"].vectors)
    assert found.lora.unet.keys() == learnt["lora"].unet.keys() and not found.lora.text_encoder
    for name, change in learnt["lora"].unet.items():
        torch.testing.assert_close(found.lora.unet[name].delta(), change.delta())
    assert found.info["thing"] == concept.THING and found.info["lora"]["training"]["step"] == 2
    assert figures["lora"]["numbers"] == sum(one.numel() for one in found.lora.tensors())
    assert (model / CONCEPT / adapters.SHEET_FILE).exists()
    text = "\n".join(adapters.card_section(figures))
    assert "taught as" in text and f"concept/{adapters.SHEET_FILE}" in text and "| `word` |" in text

    drawn = {}
    for name in ("base", "word", "lora"):
        fresh = StableDiffusion(load_folder(model))
        if name == "word":
            assert fresh.add_embedding(found.word) == concept.WORD
        if name == "lora":
            fresh.add_lora(found.lora)
        drawn[name] = fresh.text2img(f"a {concept.WORD} on a blue background", num_inference_steps=2,
                                     seed=0)[0].tobytes()
    assert len(set(drawn.values())) == 3


def a_concept(folder):
    parts = load_folder(folder)
    lora = new_lora(parts.unet, rank=2)
    for tensor in lora.tensors():
        torch.nn.init.normal_(tensor)
    return Concept(Embedding("<new>", torch.randn(1, parts.config.text.dim)), lora, {"thing": "alien"})


def test_it_belongs_to_one_base_and_goes_with_it(config, run, model, capsys):
    with pytest.raises(CheckpointError, match="has been taught nothing new; train the stages word and lora"):
        load_concept(model)
    save_concept(model, a_concept(model))
    assert adapters.package_adapters(config, run, model, count=1) == {} and load_concept(model).info["thing"] == "alien"
    for part in ("unet", "text_encoder"):
        save_concept(model, a_concept(model))
        parts = load_folder(model)
        with torch.no_grad():
            next(getattr(parts, part).parameters()).add_(0.5)
        save_folder(model, parts, dtype=torch.float16)
        name = {"unet": "U-Net", "text_encoder": "text encoder"}[part]
        with pytest.raises(CheckpointError, match=f"another base than the one in .*: the {name} is not the same"):
            load_concept(model)
        assert adapters.package_adapters(config, run, model, count=1) == {} and not (model / CONCEPT).exists()
        assert "concept, which belongs to another base" in capsys.readouterr().out


def test_damage_is_told_in_a_sentence(model):
    save_concept(model, a_concept(model))
    place = model / CONCEPT
    for name, words in ((WORD_FILE, "word.safetensors"), (LORA_FILE, "lora.safetensors"), (INFO_FILE, "told.json")):
        whole = (place / name).read_bytes()
        (place / name).write_bytes(whole[:len(whole) // 2])
        with pytest.raises(CheckpointError, match=words):
            load_concept(model)
        (place / name).write_bytes(whole)
    (place / INFO_FILE).write_text(json.dumps(["no", "object"]))
    with pytest.raises(CheckpointError, match="told.json"):
        load_concept(model)
    (place / WORD_FILE).unlink()
    with pytest.raises(CheckpointError):
        load_concept(model)


@pytest.mark.parametrize("stage", ["word", "lora"])
def test_a_stage_goes_on_where_it_was(config, run, tmp_path, stage):
    mine, told = shutil.copytree(run, tmp_path / "mine"), []
    for _ in range(2):
        recipe = stages.STAGES[stage].make(config, mine)
        recipe.report = lambda *_: {}
        before = [one.detach().clone() for one in recipe.model.parameters()]
        loop = fit(recipe, mine, minutes=1 / 60, precision="no", compiled=False)
        told.append([progress.step for progress, _ in loop])
        assert not all(torch.equal(a, b) for a, b in zip(before, recipe.model.parameters(), strict=True))
    assert told[0][0] == 1 and told[1][0] == told[0][-1] + 1
    state = load_state(mine / f"{stage}-state.pt")
    assert state["progress"]["step"] == told[1][-1]
    again = stages.load_averaged(stages.STAGES[stage].make(config, mine).model, mine, stage)
    assert all(torch.equal(value, state["average"][name]) for name, value in again.state_dict().items())
