"""What is added to a model, and written in its prompts: LoRAs, words, weights, prompts past 77 tokens."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from models import EPSILON, one_thread, tiny_parts  # noqa: F401

from sdlearn.checkpoint import CheckpointError, load_folder, save_folder
from sdlearn.checkpoint.embedding import save_embedding
from sdlearn.checkpoint.lora import save_lora
from sdlearn.finetune import Embedding, LoRA, LowRank, new_lora
from sdlearn.pipeline import LongPromptWarning, SettingsError, StableDiffusion, UnknownWordWarning

PROMPT = "a red apple to the left of a cat"


@pytest.fixture
def model():
    return StableDiffusion(tiny_parts(EPSILON))


def arrays(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


def lora_for(model, seed=0, text=True) -> LoRA:
    lora = new_lora(model.unet, model.text_encoder if text else None, rank=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    filled = [{name: LowRank(layer.down, torch.randn(layer.up.shape, generator=generator), 2.0)
               for name, layer in part.items()} for part in (lora.unet, lora.text_encoder)]
    return LoRA(*filled)


# --- LoRA -------------------------------------------------------------------------------------------

def test_a_lora_changes_the_image_and_leaves_no_trace(model, tmp_path):
    before = {name: tensor.clone() for module in (model.unet, model.text_encoder)
              for name, tensor in module.state_dict().items()}
    plain = arrays(model.text2img(PROMPT, num_inference_steps=3))
    first = model.add_lora(save_lora(tmp_path / "a.safetensors", lora_for(model)), strength=0.7)
    with_one = arrays(model.text2img(PROMPT, num_inference_steps=3))
    second = model.add_lora(lora_for(model, seed=1))
    with_two = arrays(model.text2img(PROMPT, num_inference_steps=3))
    assert np.abs(with_one - plain).max() > 8 and np.abs(with_two - with_one).max() > 8
    model.remove_lora(first)
    model.remove_lora(second)
    assert np.array_equal(arrays(model.text2img(PROMPT, num_inference_steps=3)), plain)
    assert all(torch.equal(before[name], tensor) for module in (model.unet, model.text_encoder)
               for name, tensor in module.state_dict().items())
    with pytest.raises(SettingsError, match="not merged"):
        model.remove_lora(first)


@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "peft"])
def test_a_lora_gives_the_images_that_diffusers_gives(model, tmp_path, spelling):
    """Read by diffusers through peft, in the U-Net and in the text encoder, at part of its strength."""
    folder = save_folder(tmp_path / "tiny", model.parts)
    file = save_lora(tmp_path / "lora.safetensors", lora_for(model), spelling=spelling)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    given = {"latents": noise, "num_inference_steps": 5, "guidance_scale": 4.0, "output_type": "np"}
    plain = pipe(PROMPT, **given).images
    pipe.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="ours")
    pipe.set_adapters(["ours"], adapter_weights=[0.7])
    theirs = pipe(PROMPT, **given).images
    assert np.abs(theirs - plain).max() > 0.05
    model.add_lora(file, strength=0.7)
    ours = model.text2img(PROMPT, latent=noise, num_inference_steps=5, guidance_scale=4.0, sampler="ddim")
    assert np.abs(arrays(ours) / 255 - theirs).max() < 1 / 255


def test_a_merged_lora_is_saved_with_the_model(model, tmp_path):
    model.add_lora(lora_for(model))
    image = arrays(model.text2img(PROMPT, num_inference_steps=3))
    again = StableDiffusion(load_folder(save_folder(tmp_path / "merged", model.parts)))
    assert np.array_equal(arrays(again.text2img(PROMPT, num_inference_steps=3)), image)


def test_an_exchanged_unet_begins_without_loras(model):
    lora = model.add_lora(lora_for(model))
    model.unet = tiny_parts(EPSILON).unet
    assert model.loras.strengths == {}
    with pytest.raises(SettingsError, match="not merged"):
        model.remove_lora(lora)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_replaced_part_has_no_loras_and_takes_new_ones(model, part):
    """A U-Net or a text encoder; the other part, which stays, keeps the LoRA in its weights."""
    lora = model.add_lora(lora_for(model))
    setattr(model, part, getattr(tiny_parts(EPSILON), part))
    assert model.loras.strengths == {}
    with pytest.raises(SettingsError, match="not merged"):
        model.remove_lora(lora)
    before = {name: tensor.clone() for name, tensor in getattr(model, part).state_dict().items()}
    model.add_lora(lora)
    assert not all(torch.equal(before[name], tensor) for name, tensor in getattr(model, part).state_dict().items())
    model.remove_lora(lora)
    assert all(torch.equal(before[name], tensor) for name, tensor in getattr(model, part).state_dict().items())


def test_loras_stay_known_while_no_part_is_replaced(model):
    lora = model.add_lora(lora_for(model), 0.5)
    model.vae = tiny_parts(EPSILON).vae
    assert model.loras.strengths == {lora: 0.5}


def test_a_lora_is_added_at_full_strength_by_default(model):
    plain = arrays(model.text2img(PROMPT, num_inference_steps=3))
    lora = model.add_lora(lora_for(model))
    default = arrays(model.text2img(PROMPT, num_inference_steps=3))
    model.add_lora(lora, 1.0)
    assert np.array_equal(arrays(model.text2img(PROMPT, num_inference_steps=3)), default)
    model.add_lora(lora, 0.0)
    assert np.abs(arrays(model.text2img(PROMPT, num_inference_steps=3)) - plain).max() <= 1


def test_a_lora_for_other_layers_is_told_and_nothing_changes(model, tmp_path):
    lora = lora_for(model, text=False)
    strange = LoRA({f"other.{name}": layer for name, layer in lora.unet.items()})
    with pytest.raises(SettingsError, match="LoRA for other layers.*other."):
        model.add_lora(strange)
    file = save_lora(tmp_path / "other.safetensors", strange)
    with pytest.raises(CheckpointError, match="other.safetensors"):
        model.add_lora(file)
    with pytest.raises(CheckpointError, match="none.safetensors is missing"):
        model.add_lora(tmp_path / "none.safetensors")
    with pytest.raises(SettingsError, match="strength is nan"):
        model.add_lora(lora, strength=float("nan"))
    assert model.loras.strengths == {}


# --- words ------------------------------------------------------------------------------------------

def toy(count=2, width=16, token="<toy>"):
    return Embedding(token, torch.randn(count, width, generator=torch.Generator().manual_seed(4)))


def test_a_learned_word_can_be_written_in_prompts(model, tmp_path):
    plain = arrays(model.text2img(PROMPT, num_inference_steps=3))
    word = model.add_embedding(save_embedding(tmp_path / "toy.safetensors", toy()))
    assert word == "<toy>"
    with warnings.catch_warnings():
        warnings.simplefilter("error")              # the word is not an unknown one
        there = arrays(model.text2img("a red <TOY> to the left of a cat", num_inference_steps=3))
    assert np.abs(there - plain).max() > 8
    assert np.array_equal(arrays(model.text2img(PROMPT, num_inference_steps=3)), plain)
    with pytest.warns(UnknownWordWarning, match="'castle'"):
        model.text2img("a <toy> castle", num_inference_steps=1)


def test_a_learned_word_takes_the_name_that_is_given(model, tmp_path):
    """The user's, of an embedding in memory and of a file; its own name is then no word of the model."""
    named = StableDiffusion(tiny_parts(EPSILON))
    named.add_embedding(toy())
    wanted = arrays(named.text2img("a <toy> cat", num_inference_steps=3))
    for i, source in enumerate((toy(), save_embedding(tmp_path / "toy.safetensors", toy()))):
        assert model.add_embedding(source, f"<mine-{i}>") == f"<mine-{i}>"
        assert np.array_equal(arrays(model.text2img(f"a <mine-{i}> cat", num_inference_steps=3)), wanted)
    with pytest.warns(UnknownWordWarning, match="'toy'"):
        assert not np.array_equal(arrays(model.text2img("a <toy> cat", num_inference_steps=3)), wanted)


