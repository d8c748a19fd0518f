"""The cache of latents holds the scenes that its seeds name, never the same twice, and is regenerated when what it was
made from has changed."""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from models import one_thread, tiny_parts  # noqa: F401
from recipes import scene_config

from sdlearn.data import CORE, draw_scene
from sdlearn.tokenizer import Tokenizer
from sdlearn.training.unet import LatentCache, UNetRecipe, encode_scenes, shuffled_caption_losses


@pytest.fixture(scope="module")
def parts():
    return tiny_parts(config=scene_config())


def make(parts, folder, *, vae=None, text=None, tokenizer=None, **options):
    options = {"world": CORE, "image_size": 128, "capacity": 7, "first": 0} | options
    return LatentCache(folder, vae or parts.vae, text or parts.text_encoder, tokenizer or parts.tokenizer, **options)


def holds(cache, seeds, parts):
    """Whether row i holds the scene of seeds[i]."""
    drawn = [draw_scene(seed, world=CORE) for seed in seeds]
    wanted = encode_scenes(drawn, parts.vae, parts.text_encoder, parts.tokenizer)
    found = cache.take(np.arange(len(seeds)))
    return all(torch.allclose(one, another, atol=0.01) for one, another in zip(found, wanted, strict=True))


@pytest.mark.parametrize("offset", [0, 3 * 10**9])
def test_rows_hold_the_scenes_of_their_seeds_and_no_seed_comes_twice(parts, tmp_path, offset):
    """Refreshed past its capacity, and taken up again in between: the oldest rows are replaced by the next seeds."""
    cache, made = make(parts, tmp_path, offset=offset), 0
    for count in (4, 3, 5, 7, 1):
        cache.refresh(count)
        made += count
        wanted = {seed % 7: offset + seed for seed in range(made)}              # by row, the newest last
        rows = np.arange(len(cache))
        assert cache.seeds(rows).tolist() == [wanted[row] for row in rows.tolist()]
        assert holds(cache, list(wanted.values()), parts)
        for array in cache.arrays.values():
            array.flush()
        cache = make(parts, tmp_path, offset=offset)
        assert cache.meta["made"] == made


def test_processes_learn_from_scenes_of_their_own(parts, tmp_path, monkeypatch):
    seen, recipes = [], []
    for process in (0, 1, 2):
        monkeypatch.setitem(vars(PartialState()), "process_index", process)
        recipe = UNetRecipe(parts.config, parts.vae, parts.text_encoder, parts.tokenizer, tmp_path, batch_size=2,
                            fresh=2, first=0, capacity=4)
        for _ in range(3):
            recipe.batch(torch.Generator().manual_seed(0))
        seen.append(recipe.cache.seeds(np.arange(4)).tolist())
        recipes.append(recipe)
    for recipe, seeds in zip(recipes, seen, strict=True):
        assert holds(recipe.cache, seeds, parts), "none writes into another's cache"
    assert len({seed for seeds in seen for seed in seeds}) == 12 and sorted(seen[0]) == [2, 3, 4, 5]


def changed(module, name):
    other = deepcopy(module)
    with torch.no_grad():
        other.get_parameter(name).view(-1)[-1] += 0.01
    return other


def changes(parts):
    """What latents and text features depend on, each changed a little, by name."""
    texts = [*(draw_scene(seed).caption for seed in range(20))]
    return {
        "first layer of the autoencoder": {"vae": changed(parts.vae, "encoder.conv_in.weight")},
        "last layer of the encoder": {"vae": changed(parts.vae, "encoder.conv_out.bias")},
        "token embedding": {"text": changed(parts.text_encoder, "embeddings.token_embedding.weight")},
        "last norm of the text encoder": {"text": changed(parts.text_encoder, "final_layer_norm.bias")},
        "vocabulary": {"tokenizer": Tokenizer.train(texts, parts.tokenizer.vocab_size - 5)},
        "world": {"world": replace(CORE, pair=0.0)}, "capacity": {"capacity": 8},
    }


def test_a_cache_is_regenerated_when_anything_that_it_depends_on_has_changed(parts, tmp_path):
    cache = make(parts, tmp_path)
    cache.refresh(3)
    stored = cache.meta_file.read_text()
    assert make(parts, tmp_path).meta["made"] == make(parts, tmp_path, vae=deepcopy(parts.vae)).meta["made"] == 3
    for what, options in changes(parts).items():
        assert make(parts, tmp_path, **options).meta["made"] == 0, what
        assert cache.meta_file.read_text() == stored
        cache = make(parts, tmp_path)               # its rows were overwritten by the other's empty ones
        cache.refresh(3)
        assert json.loads(cache.meta_file.read_text())["made"] == 3


def test_a_cache_is_regenerated_when_captions_are_worded_in_another_way(parts, tmp_path, monkeypatch):
    make(parts, tmp_path).refresh(3)
    monkeypatch.setattr("sdlearn.data.captions.OPENINGS", ("a view of ",))
    assert make(parts, tmp_path).meta["made"] == 0


def test_the_shuffled_caption_gap_of_a_run_is_of_unseen_scenes(parts, tmp_path):
    """Of the test split in the run's world, whatever the run has learnt from."""
    recipe = UNetRecipe(parts.config, parts.vae, parts.text_encoder, parts.tokenizer, tmp_path, first=0, capacity=4)
    drawn = [draw_scene(seed, "test", CORE) for seed in range(3)]
    wanted = shuffled_caption_losses(parts.unet, recipe.schedule,
                                     *encode_scenes(drawn, parts.vae, parts.text_encoder, parts.tokenizer))
    assert recipe.shuffled_caption_losses(parts.unet, count=3) == pytest.approx(wanted, rel=1e-5)
    assert wanted["right@700"] != wanted["wrong@700"]
