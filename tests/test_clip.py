"""CLIP's encoders: equal to transformers' on the same weights, and true to what they promise."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from sdlearn.clip import CLIP, ImageEncoder, TextEncoder, contrastive_loss, quick_gelu, similarity_logits
from sdlearn.config import PRESETS, TextConfig, VisionConfig

KEYS = json.loads((Path(__file__).parent / "data" / "keys_vae_text.json").read_text())

TEXT = {
    "tiny": PRESETS["tiny"].text,
    "mini": PRESETS["mini"].text,
    # As in SD 1.x and 2.x in all but width: the activation, the padding, a head count that is not 2.
    "reduced_sd1": TextConfig(vocab_size=600, dim=48, layers=4, heads=3, mlp_dim=192, projection_dim=32),
    "reduced_sd2": TextConfig(vocab_size=600, dim=64, layers=3, heads=4, mlp_dim=256, projection_dim=40,
                              activation="gelu", pad_with_end=False),
}
VISION = {
    "tiny": PRESETS["tiny"].vision,
    "mini": PRESETS["mini"].vision,
    "gelu": VisionConfig(image_size=24, patch_size=8, dim=48, layers=3, heads=3, mlp_dim=96,
                         activation="gelu", projection_dim=40),
}


def text_config(config: TextConfig, **more) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.mlp_dim,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, hidden_act=config.activation,
        max_position_embeddings=config.length, projection_dim=config.projection_dim,
        **{"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1} | more)


def vision_config(config: VisionConfig) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=config.dim, intermediate_size=config.mlp_dim, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, hidden_act=config.activation, image_size=config.image_size,
        patch_size=config.patch_size, projection_dim=config.projection_dim)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Larger weights, biases that are not 0 and norms that are not 1: every parameter shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def sentences(config: TextConfig, length: int, batch: int = 4) -> torch.Tensor:
    """Random ids (batch, length): start, words of different numbers, end, and the config's padding."""
    start, end = config.vocab_size - 2, config.vocab_size - 1
    ids = torch.randint(1, start, (batch, length))
    ids[:, 0] = start
    for row in range(batch):
        words = row * (length - 2) // max(batch - 1, 1)     # from an empty sentence to a full one
        ids[row, words + 1] = end
        ids[row, words + 2:] = end if config.pad_with_end else 0
    return ids


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return randomise(TextEncoder(TEXT["tiny"]))


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    return randomise(CLIP(PRESETS["tiny"].text, PRESETS["tiny"].vision))


