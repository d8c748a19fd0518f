"""A LoRA that reads one word as another: exact where texts can be told apart, and nothing to the others."""

import pytest
import torch
from models import one_thread, tiny_config, tiny_parts  # noqa: F401

from sdlearn.finetune.concept_edit import CROSS_ATTENTION_LAYERS, edit_concept
from sdlearn.finetune.lora import attach_lora
from sdlearn.pipeline import StableDiffusion

OLD, NEW, OTHERS = ["a red apple"], ["a blue apple"], ["a green cat", ""]


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(tiny_parts(config=tiny_config()))


def read(model, texts, lora=None):
    """What the first layer that reads text makes of them."""
    name = next(name for name, _ in model.unet.named_modules() if name.endswith(CROSS_ATTENTION_LAYERS))
    with torch.no_grad(), attach_lora(model.unet, {} if lora is None else lora.unet):
        return model.unet.get_submodule(name)(model.encode(texts))


def test_one_word_is_read_as_another_and_the_rest_as_before(model):
    rank, before = model.config.text.dim, read(model, OLD)
    free, held = (edit_concept(model, OLD, NEW, others, rank=rank, ridge=1e-9) for others in ([], OTHERS))

    def off(texts, lora, wanted):
        return (read(model, texts, lora) - read(model, wanted)).abs().mean().item()
    start = off(OLD, None, NEW)
    assert off(OLD, free, NEW) < 0.5 * start and off(OLD, held, NEW) < 0.7 * start
    assert off(OTHERS, held, OTHERS) < 0.5 * off(OTHERS, free, OTHERS)
    weak = edit_concept(model, OLD, NEW, OTHERS, rank=rank, ridge=1e6)
    assert (read(model, OLD, weak) - before).abs().max() < 1e-3, "held back, it changes nothing"


def test_each_of_the_other_texts_is_read_as_before(model):
    """With several of them none is left out: each is held by all together as well as by itself alone."""
    others, rank = ["", "two small green cars", "a large blue star above a tree"], model.config.text.dim
    together, none, *alone = (edit_concept(model, OLD, NEW, some, rank=rank, ridge=1e-9)
                              for some in (others, [], *([one] for one in others)))

    def moved(text, lora):
        return (read(model, [text], lora) - read(model, [text])).abs().mean().item()

    for text, own in zip(others, alone, strict=True):
        assert moved(text, together) < 0.5 * moved(text, none)
        rest = [moved(text, lora) for lora in alone if lora is not own]
        assert moved(text, together) < min(rest) and moved(text, own) < min(rest)


def test_it_changes_what_reads_the_text_and_has_the_rank(model):
    lora = edit_concept(model, OLD, NEW, [], rank=3)
    assert lora.unet and not lora.text_encoder and all(name.endswith(CROSS_ATTENTION_LAYERS) for name in lora.unet)
    assert {change.rank for change in lora.unet.values()} == {3}


@pytest.mark.parametrize("given, words", [(([], [], []), "pairs"), ((OLD, NEW * 2, []), "1 texts"),
                                          ((OLD, NEW, [], 0), "rank is 0"), ((OLD, NEW, [], 10**6), "rank is")])
def test_what_cannot_be_is_told(model, given, words):
    old, new, others, *rank = given
    with pytest.raises(ValueError, match=words):
        edit_concept(model, old, new, others, **({"rank": rank[0]} if rank else {}))
