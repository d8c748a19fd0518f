"""LoRA: low-rank changes beside the weights and in them, trained, merged, taken out, read and written."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from models import ZERO_SNR, one_thread, randomise, tiny_config, tiny_parts  # noqa: F401
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from sdlearn.attention import TokenConv
from sdlearn.checkpoint import CheckpointError, configs
from sdlearn.checkpoint.lora import load_lora, save_lora
from sdlearn.finetune import LoRA, LoRALinear, LowRank, MergedLoRAs, attach_lora, merge_weight, new_lora, train_lora
from sdlearn.finetune.lora import find_lora_layers
from sdlearn.schedule import NoiseSchedule
from sdlearn.unet import UNet

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TEXT_LAYER = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def parts():
    return tiny_parts(ZERO_SNR, vision=False)


@pytest.fixture
def unet(parts):
    return copy.deepcopy(parts.unet)


@pytest.fixture
def text(parts):
    return copy.deepcopy(parts.text_encoder)


@pytest.fixture
def model(parts, unet, text):
    return SimpleNamespace(tokenizer=parts.tokenizer, text_encoder=text, unet=unet, vae=parts.vae,
                           schedule=NoiseSchedule(ZERO_SNR))


def random_lora(unet, text=None, seed=0, rank=3, alpha=None, **targets):
    lora = new_lora(unet, text, rank=rank, alpha=alpha, seed=seed, **targets)
    generator = torch.Generator().manual_seed(seed + 100)
    for layer in (*lora.unet.values(), *lora.text_encoder.values()):
        layer.up.copy_(torch.randn(layer.up.shape, generator=generator))
    return lora


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@torch.no_grad()
def output(unet):
    generator = torch.Generator().manual_seed(7)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return unet(x.to(unet.conv_in.weight), torch.tensor([3, 700]), context.to(unet.conv_in.weight))


# --- what it is -------------------------------------------------------------------------------------

def test_a_fresh_lora_covers_attention_and_changes_no_bit(unet, text):
    lora = new_lora(unet, text)
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0")
    assert set(lora.unet) == {name for name in find_lora_layers(unet) if name.endswith(ends)}
    assert set(lora.text_encoder) == {f"encoder.layers.{i}.self_attn.{name}" for i in (0, 1)
                              for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert lora.unet[f"{BLOCK}.attn2.to_k"].down.shape == (4, 16)
    before, ids = output(unet), torch.arange(5)[None]
    hidden = text(ids).hidden
    with attach_lora(unet, lora.unet), attach_lora(text, lora.text_encoder):
        assert torch.equal(output(unet), before) and torch.equal(text(ids).hidden, hidden)
    MergedLoRAs(unet, text).add(lora)
    assert torch.equal(output(unet), before) and torch.equal(text(ids).hidden, hidden)


def test_down_is_random_by_the_seed_and_keeps_the_size_of_what_it_reads(unet):
    first, again, other = (new_lora(unet, rank=8, seed=seed).unet[f"{BLOCK}.attn2.to_k"].down for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.std() * 4 == pytest.approx(1, abs=0.3)                                 # 1 / sqrt(16 inputs)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.sampled_from([None, (1, 1), (3, 3), (3, 1)]),
       st.sampled_from([None, 1.0, 6.0]))
def test_the_delta_is_what_the_two_layers_compute_in_a_row(rank, inputs, outputs, kernel, alpha):
    kernel = kernel or ()
    change = LowRank(torch.randn(rank, inputs, *kernel), torch.randn(outputs, rank, *[1] * len(kernel)), alpha)
    x = torch.randn(2, inputs, 4, 5)
    scale = 1 if alpha is None else alpha / rank
    assert change.delta().shape == (outputs, inputs, *kernel)
    if kernel:
        wanted, found = F.conv2d(F.conv2d(x, change.down), change.up), F.conv2d(x, change.delta())
    else:
        x = x.transpose(1, -1)
        wanted, found = x @ change.down.T @ change.up.T, F.linear(x, change.delta())
    assert torch.allclose(found, scale * wanted, atol=1e-4)


@pytest.mark.parametrize("arguments, words", [
    ({"rank": 0}, "rank is 0"), ({"rank": 2.0}, "rank is 2.0"), ({"alpha": 0.0}, "alpha is 0"),
    ({"targets": ["to_q", "to_z"]}, "this UNet is called 'to_z'"), ({"targets": ["norm1"]}, "called 'norm1'"),
    ({"text_targets": ["to_q"]}, "this TextEncoder is called 'to_q'"),
])
def test_what_cannot_be_made_is_refused(unet, text, arguments, words):
    with pytest.raises(ValueError, match=words):
        new_lora(unet, text, **arguments)


# --- beside the layers, and in them -----------------------------------------------------------------

KINDS = ("to_k", "proj_in", "conv1", "conv_shortcut", "downsamplers.0.conv", "ff.net.0.proj", "conv_in")


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("target", KINDS)
def test_attached_equals_merged_for_every_kind_of_layer(target, linear):
    config = replace(tiny_config().unet, linear_projection=linear)
    unet = UNet(config)
    randomise(unet.eval(), torch.Generator().manual_seed(2))
    lora = random_lora(unet, targets=[target], alpha=2.0)
    before = output(unet)
    with attach_lora(unet, lora.unet, strength=0.7):
        beside = output(unet)
    merged = MergedLoRAs(unet, torch.nn.Identity())
    merged.add(lora, strength=0.7)
    scale = before.abs().max()
    assert (output(unet) - beside).abs().max() < 2e-6 * scale
    assert (beside - before).abs().max() > 1e-3 * scale
    merged.remove(lora)
    assert torch.equal(output(unet), before)


def test_the_kinds_are_all_there(unet):
    kinds = {type(find_lora_layers(unet)[name]) for target in KINDS for name in new_lora(unet, targets=[target]).unet}
    assert kinds == {torch.nn.Linear, torch.nn.Conv2d, TokenConv}


def test_merging_is_the_formula(unet, text):
    before = bits(unet)
    lora = random_lora(unet, text, rank=4, alpha=2.0)
    MergedLoRAs(unet, text).add(lora, strength=-0.3)
    for name, change in lora.unet.items():
        wanted = before[f"{name}.weight"] + -0.3 * 2 / 4 * change.up @ change.down
        assert torch.allclose(find_lora_layers(unet)[name].weight, wanted, rtol=0, atol=1e-6), name
    untouched = {name for name in before if name.removesuffix(".weight") not in lora.unet}
    assert all(torch.equal(unet.state_dict()[name], before[name]) for name in untouched)


def test_several_are_taken_out_in_any_order_to_the_bit(unet, text):
    """One on queries, one on queries and convolutions, one on the text: every order of removal."""
    loras = [random_lora(unet, seed=1, targets=["to_q"]), random_lora(unet, seed=2, targets=["to_q", "conv1"]),
             random_lora(unet, text, seed=3)]
    before = bits(unet), bits(text)
    alone = {}
    for lora in loras:
        merged = MergedLoRAs(unet, text)
        merged.add(lora, 0.5)
        alone[lora] = bits(unet), bits(text)
        merged.remove(lora)
        assert same(unet, before[0]) and same(text, before[1])
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        merged = MergedLoRAs(unet, text)
        for lora in loras:
            merged.add(lora, 0.5)
        assert merged.strengths == dict.fromkeys(loras, 0.5)
        assert not same(unet, alone[loras[2]][0])
        for index in order[:2]:
            merged.remove(loras[index])
        left = alone[loras[order[2]]]
        assert same(unet, left[0]) and same(text, left[1])
        merged.remove(loras[order[2]])
        assert same(unet, before[0]) and same(text, before[1]) and merged.strengths == {}


def test_a_weight_with_loras_is_a_sum_and_not_a_product_of_sums():
    weight, (first, second) = torch.randn(6, 4), [LowRank(torch.randn(2, 4), torch.randn(6, 2), 1.0) for _ in "ab"]
    both = merge_weight(weight, [(first, 0.5), (second, -2.0)])
    wanted = weight + 0.5 * 0.5 * first.up @ first.down - 2.0 * 0.5 * second.up @ second.down
    assert torch.allclose(both, wanted, atol=1e-6) and merge_weight(weight, []) is weight
    crossed = LowRank(first.down + second.down, first.up + second.up, 1.0)
    assert not torch.allclose(merge_weight(weight, [(crossed, 1.0)]),
                              merge_weight(weight, [(first, 1.0), (second, 1.0)]), atol=0.1)
    half = merge_weight(weight.half(), [(first, 1.0)])
    assert half.dtype == torch.float32


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_lora_linear_starts_as_its_layer_and_ends_as_a_plain_one(alpha):
    torch.manual_seed(0)
    base, x = torch.nn.Linear(5, 7), torch.randn(3, 2, 5)
    before = bits(base)
    layer = LoRALinear(base, 2, alpha)
    assert torch.equal(layer(x), base(x)) and layer.down.abs().max() > 0
    learns = {name for name, one in layer.named_parameters() if one.requires_grad}
    assert learns == {"down", "up"} and layer.down.shape == (2, 5) and layer.up.shape == (7, 2)
    layer(x).square().sum().backward()
    assert layer.up.grad.abs().max() > 0 and layer.down.grad.abs().max() == 0        # up is zero: down waits a step
    with torch.no_grad():
        layer.up.normal_()
    wanted = base(x) + LowRank(layer.down, layer.up, alpha).scale * x @ layer.down.T @ layer.up.T
    assert torch.allclose(layer(x), wanted, atol=1e-5) and same(base, before)
    merged = layer.merged()
    assert type(merged) is torch.nn.Linear and torch.allclose(merged(x), wanted, atol=1e-5) and same(base, before)


def test_two_loras_add_up(unet, text):
    unet = unet.double()
    first, second = random_lora(unet, seed=1), random_lora(unet, seed=2, rank=5)
    with attach_lora(unet, first.unet), attach_lora(unet, second.unet, 0.5):
        beside = output(unet)
    merged = MergedLoRAs(unet, text)
    merged.add(first)
    merged.add(second, 0.5)
    assert (output(unet) - beside).abs().max() < 1e-10
    name = f"{BLOCK}.attn1.to_q"
    merged.add(first, 0.0)                                           # a strength can be changed
    merged.remove(first)
    only_second = find_lora_layers(unet)[name].weight.clone()
    merged.remove(second)
    merged.add(second, 0.5)
    assert torch.equal(find_lora_layers(unet)[name].weight, only_second)


def test_parameters_stay_the_same_objects_and_in_their_type(unet, text):
    unet = unet.to(torch.bfloat16)
    before, objects = bits(unet), list(unet.parameters())
    lora = random_lora(unet)
    merged = MergedLoRAs(unet, text)
    merged.add(lora)
    assert not same(unet, before)
    assert all(a is b and a.dtype == torch.bfloat16 for a, b in zip(unet.parameters(), objects, strict=True))
    merged.remove(lora)
    assert same(unet, before)


def test_a_weight_that_was_changed_meanwhile_is_not_lost(unet, text):
    lora, name = random_lora(unet, targets=["to_q"]), f"{BLOCK}.attn1.to_q"
    merged = MergedLoRAs(unet, text)
    merged.add(lora)
    with torch.no_grad():
        find_lora_layers(unet)[name].weight.add_(1)
    changed = bits(unet)
    for act in (lambda: merged.remove(lora), lambda: merged.add(lora, 0.5)):
        with pytest.raises(ValueError, match=f"'{name}' was changed by something else"):
            act()
    assert same(unet, changed) and merged.strengths == {lora: 1.0}


def test_a_weight_may_change_while_nothing_is_merged(unet, text):
    lora, merged = random_lora(unet), MergedLoRAs(unet, text)
    merged.add(lora)
    merged.remove(lora)
    randomise(unet, torch.Generator().manual_seed(8))
    trained = bits(unet)
    merged.add(lora)
    assert not same(unet, trained)
    merged.remove(lora)
    assert same(unet, trained)


def test_what_does_not_fit_changes_nothing(unet, text):
    before, merged = bits(unet), MergedLoRAs(unet, text)
    good = random_lora(unet)
    name = f"{BLOCK}.attn1.to_q"
    change = good.unet[name]
    for wrong, words in [
        ({**good.unet, "down_blocks.7.to_q": change}, "other layers: 1 of its .*'down_blocks.7.to_q'"),
        ({**good.unet, name: replace(change, up=torch.zeros(9, 3))}, rf"'{name}' of this UNet.*\[9, 3\].*\[8, 8\]"),
        ({**good.unet, name: replace(change, down=torch.zeros(2, 8))}, name),
        ({**good.unet, name: replace(change, down=torch.zeros(3, 8, 3, 3))}, name),
    ]:
        with pytest.raises(ValueError, match=words):
            merged.add(LoRA(wrong))
        with pytest.raises(ValueError, match=words), attach_lora(unet, wrong):
            pass
    with pytest.raises(ValueError, match="other layers.*TextEncoder"):
        merged.add(LoRA({}, good.unet))
    with pytest.raises(ValueError, match="strength is nan"):
        merged.add(good, float("nan"))
    with pytest.raises(ValueError, match="is not merged"):
        merged.remove(good)
    assert same(unet, before) and merged.strengths == {}


def test_nothing_stays_attached_after_an_error(unet):
    before, lora = output(unet), random_lora(unet)
    with pytest.raises(RuntimeError), attach_lora(unet, lora.unet):
        raise RuntimeError
    assert torch.equal(output(unet), before)


# --- training ---------------------------------------------------------------------------------------

def image():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_training_moves_a_and_b_alone_and_the_result_equals_the_merged(model):
    before = {name: bits(getattr(model, name)) for name in ("unet", "text_encoder", "vae")}
    lora = new_lora(model.unet, model.text_encoder, targets=("to_q", "to_v", "to_out.0", "conv1", "proj_in"))
    fresh = [tensor.clone() for tensor in lora.tensors()]
    losses = []
    for step in train_lora(model, lora, image(), "a zwx cat", max_steps=50, learning_rate=1e-2, batch_size=8):
        losses.append(step.loss)
        shown = output(model.unet)                                   # with the LoRA so far
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not any(torch.equal(a, b) for a, b in zip(lora.tensors(), fresh, strict=True))
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in lora.tensors())
    assert all(same(getattr(model, name), tensors) for name, tensors in before.items())
    assert all(p.requires_grad for p in model.unet.parameters())
    plain = output(model.unet)
    assert (shown - plain).abs().max() > 0.01
    merged = MergedLoRAs(model.unet, model.text_encoder)
    merged.add(lora)
    assert (output(model.unet) - shown).abs().max() < 3e-6          # of numbers up to 1.5: rounding
    merged.remove(lora)
    model.unet.double()
    with attach_lora(model.unet, lora.unet):
        shown = output(model.unet)
    MergedLoRAs(model.unet, model.text_encoder).add(lora)
    assert (output(model.unet) - shown).abs().max() < 1e-12


def test_an_early_stop_keeps_what_was_learnt_and_detaches_it(model):
    before, lora = output(model.unet), new_lora(model.unet)
    for step in train_lora(model, lora, image(), ["a zwx cat"], max_steps=50, learning_rate=1e-2):
        if step.index == 2:
            break
    else:
        pytest.fail("it did not run")
    del step
    assert any(layer.up.any() for layer in lora.unet.values())
    assert torch.equal(output(model.unet), before)
    assert not lora.text_encoder


@pytest.mark.parametrize("arguments, words", [
    ({"captions": ["a", "b"]}, "1 images need as many captions, or one for all, not 2"),
    ({"lora": LoRA({"nowhere": LowRank(torch.zeros(1, 1), torch.zeros(1, 1))})}, "other layers"),
    ({"lora": LoRA()}, "nothing to train"),
    ({"pixels": torch.full((1, 3, 16, 16), 255.0)}, r"in \[-1, 1\]"),
])
def test_training_refuses_at_once_what_does_not_fit(model, arguments, words):
    given = {"lora": new_lora(model.unet), "pixels": image(), "captions": "a"} | arguments
    with pytest.raises(ValueError, match=words):
        train_lora(model, given["lora"], given["pixels"], given["captions"], max_steps=1)


# --- files ------------------------------------------------------------------------------------------

def written_by_hand(spelling, unet, text):
    """A file's tensors and, for each layer, what they say: (part, layer) -> (down, up, alpha / r)."""
    lora = random_lora(unet, text, rank=4, targets=["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"])
    tensors, meaning = {}, {}
    for part, changes in (("unet", lora.unet), ("text_encoder", lora.text_encoder)):
        for index, (layer, change) in enumerate(changes.items()):
            alpha = None
            path = layer if part == "unet" else f"text_model.{layer}"
            match spelling:
                case "kohya":
                    name = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + path.replace(".", "_")
                    keys = f"{name}.lora_down.weight", f"{name}.lora_up.weight"
                    if index % 3:
                        alpha = 1 + index % 3
                        tensors[f"{name}.alpha"] = torch.tensor(alpha if index % 2 else float(alpha))
                case "diffusers" if part == "unet":
                    keys = f"unet.{path}.lora.down.weight", f"unet.{path}.lora.up.weight"
                case "diffusers":
                    keys = (f"text_encoder.{path}.lora_linear_layer.down.weight",
                            f"text_encoder.{path}.lora_linear_layer.up.weight")
                case "peft" | "peft without text_model":
                    path = layer if "without" in spelling else path
                    name = f"unet.{path}" if part == "unet" else f"text_encoder.{path}"
                    keys = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
                case _:                                     # attention processors, with and without "unet."
                    attention, _, target = layer.rpartition(".")
                    if part == "unet" and target in ("conv1", "proj_in"):
                        continue
                    if target == "0":
                        attention, target = attention.removesuffix(".to_out"), "to_out"
                    if part == "unet":
                        name = f"{spelling}{attention}.processor.{target}_lora"
                    else:
                        name = f"text_encoder.text_model.{attention}.{target.replace('_proj', '')}_lora"
                        name = name.replace(".q_lora", ".to_q_lora").replace(".k_lora", ".to_k_lora")
                        name = name.replace(".v_lora", ".to_v_lora").replace(".out_lora", ".to_out_lora")
                    keys = f"{name}.down.weight", f"{name}.up.weight"
            tensors |= dict(zip(keys, (change.down, change.up), strict=True))
            meaning[part, layer] = change.down, change.up, 1 if alpha is None else alpha / 4
    return tensors, meaning