def test_a_learned_word_gives_the_images_that_diffusers_gives(model, tmp_path):
    folder = save_folder(tmp_path / "tiny", model.parts)
    file = save_embedding(tmp_path / "toy.safetensors", toy())
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_textual_inversion(str(file))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    model.add_embedding(file)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = pipe("a red <toy> on a tree", latents=noise, num_inference_steps=5, guidance_scale=4.0,
                  output_type="np").images
    ours = model.text2img("a red <toy> on a tree", latent=noise, num_inference_steps=5, guidance_scale=4.0,
                          sampler="ddim")
    assert np.abs(arrays(ours) / 255 - theirs).max() < 1 / 255


def test_a_model_with_a_learned_word_is_saved_whole(model, tmp_path):
    model.add_embedding(toy())
    image = arrays(model.text2img("a <toy> cat", num_inference_steps=3))
    again = StableDiffusion(load_folder(save_folder(tmp_path / "toy", model.parts)))
    assert np.array_equal(arrays(again.text2img("a <toy> cat", num_inference_steps=3)), image)


@pytest.mark.parametrize("embedding, told", [
    (toy(width=24), "24 wide.*takes 16"), (toy(token="cat"), "cat"),
    (Embedding("<bad>", torch.full((1, 16), float("inf"))), "not finite"),
], ids=["width", "known", "infinite"])
def test_words_that_cannot_be_are_told(model, embedding, told):
    vocabulary = model.tokenizer.vocab_size
    with pytest.raises(SettingsError, match=told):
        model.add_embedding(embedding)
    assert model.tokenizer.vocab_size == vocabulary
    assert len(model.text_encoder.embeddings.token_embedding.weight) == model.text_encoder.config.vocab_size