# --- parity -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("length", [77, 12])
@torch.no_grad()
def test_text_encoder_equal_to_transformers(name, length):
    config = TEXT[name]
    theirs = randomise(CLIPTextModel(text_config(config)))
    ours = TextEncoder(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids = sentences(config, length)
    expected = theirs(ids, output_hidden_states=True)
    last = ours(ids)
    assert difference(last.hidden, expected.last_hidden_state) < 1e-5
    assert difference(last.pooled, expected.pooler_output) < 1e-5
    assert difference(ours(ids, end=config.vocab_size - 1).pooled, expected.pooler_output) < 1e-5
    before = ours(ids, layer=-2)
    assert difference(before.pre_norm, expected.hidden_states[-2]) < 1e-5
    assert difference(before.hidden, theirs.final_layer_norm(expected.hidden_states[-2])) < 1e-5


@pytest.mark.parametrize("name", VISION)
@torch.no_grad()
def test_vision_encoder_equal_to_transformers(name):
    config = VISION[name]
    theirs = randomise(CLIPVisionModel(vision_config(config)))
    ours = ImageEncoder(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pixels = torch.rand(3, 3, config.image_size, config.image_size) * 2 - 1
    expected, output = theirs(pixels), ours(pixels)
    assert difference(output.hidden, expected.last_hidden_state) < 1e-5
    assert difference(output.pooled, expected.pooler_output) < 1e-5


def clip_pair(text: TextConfig, vision: VisionConfig) -> tuple[CLIP, CLIPModel]:
    theirs = randomise(CLIPModel(CLIPConfig(
        text_config=text_config(text).to_dict(), vision_config=vision_config(vision).to_dict(),
        projection_dim=text.projection_dim)))
    ours = CLIP(text, vision)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs


@pytest.mark.parametrize("text, vision", [("tiny", "tiny"), ("mini", "mini"), ("reduced_sd2", "gelu")])
def test_clip_logits_loss_and_gradients_equal_to_transformers(text, vision):
    text, vision = TEXT[text], VISION[vision]
    ours, theirs = clip_pair(text, vision)
    ids, pixels = sentences(text, 20), torch.rand(4, 3, vision.image_size, vision.image_size) * 2 - 1
    expected = theirs(input_ids=ids, pixel_values=pixels, return_loss=True)
    images, texts = ours(pixels, ids)
    assert difference(images, expected.image_embeds) < 1e-5
    assert difference(texts, expected.text_embeds) < 1e-5
    assert difference(similarity_logits(images, texts, ours.logit_scale), expected.logits_per_image) < 1e-5
    loss = contrastive_loss(images, texts, ours.logit_scale)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    scale = max(float(g.abs().max()) for g in gradients.values())
    for name, parameter in ours.named_parameters():
        assert float((parameter.grad - gradients[name]).abs().max()) < 1e-4 * scale, name


@pytest.mark.parametrize("preset, keys, count", [
    ("sd15", "t1", 123_060_480), ("sd2_base", "t2", 340_387_840),
])
def test_full_size_text_encoders_are_stable_diffusions(preset, keys, count):
    with torch.device("meta"):
        model = TextEncoder(PRESETS[preset].text)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == dict(KEYS[keys])
    assert sum(p.numel() for p in model.parameters()) == count
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_full_size_clip_is_vit_l_14():
    config = PRESETS["sd15"]
    with torch.device("meta"):
        ours = CLIP(config.text, config.vision)
        theirs = CLIPModel(CLIPConfig(
            text_config=text_config(config.text).to_dict(),
            vision_config=vision_config(config.vision).to_dict(), projection_dim=768))
    assert ({name: tensor.shape for name, tensor in ours.state_dict().items()}
            == {name: tensor.shape for name, tensor in theirs.state_dict().items()})
    assert sum(p.numel() for p in ours.parameters()) == 427_616_513     # as counted for OpenAI's ViT-L/14


def test_quick_gelu_is_near_gelu_but_not_gelu():
    x = torch.linspace(-5, 5, 101)
    assert 0.01 < float((quick_gelu(x) - F.gelu(x)).abs().max()) < 0.03


# --- the text encoder ---------------------------------------------------------------------------------

@given(place=st.integers(1, 19), other=st.integers(0, 599))
@settings(max_examples=40)
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(encoder, place, other):
    torch.manual_seed(place)
    ids = sentences(encoder.config, 20)
    changed = ids.clone()
    changed[:, place] = torch.where(ids[:, place] == other, (other + 1) % 600, other)
    before, after = encoder(ids).hidden, encoder(changed).hidden
    torch.testing.assert_close(after[:, :place], before[:, :place], rtol=1e-5, atol=1e-5)
    assert (after[:, place:] - before[:, place:]).abs().amax(dim=(1, 2)).min() > 1e-3


@given(length=st.integers(1, 77))
@settings(max_examples=25)
@torch.no_grad()
def test_a_shorter_row_is_the_beginning_of_a_longer_one(encoder, length):
    torch.manual_seed(length)
    ids = sentences(encoder.config, 77)
    short, full = encoder(ids[:, :length]), encoder(ids)
    torch.testing.assert_close(short.hidden, full.hidden[:, :length], rtol=1e-5, atol=1e-5)


@given(padding=st.lists(st.integers(0, 597), max_size=10))
@settings(max_examples=40)
@torch.no_grad()
def test_what_stands_behind_the_end_does_not_change_pooled(encoder, padding):
    start, end = 598, 599
    sentence = [start, 5, 9, 2, end]
    alone = encoder(torch.tensor([sentence])).pooled
    for behind in (padding, [end] * len(padding)):
        ids = torch.tensor([sentence + behind])
        torch.testing.assert_close(encoder(ids).pooled, alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder(ids, end=end).pooled, alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pooled_is_hidden_at_the_first_end(encoder):
    ids = torch.tensor([[598, 7, 599, 599, 599], [598, 7, 8, 9, 599], [598, 599, 0, 0, 0]])
    output = encoder(ids)
    assert torch.equal(output.pooled, output.hidden[torch.arange(3), torch.tensor([2, 4, 1])])


@torch.no_grad()
def test_added_words_have_larger_ids_than_the_end():
    config = replace(TEXT["tiny"], vocab_size=603)          # three words added behind 599, the end
    theirs = randomise(CLIPTextModel(text_config(config, eos_token_id=599)))
    ours = TextEncoder(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids = torch.tensor([[598, 7, 602, 599, 599], [598, 600, 601, 4, 599]])
    expected = theirs(ids).pooler_output
    assert difference(ours(ids, end=599).pooled, expected) < 1e-5
    assert difference(ours(ids).pooled, expected) > 1e-2                # the largest id is another word
    no_end = torch.tensor([[598, 7, 602, 3, 3]])
    assert difference(ours(no_end, end=599).pooled, theirs(no_end).pooler_output) < 1e-5


@torch.no_grad()
def test_order_of_words_matters(encoder):
    one, other = torch.tensor([[598, 5, 6, 599]]), torch.tensor([[598, 6, 5, 599]])
    assert difference(encoder(one).pooled, encoder(other).pooled) > 1e-2


@torch.no_grad()
def test_layers_behind_the_chosen_one_are_not_run():
    encoder = TextEncoder(TEXT["reduced_sd1"])
    ids = sentences(encoder.config, 10)
    expected = encoder(ids, layer=-2)
    for parameter in encoder.encoder.layers[-1].parameters():
        parameter.fill_(float("nan"))
    torch.testing.assert_close(encoder(ids, layer=-2), expected)
    assert encoder(ids).hidden.isnan().all()
    torch.testing.assert_close(expected.hidden, encoder.final_layer_norm(expected.pre_norm))


def test_text_encoder_takes_both_integer_types_and_refuses_others(encoder):
    ids = sentences(encoder.config, 8)
    torch.testing.assert_close(encoder(ids.int()), encoder(ids))
    with pytest.raises(ValueError, match=r"integers \(batch, tokens\), not torch.float32 \(4, 8\)"):
        encoder(ids.float())
    with pytest.raises(ValueError, match=r"not torch.int64 \(8,\)"):
        encoder(ids[0])


def test_too_many_tokens(encoder):
    with pytest.raises(ValueError, match="78 tokens are too many.*77: truncate the prompt"):
        encoder(torch.zeros(1, 78, dtype=torch.long))


@pytest.mark.parametrize("layer", [0, 1, -3])
def test_a_layer_that_is_not_there(encoder, layer):
    with pytest.raises(ValueError, match=f"layer {layer} is not there: choose -1, the last, to -2"):
        encoder(torch.zeros(1, 4, dtype=torch.long), layer=layer)


def test_configs_that_cannot_be_built():
    with pytest.raises(ValueError, match="unknown activation 'relu'.*quick_gelu, gelu"):
        TextEncoder(replace(TEXT["tiny"], activation="relu"))
    with pytest.raises(ValueError, match="16 channels do not split into 3 heads"):
        TextEncoder(replace(TEXT["tiny"], heads=3))
    with pytest.raises(ValueError, match="patches of 7 pixels do not tile 32"):
        ImageEncoder(replace(VISION["tiny"], patch_size=7))
    with pytest.raises(ValueError, match="text projects to 16 channels, vision to 24"):
        CLIP(TEXT["tiny"], replace(VISION["tiny"], projection_dim=24))


# --- the image encoder -------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 3, 24, 32), (1, 3, 64, 64), (1, 4, 32, 32), (3, 32, 32)])
def test_images_of_another_size(clip, shape):
    with pytest.raises(ValueError, match=r"must be \(batch, 3, 32, 32\).*resize") as caught:
        clip.encode_image(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@torch.no_grad()
def test_every_patch_reaches_pooled(clip):
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    pooled = clip.vision_model(pixels).pooled
    for y in range(0, 32, 8):
        for x in range(0, 32, 8):
            changed = pixels.clone()
            changed[..., y:y + 8, x:x + 8] *= -1
            assert difference(clip.vision_model(changed).pooled, pooled) > 1e-4


# --- the space that both share ----------------------------------------------------------------------

@torch.no_grad()
def test_embeddings_are_unit_vectors(clip):
    images, texts = clip(torch.rand(3, 3, 32, 32), sentences(clip.text_model.config, 9, batch=5))
    assert images.shape == (3, 16) and texts.shape == (5, 16)
    for vectors in (images, texts):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
    assert similarity_logits(images, texts, clip.logit_scale).shape == (3, 5)


def test_a_fresh_scale_is_one_over_the_temperature(clip):
    assert math.exp(clip.logit_scale.item()) == pytest.approx(1 / 0.07, rel=1e-5)


@given(batch=st.integers(1, 8), log_scale=st.floats(-2, 8))
def test_contrastive_loss_is_symmetric_infonce(batch, log_scale):
    torch.manual_seed(batch)
    images = F.normalize(torch.randn(batch, 6), dim=-1)
    texts = F.normalize(torch.randn(batch, 6), dim=-1)
    scale = min(math.exp(log_scale), 100)
    expected = 0.0
    for i in range(batch):
        right = images[i] @ texts[i]
        row = sum(math.exp(scale * (images[i] @ texts[j] - right)) for j in range(batch))
        column = sum(math.exp(scale * (images[j] @ texts[i] - right)) for j in range(batch))
        expected += (math.log(row) + math.log(column)) / (2 * batch)
    loss = contrastive_loss(images, texts, torch.tensor(log_scale)).item()
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert contrastive_loss(texts, images, torch.tensor(log_scale)).item() == pytest.approx(loss, abs=1e-4)


def test_contrastive_loss_knows_chance_and_certainty():
    scale = torch.tensor(math.log(100))
    same = F.normalize(torch.ones(8, 4), dim=-1)
    assert contrastive_loss(same, same, scale).item() == pytest.approx(math.log(8), rel=1e-5)
    each = torch.eye(8)
    assert contrastive_loss(each, each, scale).item() < 1e-6
    assert contrastive_loss(each, each.roll(1, dims=0), scale).item() == pytest.approx(100, rel=1e-4)


def test_the_scale_stays_at_or_below_100():
    at_limit = similarity_logits(torch.eye(4), torch.eye(4), torch.tensor(math.log(100)))
    beyond = similarity_logits(torch.eye(4), torch.eye(4), torch.tensor(50.0))
    torch.testing.assert_close(beyond, at_limit)
    assert beyond.max().item() == pytest.approx(100, rel=1e-5)


def test_logits_keep_float32_under_autocast():
    images, texts = F.normalize(torch.randn(4, 6), dim=-1), F.normalize(torch.randn(4, 6), dim=-1)
    plain = similarity_logits(images, texts, torch.tensor(4.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity_logits(images, texts, torch.tensor(4.0)), plain)


def test_contrastive_loss_refuses_what_is_no_pairs():
    with pytest.raises(ValueError, match=r"pairs of one width.*\(4, 6\) and \(3, 6\)"):
        contrastive_loss(torch.zeros(4, 6), torch.zeros(3, 6), torch.tensor(1.0))
    with pytest.raises(ValueError, match="pairs of one width"):
        contrastive_loss(torch.zeros(6), torch.zeros(6), torch.tensor(1.0))


@pytest.mark.parametrize("part", ["text_model", "vision_model"])
def test_fresh_layers_add_little_to_the_residual_stream(part):
    config = PRESETS["mini"]
    encoder = getattr(CLIP(config.text, config.vision), part)
    dim, layers = encoder.config.dim, encoder.config.layers
    for layer in encoder.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            assert linear.weight.std().item() == pytest.approx((2 * layers * dim) ** -0.5, rel=0.05)
            assert not linear.bias.any()


def test_fresh_encoders_learn_eight_pairs():
    """The random weights an encoder begins with let it learn: eight captions for eight plain colours."""
    torch.manual_seed(0)
    clip = CLIP(PRESETS["tiny"].text, PRESETS["tiny"].vision)
    ids = torch.tensor([[598, word, 599] for word in range(8)])
    colours = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
    pixels = colours[:, :, None, None].expand(8, 3, 32, 32)
    optimizer = torch.optim.Adam(clip.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = contrastive_loss(*clip(pixels, ids), clip.logit_scale)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 < math.log(8)      # chance is log 8 = 2.08