ALL_SPELLINGS = ("kohya", "diffusers", "peft", "peft without text_model", "unet.", "")


@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
@pytest.mark.parametrize("spelling", ALL_SPELLINGS)
def test_every_spelling_gives_the_libraries_output_with_the_formula_applied_by_hand(unet, text, tmp_path, spelling,
                                                                                     ending):
    tensors, meaning = written_by_hand(spelling, unet, text)
    file = tmp_path / f"style{ending}"
    save_file(tensors, file) if ending == ".safetensors" else torch.save(tensors, file)
    theirs = {
        "unet": UNet2DConditionModel.from_config(configs.unet_to_dict(unet.config, 8)),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**configs.text_to_dict(text.config))),
    }
    theirs["unet"].load_state_dict(unet.state_dict())
    prefix = "text_model." if any(key.startswith("text_model.") for key in theirs["text_encoder"].state_dict()) else ""
    theirs["text_encoder"].load_state_dict({f"{prefix}{name}": tensor for name, tensor in text.state_dict().items()})
    ids = torch.tensor([[1, 2, 3, 4]])
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 4, 16)
    plain = unet(x, t, context), text(ids).hidden
    with torch.no_grad():
        for (part, layer), (down, up, scale) in meaning.items():
            weight = theirs[part].get_submodule(layer if part == "unet" else prefix + layer).weight
            weight += 0.8 * scale * torch.einsum("or,ri...->oi...", up.flatten(1), down)

    MergedLoRAs(unet, text).add(load_lora(file, unet, text), strength=0.8)
    ours = unet(x, t, context), text(ids).hidden
    with torch.no_grad():
        wanted = theirs["unet"].eval()(x, t, context).sample, theirs["text_encoder"].eval()(ids).last_hidden_state
    for mine, other, before in zip(ours, wanted, plain, strict=True):
        assert (mine - other).abs().max() < 1e-5
        assert (mine - before).abs().max() > 0.01


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("spelling", ["diffusers", "kohya", "peft"])
def test_what_is_saved_is_loaded(unet, text, tmp_path, spelling, alpha):
    lora = random_lora(unet, text, rank=4, alpha=alpha, targets=["to_q", "to_out.0", "conv2", "proj_out"])
    again = load_lora(save_lora(tmp_path / "new" / "a.safetensors", lora, spelling=spelling), unet, text)
    for part in ("unet", "text_encoder"):
        ours, theirs = getattr(lora, part), getattr(again, part)
        assert ours.keys() == theirs.keys()
        for name, change in ours.items():
            assert torch.equal(theirs[name].down, change.down)
            assert torch.allclose(theirs[name].delta(), change.delta(), rtol=1e-6, atol=1e-6)
            assert (theirs[name].alpha == (alpha or 4)) or spelling != "kohya"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.safetensors"]