# --- prompts ----------------------------------------------------------------------------------------

def test_weights_in_a_prompt_are_heard_and_plain_parentheses_are_not(model):
    plain = arrays(model.text2img(PROMPT, num_inference_steps=3))
    assert np.array_equal(arrays(model.text2img("a (red:1.0) apple to the left of a cat", num_inference_steps=3)),
                          plain)
    more = arrays(model.text2img("a (red apple:1.6) to the left of a cat", num_inference_steps=3))
    assert np.abs(more - plain).max() > 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")              # neither the number nor the sign is an unknown word
        model.text2img("a (red:1.35) apple", num_inference_steps=1)
    with pytest.raises(SettingsError, match="weight 100"):
        model.text2img("a (red:100) apple", num_inference_steps=1)


def test_a_long_prompt_is_heard_to_its_end_in_chunks(model):
    start = "a red apple " * 30
    with pytest.warns(LongPromptWarning, match='long_prompts="chunks"'):
        cut = [arrays(model.text2img(start + end, num_inference_steps=3)) for end in ("cat", "star")]
    assert np.array_equal(*cut)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = [arrays(model.text2img(start + end, num_inference_steps=3, long_prompts="chunks"))
                 for end in ("cat", "star")]
    assert np.abs(whole[0] - whole[1]).max() > 2
    assert model.encode([start, ""], long="chunks").shape[:2] == (2, 2 * 77)


def test_long_prompts_in_chunks_give_the_images_that_diffusers_gives(model, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(save_folder(tmp_path / "tiny", model.parts), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    prompt = "a red apple and a blue star " * 14
    with torch.no_grad():
        embeds, negative = model.encode([prompt, "two cars"], long="chunks")[:, None]
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, latents=noise, num_inference_steps=5,
                  guidance_scale=4.0, output_type="np").images
    ours = model.text2img(prompt, "two cars", latent=noise, num_inference_steps=5, guidance_scale=4.0, sampler="ddim",
                          long_prompts="chunks")
    assert np.abs(arrays(ours) / 255 - theirs).max() < 1 / 255


def test_guidance_in_an_interval_runs_one_half_outside_of_it(model, monkeypatch):
    batches, forward = [], model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda x, *rest, **options:
                        batches.append(rest[1].shape[0]) or forward(x, *rest, **options))
    model.text2img(PROMPT, num_inference_steps=4, sampler="ddim",
                   guidance_interval=(200, 600))        # at 751, 501, 251, 1
    assert batches == [1, 2, 2, 1]