def test_half_precision_files_are_read_as_float32(unet, text, tmp_path):
    tensors, _ = written_by_hand("kohya", unet, text)
    save_file({key: tensor.half() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    assert {tensor.dtype for tensor in load_lora(tmp_path / "a.safetensors", unet, text).tensors()} == {torch.float32}


def test_peft_s_settings_in_the_header_give_alpha(unet, text, tmp_path):
    tensors, _ = written_by_hand("peft", unet, text)
    own, other = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_q"
    settings = {"unet.lora_alpha": 8, "unet.r": 4, "unet.alpha_pattern": {own: 2}, "unet.use_rslora": False,
                "text_encoder.lora_alpha": 8, "text_encoder.use_rslora": True}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
    lora = load_lora(tmp_path / "a.safetensors", unet, text)
    scales = lora.unet[own].scale, lora.unet[other].scale, lora.text_encoder[TEXT_LAYER].scale
    assert scales == (2 / 4, 8 / 4, 8 / 4**0.5)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="a.safetensors has lora_adapter_metadata.*no JSON"):
        load_lora(tmp_path / "a.safetensors", unet, text)


def test_underscores_in_names_are_told_from_dots(unet, text, tmp_path):
    """mid_block and to_out.0 have both; no rule of spelling says which is which, the model does."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    lora = random_lora(unet, targets=[name])
    file = save_lora(tmp_path / "a.safetensors", lora, spelling="kohya")
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.alpha" in load_file(file)
    assert list(load_lora(file, unet, text).unet) == [name]


Q = f"unet.{BLOCK}.attn1.to_q"
PAIR = {f"{Q}.lora_A.weight": torch.ones(2, 8), f"{Q}.lora_B.weight": torch.ones(8, 2)}


@pytest.mark.parametrize("change, words", [
    ({"unet.mid_block.attentions.5.to_q.lora_A.weight": torch.ones(2, 8),
      "unet.mid_block.attentions.5.to_q.lora_B.weight": torch.ones(8, 2)},
     "for other layers: 1 of its 2 .*this UNet.*'mid_block.attentions.5.to_q'"),
    ({"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.ones(2, 8),
      "lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.ones(8, 2)}, "'input_blocks_1_1_proj_in'"),
    ({"lora_te_text_model_encoder_layers_11_mlp_fc1.lora_down.weight": torch.ones(2, 8),
      "lora_te_text_model_encoder_layers_11_mlp_fc1.lora_up.weight": torch.ones(8, 2)}, "1 of its 1 .*TextEncoder"),
    ({f"{Q}.lora_B.weight": torch.ones(9, 2)}, r"attn1.to_q' of this UNet: down \[2, 8\] and up \[9, 2\].*\[8, 8\]"),
    ({f"{Q}.lora_B.weight": torch.ones(8, 3)}, r"up \[8, 3\]"),
    ({f"{Q}.lora_B.weight": torch.ones(8)}, r"up \[8\] for layer"),
    ({f"{Q}.lora_B.weight": None}, "has no up for layer .*attn1.to_q"),
    ({f"{Q}.lora_A.weight": None}, "has no down for layer"),
    ({f"{Q}.alpha": torch.ones(2)}, r"alpha of shape \[2\]"),
    ({f"{Q}.lora.down.weight": torch.ones(2, 8)}, "two down for layer"),
    ({f"{Q}.lora_magnitude_vector": torch.ones(8)}, "1 keys that are no LoRA's.*magnitude"),
    ({"lora_unet_x.hada_w1_a": torch.ones(8)}, "no LoRA's.*hada"),
    ({"lora_te1_text_model_x.lora_down.weight": torch.ones(2, 8)}, "no LoRA's.*lora_te1"),
    ({f"{Q}.lora_A.weight": torch.full((2, 8), float("nan"))}, "NaN"),
    ({f"{Q}.lora_A.weight": torch.ones(2, 8, dtype=torch.int32)}, "int32"),
    (dict.fromkeys(PAIR), "is empty"),
])
def test_what_a_file_has_too_much_or_too_little_is_one_sentence(unet, text, tmp_path, change, words):
    tensors = {key: tensor for key, tensor in (PAIR | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "style.safetensors")
    with pytest.raises(CheckpointError, match=words) as caught:
        load_lora(tmp_path / "style.safetensors", unet, text)
    assert "style.safetensors" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("damage", ["cut short", "empty", "missing", "a folder", "another ending"])
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_damaged_files_are_one_sentence_that_names_the_file(unet, text, tmp_path, ending, damage):
    path = tmp_path / f"style{ending}"
    save_file(PAIR, path) if ending == ".safetensors" else torch.save(PAIR, path)
    load_lora(path, unet, text)
    content = path.read_bytes()
    path.unlink()
    match damage:
        case "cut short":
            path.write_bytes(content[:-50])
        case "empty":
            path.write_bytes(b"")
        case "a folder":
            path.mkdir()
        case "another ending":
            path = path.with_suffix(".zip")
            path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_lora(path, unet, text)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


def test_code_in_a_pickle_does_not_run(unet, text, tmp_path):
    torch.save(PAIR | {"more": Attack(str(tmp_path / "mark"))}, tmp_path / "style.bin")
    with pytest.raises(CheckpointError, match="style.bin"):
        load_lora(tmp_path / "style.bin", unet, text)
    assert not (tmp_path / "mark").exists()


def test_what_cannot_be_saved_is_told_and_leaves_the_old_file(unet, tmp_path):
    lora, file = random_lora(unet), tmp_path / "a.safetensors"
    before = save_lora(file, lora).read_bytes()
    next(iter(lora.unet.values())).up[0, 0] = float("nan")
    for act, words in [
        (lambda: save_lora(file, lora), "a.safetensors is not finite"),
        (lambda: save_lora(file, lora, spelling="webui"), "no spelling 'webui'; choose one of diffusers, kohya, peft"),
        (lambda: save_lora(tmp_path / "a.bin", lora), "does not end in .safetensors"),
        (lambda: save_lora(file, LoRA()), "has no layers"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            act()
    with pytest.raises(OSError, match="cannot be written"):
        save_lora(file / "deeper.safetensors", random_lora(unet))
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
