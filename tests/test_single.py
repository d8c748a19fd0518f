"""Single files: published ones are read as diffusers reads them, ours lose nothing, damage is told."""

import io
import json
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from ldm_names import HF, NAMES, OPEN_CLIP, UNET
from ldm_names import VAE as VAE_PREFIX
from models import ZERO_SNR, one_thread, randomise, tiny_config, tiny_parts  # noqa: F401
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from single_files import VOCABULARY, small, text_state, tokenizer

from sdlearn.checkpoint import (
    CheckpointError,
    TensorMismatch,
    TensorsNotFinite,
    first_line,
    load,
    load_folder,
    load_single,
    load_single_controlnet,
    save_folder,
    save_single,
    save_tokenizer,
)
from sdlearn.checkpoint import single as single_module
from sdlearn.config import PRESETS, NoiseConfig
from sdlearn.pipeline import SHIPPED

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def older():
    return small()


@pytest.fixture(scope="module")
def newer():
    return small(newer=True)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer's folder."""
    folder = tmp_path_factory.mktemp("words")
    save_tokenizer(folder, tokenizer())
    return folder


@pytest.fixture(scope="module")
def old_file(older, tmp_path_factory):
    file = tmp_path_factory.mktemp("older") / "model.safetensors"
    save_file(older.tensors, file)
    return file


@pytest.fixture(scope="module")
def tiny():
    return tiny_parts()


@pytest.fixture
def tiny_file(tiny, tmp_path):
    """To damage."""
    return save_single(tmp_path / "tiny.safetensors", tiny)


def same(ours, theirs, name=""):
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == [], name


def same_parts(ours, theirs):
    for part in (*PARTS, "clip"):
        if getattr(theirs, part) is not None:
            same(getattr(ours, part).state_dict(), getattr(theirs, part).state_dict(), part)


def same_file(one, other):
    a, b = load_file(one), load_file(other)
    same(a, b)
    assert [a[name].dtype for name in a] == [b[name].dtype for name in a]


# --- published files --------------------------------------------------------------------------------

@torch.no_grad()
def test_an_sd_1_file_gives_the_tensors_and_numbers_of_the_libraries(older, old_file, words):
    parts = load_single(old_file, tokenizer=words)
    for part, theirs in older.states().items():
        same(getattr(parts, part).state_dict(), theirs, part)
        assert not getattr(parts, part).training
    config = parts.config
    assert (config.name, config.noise, config.image_size, config.vision) == ("model", NoiseConfig(), 512, None)
    assert config.unet == replace(PRESETS["sd15"].unet, channels=(32, 64, 64, 64))
    assert config.vae == replace(PRESETS["sd15"].vae, channels=(32,) * 4)
    assert config.text == replace(PRESETS["sd15"].text, layers=2, mlp_dim=48, vocab_size=VOCABULARY)
    assert parts.tokenizer.pad_with_end and parts.clip is None and parts.world is None
    ids = parts.tokenizer(["a red apple"])
    text = parts.text_encoder(ids).hidden
    torch.testing.assert_close(text, older.text_encoder(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(parts.unet(x, 500, text), older.unet(x, 500, text).sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.vae.decode(x), older.vae.decode(x).sample, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prediction, side", [("epsilon", 512), ("v_prediction", 768)])
def test_an_sd_2_file_gives_the_tensors_and_numbers_of_the_libraries(newer, words, tmp_path, prediction, side):
    file = tmp_path / "model.safetensors"
    unused = {f"{OPEN_CLIP}transformer.resblocks.23.{name}": torch.zeros(2) for name in ("ln_1.weight", "x")}
    unused |= {f"{OPEN_CLIP}{name}": torch.zeros(2) for name in ("text_projection", "logit_scale", "attn_mask")}
    save_file(newer.tensors | unused, file)
    parts = load_single(file, prediction=prediction, tokenizer=words)
    for part, theirs in newer.states().items():
        same(getattr(parts, part).state_dict(), theirs, part)
    assert parts.config.unet == replace(PRESETS["sd2_base"].unet, channels=(64, 128, 128, 128))
    assert (parts.config.noise.prediction_type, parts.config.image_size) == (prediction, side)
    assert not parts.tokenizer.pad_with_end and not parts.config.text.pad_with_end
    ids = parts.tokenizer(["a red apple"])
    text = parts.text_encoder(ids).hidden
    torch.testing.assert_close(text, newer.text_encoder(ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(parts.unet(x, 500, text), newer.unet(x, 500, text).sample, rtol=1e-4, atol=1e-4)


def test_an_sd_2_file_without_a_prediction_is_refused_before_a_tensor_is_read(newer, words, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(newer.tensors | {f"{UNET}out.2.bias": torch.full((4,), float("nan"))}, file)
    with pytest.raises(CheckpointError, match='prediction="epsilon"'):
        load_single(file, tokenizer=words)
    with pytest.raises(CheckpointError, match="prediction is 'eps'; choose one of epsilon, v_prediction"):
        load_single(file, prediction="eps", tokenizer=words)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_text_encoders_are_told_by_their_keys(older, newer, words, tmp_path, prefix):
    for theirs, prediction in ((older, None), (newer, "epsilon")):
        tensors = {name: one for name, one in theirs.tensors.items() if not name.startswith((HF, OPEN_CLIP))}
        there = {f"cond_stage_model.transformer.{prefix}{name}": one
                 for name, one in text_state(theirs.text_encoder).items()}
        positions = {f"cond_stage_model.transformer.{prefix}embeddings.position_ids": torch.arange(77)[None]}
        save_file(tensors | there | positions, tmp_path / "model.safetensors")
        parts = load_single(tmp_path / "model.safetensors", prediction=prediction, tokenizer=words)
        same(parts.text_encoder.state_dict(), text_state(theirs.text_encoder))
        assert parts.config.text.activation == ("quick_gelu" if theirs is older else "gelu")


def test_linear_attention_in_the_autoencoder_is_read_too(older, words, tmp_path):
    flat = {name: one[:, :, 0, 0] if ".attn_1." in name and one.ndim == 4 else one
            for name, one in older.tensors.items()}
    save_file({name: one.contiguous() for name, one in flat.items()}, tmp_path / "model.safetensors")
    parts = load_single(tmp_path / "model.safetensors", tokenizer=words)
    same(parts.vae.state_dict(), older.vae.state_dict())


def test_an_inpainting_file_is_told_by_its_nine_channels(words, tmp_path):
    theirs = small(in_channels=9)
    save_file(theirs.tensors, tmp_path / "model.safetensors")
    parts = load_single(tmp_path / "model.safetensors", tokenizer=words)
    assert parts.config.unet.in_channels == 9
    same(parts.unet.state_dict(), theirs.unet.state_dict())
    folder = save_folder(tmp_path / "folder", parts)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_loaded_as_float32(tmp_path, words, dtype):
    theirs = small(dtype=dtype)
    save_file(theirs.tensors, tmp_path / "model.safetensors")
    parts = load_single(tmp_path / "model.safetensors", tokenizer=words)
    same(parts.unet.state_dict(), theirs.unet.state_dict())
    half = load_single(tmp_path / "model.safetensors", tokenizer=words, dtype=dtype)
    assert {one.dtype for one in half.vae.state_dict().values()} == {dtype}


def test_a_checkpoint_of_the_first_trainer_is_opened_and_what_is_beside_the_weights_left(older, words, tmp_path,
                                                                                        monkeypatch):
    """Nested under state_dict, with counters, NumPy's numbers and a class of a library that is not here."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for i in range(1, 4):
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:i]), types.ModuleType(name))
    callback = type("ModelCheckpoint", (), {"__module__": name, "__qualname__": "ModelCheckpoint"})
    sys.modules[name].ModelCheckpoint = callback
    left = {"model_ema.decay": torch.tensor(0.9), "model_ema.diffusion_modelx": torch.zeros(3),
            "betas": torch.zeros(1000), "scale_factor": torch.tensor(0.18215)}
    file = tmp_path / "model.ckpt"
    torch.save({"epoch": 3, "state_dict": OrderedDict(older.tensors | left),
                "callbacks": {callback: {"best_model_score": np.float64(0.5)}}}, file)
    for i in range(1, 4):
        monkeypatch.delitem(sys.modules, ".".join(name.split(".")[:i]))
    parts = load_single(file, tokenizer=words)
    for part, theirs in older.states().items():
        same(getattr(parts, part).state_dict(), theirs, part)
    torch.save(older.tensors, file)         # and without the nesting
    same_parts(load_single(file, tokenizer=words), parts)


def test_loaded_weights_do_not_hang_on_the_file(older, words, tmp_path):
    for file in (tmp_path / "model.ckpt", tmp_path / "model.safetensors"):
        torch.save(older.tensors, file) if file.suffix == ".ckpt" else save_file(older.tensors, file)
        parts = load_single(file, tokenizer=words)
        with file.open("r+b") as handle:
            handle.write(bytes(file.stat().st_size))
        same(parts.unet.state_dict(), older.unet.state_dict())


def test_modules_take_the_tensors_as_they_were_read(old_file, words, monkeypatch):
    """Of each number there is one copy: what was read from the file is what the module holds."""
    read = []

    def watched(file, tensors, device, dtype):
        read.append(copy_tensors(file, tensors, device, dtype))
        return read[0]

    copy_tensors = single_module.copy_tensors
    monkeypatch.setattr(single_module, "copy_tensors", watched)
    parts = load_single(old_file, tokenizer=words)
    mine = {(part, name): one.data_ptr() for part in PARTS for name, one in getattr(parts, part).state_dict().items()}
    assert mine == {key: one.data_ptr() for key, one in read[0].items()}
    sizes = {one.untyped_storage().nbytes() - one.nbytes for one in read[0].values()}
    assert sizes == {0}                 # no view that keeps a larger tensor alive


# --- ControlNets ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def control():
    """Diffusers' module, and its tensors named by the table."""
    theirs = ControlNetModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=768, attention_head_dim=8)
    randomise(theirs.eval(), torch.Generator().manual_seed(0))
    names = NAMES["unet"] | NAMES["controlnet"]
    return theirs, {names[ours]: tensor for ours, tensor in theirs.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("suffix, prefix", [(".pth", ""), (".safetensors", "control_model."), (".ckpt", "whole")])
def test_a_controlnet_is_read_alone_and_from_beside_a_model(control, older, tmp_path, suffix, prefix):
    theirs, tensors = control
    if prefix:
        tensors = {f"control_model.{name}": one for name, one in tensors.items()}
    if prefix == "whole":
        tensors = tensors | older.tensors
    file = tmp_path / f"control{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    net = load_single_controlnet(file)
    same(net.state_dict(), theirs.state_dict())
    assert net.control_config.unet == replace(PRESETS["sd15"].unet, channels=(32, 64, 64, 64))
    assert net.control_config.hint_widths == (16, 32, 96, 256) and not net.training
    generator = torch.Generator().manual_seed(1)
    x, text, hint = (torch.randn(shape, generator=generator) for shape in
                     ((1, 4, 8, 8), (1, 77, 768), (1, 3, 64, 64)))
    features = theirs(x, 500, text, hint, return_dict=False)
    ours = net(x, 500, text, hint)
    for one, other in zip(ours, [*features[0], features[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_is_wrong_with_a_controlnet_is_told(control, old_file, tmp_path):
    with pytest.raises(CheckpointError, match="model.safetensors holds no ControlNet"):
        load_single_controlnet(old_file)
    tensors = dict(control[1])
    tensors["stray"] = tensors.pop("zero_convs.3.0.weight")
    save_file(tensors, tmp_path / "control.safetensors")
    with pytest.raises(TensorMismatch) as caught:
        load_single_controlnet(tmp_path / "control.safetensors")
    assert (caught.value.missing, caught.value.unexpected) == (["zero_convs.3.0.weight"], ["stray"])
    with pytest.raises(CheckpointError, match="holds a ControlNet, which works beside a model"):
        load(tmp_path / "control.safetensors")


# --- tokenizers -------------------------------------------------------------------------------------

def test_a_tokenizer_is_fetched_from_the_hub_or_asked_for(older, old_file, words, monkeypatch):
    asked = []

    def download(repo_id, *, file):
        asked.append((repo_id, file))
        return words / file

    monkeypatch.setattr(single_module, "download", download)
    assert load_single(old_file).tokenizer.merges == tokenizer().merges
    assert asked == [("openai/clip-vit-large-patch14", name) for name in ("vocab.json", "merges.txt")]

    def unreachable(*_, **__):
        raise CheckpointError("the hub cannot be reached.")

    monkeypatch.setattr(single_module, "download", unreachable)
    with pytest.raises(CheckpointError, match="model.safetensors has no tokenizer.*vocab.json.*cannot be reached"):
        load_single(old_file)
    assert load_single(old_file, tokenizer=tokenizer()).tokenizer.merges == tokenizer().merges


def test_a_tokenizer_that_is_none_or_too_large_is_told(old_file, tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer at .*nothing"):
        load_single(old_file, tokenizer=tmp_path / "nothing")
    large = tokenizer()
    large.add_token("<toy>", VOCABULARY)
    with pytest.raises(CheckpointError, match=f"room for {VOCABULARY} tokens"):
        load_single(old_file, tokenizer=large)


# --- our own files ----------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [
    tiny_config(), tiny_config(ZERO_SNR), tiny_config(NoiseConfig(prediction_type="sample")),
    replace(tiny_config(), text=replace(tiny_config().text, pad_with_end=False)),
    replace(tiny_config(), text=replace(tiny_config().text, activation="gelu")),
    replace(tiny_config(), unet=replace(tiny_config().unet, heads=None, head_dim=4, linear_projection=True,
                                        in_channels=9)),
    replace(tiny_config(), vae=replace(tiny_config().vae, scaling_factor=0.7, layers_per_block=3)),
], ids=["tiny", "zero SNR", "x0", "zero padded", "gelu", "as SD 2.x", "vae"])
def test_what_tensors_cannot_tell_is_written_beside_them(config, tmp_path):
    parts = tiny_parts(config=config)
    parts.tokenizer.pad_with_end = config.text.pad_with_end
    file = save_single(tmp_path / "tiny.safetensors", parts)
    again = load_single(file)
    assert again.config == parts.config and again.world == parts.world
    same_parts(again, parts)
    assert again.clip.text_model is again.text_encoder
    assert again.tokenizer.encode("a red appletree!") == parts.tokenizer.encode("a red appletree!")
    assert again.tokenizer.pad_with_end == config.text.pad_with_end
    names = load_file(file)
    style = HF if config.text.activation == "quick_gelu" and config.text.pad_with_end else OPEN_CLIP
    assert any(name.startswith(style) for name in names)
    assert {name.split(".")[0] for name in names} == {"model", "first_stage_model", "cond_stage_model", "sdlearn"}


def test_a_encoder_of_many_layers_loses_none(tmp_path):
    """Of a published SD 2.x' text encoder the 24th layer is passed over; of one of ours nothing is."""
    text = replace(tiny_config().text, layers=25, activation="gelu")
    parts = tiny_parts(config=replace(tiny_config(), text=text))
    file = save_single(tmp_path / "tiny.safetensors", parts)
    assert f"{OPEN_CLIP}transformer.resblocks.23.ln_1.weight" in load_file(file)
    same_parts(load_single(file), parts)


def test_words_that_were_added_are_kept(tmp_path):
    parts = tiny_parts(config=replace(tiny_config(), text=replace(tiny_config().text, vocab_size=606)))
    for word, n in (("<toy>", 3), ("<cat>", 1)):
        parts.tokenizer.add_token(word, n)
    again = load_single(save_single(tmp_path / "tiny.safetensors", parts))
    assert again.tokenizer.added == parts.tokenizer.added
    assert again.tokenizer.encode("a <toy> and <cat>") == parts.tokenizer.encode("a <toy> and <cat>")


def test_a_model_without_vision_and_world_is_whole(tmp_path):
    parts = tiny_parts(vision=False)
    parts.world = None
    again = load_single(save_single(tmp_path / "tiny.safetensors", parts))
    assert again.clip is None and again.world is None and again.config.vision is None


def test_the_shipped_model_goes_through_every_layout_bit_by_bit(tmp_path):
    parts = load_folder(SHIPPED / "mini")
    one = save_single(tmp_path / "mini.safetensors", parts, dtype=torch.float16)
    again = load(one)
    assert again.config == parts.config
    same_parts(again, parts)
    folder = save_folder(tmp_path / "mini", again, dtype=torch.float16)
    for part in ("unet", "vae", "vision"):
        [file] = (folder / part).glob("*.safetensors")
        same_file(file, SHIPPED / "mini" / part / file.name)
    same_file(save_single(tmp_path / "again.safetensors", load(folder), dtype=torch.float16), one)


@pytest.mark.parametrize("newer, dtype", [(False, torch.float32), (False, torch.float16), (True, torch.float32),
                                          (True, torch.bfloat16)])
def test_single_folder_single_is_bit_identical_name_by_name(newer, dtype, words, tmp_path):
    theirs = small(newer, dtype=dtype)
    file = tmp_path / "model.safetensors"
    save_file(theirs.tensors, file)
    parts = load_single(file, prediction="epsilon", tokenizer=words)
    again = load_folder(save_folder(tmp_path / "folder", parts, dtype=dtype))
    same_parts(again, parts)
    assert replace(again.config, name="model") == parts.config
    same_file(save_single(tmp_path / "again.safetensors", again, dtype=dtype), file)
    told = load_single(tmp_path / "again.safetensors")      # its header now tells prediction and tokenizer
    assert replace(told.config, name="model") == parts.config


@pytest.mark.parametrize("newer", [False, True])
def test_diffusers_opens_our_single_files(newer, words, tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    theirs = small(newer)
    save_file(theirs.tensors, tmp_path / "model.safetensors")
    parts = load_single(tmp_path / "model.safetensors", prediction="epsilon", tokenizer=words)
    folder = save_folder(tmp_path / "folder", parts)
    file = save_single(tmp_path / "ours.safetensors", parts)
    for kind, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        module = kind.from_single_file(str(file), config=str(folder), subfolder=part, local_files_only=True)
        same(module.state_dict(), getattr(theirs, part).state_dict(), part)


def test_a_file_s_own_word_is_not_overruled(tiny_file, tmp_path):
    with pytest.raises(CheckpointError, match="says that it predicts 'epsilon', not 'v_prediction'"):
        load_single(tiny_file, prediction="v_prediction")
    assert load_single(tiny_file, prediction="epsilon").config.noise.prediction_type == "epsilon"
    with pytest.raises(CheckpointError, match="leave prediction out"):
        load(save_folder(tmp_path / "folder", tiny_parts()), prediction="sample")


# --- writing ----------------------------------------------------------------------------------------

def test_a_failed_save_leaves_the_old_file_and_nothing_beside(tiny_file):
    before = tiny_file.read_bytes()
    parts = tiny_parts(ZERO_SNR)
    with torch.no_grad():
        parts.vae.decoder.conv_in.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match="first_stage_model.decoder.conv_in.bias' of tiny.safetensors is not"):
        save_single(tiny_file, parts)
    assert tiny_file.read_bytes() == before
    assert [path.name for path in tiny_file.parent.iterdir()] == ["tiny.safetensors"]


def test_other_endings_are_refused_both_ways(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="tiny.ckpt does not end in .safetensors"):
        save_single(tmp_path / "tiny.ckpt", tiny)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="tiny.gguf does not end in .safetensors, .ckpt"):
        load(tmp_path / "tiny.gguf")


# --- damage -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("own", [True, False], ids=["with a header", "published"])
def test_every_wrong_tensor_is_named(own, older, tiny_file, words, tmp_path):
    file = tiny_file if own else tmp_path / "model.safetensors"
    tensors = dict(load_file(file) if own else older.tensors)
    gone = [f"{UNET}input_blocks.1.0.in_layers.2.weight", f"{VAE_PREFIX}encoder.mid.attn_1.q.weight",
            f"{HF}encoder.layers.1.mlp.fc1.weight"]
    for name in gone:
        del tensors[name]
    tensors |= {f"{UNET}out.2.bias": torch.zeros(7), f"{VAE_PREFIX}another.weight": torch.zeros(2),
                "stray": torch.zeros(2), f"{VAE_PREFIX}decoder.mid.attn_1.k.weight": torch.zeros(3, 3, 1, 1)}
    metadata = None
    if own:
        with safe_open(file, framework="pt") as there:
            metadata = there.metadata()
    save_file(tensors, file, metadata)
    with pytest.raises(TensorMismatch) as caught:
        load_single(file, tokenizer=words)
    error = caught.value
    assert sorted(error.missing) == sorted(gone)
    assert sorted(error.unexpected) == [f"{VAE_PREFIX}another.weight", "stray"]
    assert [name for name, _, _ in error.misshaped] == [f"{VAE_PREFIX}decoder.mid.attn_1.k.weight",
                                                        f"{UNET}out.2.bias"]
    assert "3 missing, 2 unexpected, 2 of another shape" in first_line(error) and str(file) in first_line(error)
    assert "config.json" not in first_line(error)
    assert all(f": {name}" in str(error) for name in gone)


@pytest.mark.parametrize("name, shape", [
    (f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (32, 1024)),
    (f"{UNET}input_blocks.1.1.proj_in.weight", (32, 32)),
    (f"{UNET}input_blocks.1.0.in_layers.2.bias", (96,)),
    (f"{VAE_PREFIX}encoder.down.0.block.0.conv1.bias", (48,)),
    (f"{HF}encoder.layers.0.layer_norm1.bias", (96,)),
    (f"{HF}encoder.layers.0.mlp.fc1.bias", (96,)),
])
def test_a_single_tensor_of_another_shape_does_not_change_what_the_others_tell(older, words, tmp_path, name, shape):
    """Sizes are read off the shapes of all tensors of a kind; so the wrong one is named, though it comes first."""
    assert name in older.tensors
    file = tmp_path / "model.ckpt"
    torch.save({name: torch.zeros(shape), **{key: one for key, one in older.tensors.items() if key != name}}, file)
    with pytest.raises(TensorMismatch) as caught:
        load_single(file, tokenizer=words)
    error = caught.value
    assert [wrong for wrong, _, _ in error.misshaped] == [name] and not error.missing and not error.unexpected


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_every_tensor_that_is_not_finite_is_named(older, newer, words, tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    name, stacked = f"{UNET}out.2.bias", f"{OPEN_CLIP}transformer.resblocks.1.attn.in_proj_weight"
    tensors = newer.tensors | {name: torch.tensor([1, float("nan"), 1, 1]),
                               stacked: newer.tensors[stacked].clone().fill_(float("inf"))}
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    with pytest.raises(TensorsNotFinite) as caught:
        load_single(file, prediction="epsilon", tokenizer=words)
    assert sorted(caught.value.names) == sorted([name, stacked])
    assert str(file) in first_line(caught.value) and f"not finite: {name}" in str(caught.value)


def test_what_a_narrower_type_cannot_hold_is_named(older, words, tmp_path):
    name = f"{UNET}out.2.bias"
    save_file(older.tensors | {name: torch.full((4,), 1e6)}, tmp_path / "model.safetensors")
    with pytest.raises(TensorsNotFinite, match=name):
        load_single(tmp_path / "model.safetensors", tokenizer=words, dtype=torch.float16)
    load_single(tmp_path / "model.safetensors", tokenizer=words)


def test_quantised_weights_are_refused(older, words, tmp_path):
    name = f"{UNET}out.2.weight"
    save_file(older.tensors | {name: older.tensors[name].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{name}' of .*model.safetensors is torch.int8"):
        load_single(tmp_path / "model.safetensors", tokenizer=words)


def told_in_a_sentence(file, words, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        load_single(file, tokenizer=words)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickle_does_not_run(older, words, tmp_path, nested):
    file, made = tmp_path / "model.ckpt", tmp_path / "made"
    torch.save({"state_dict": older.tensors, "callbacks": Payload(made)} if nested else Payload(made), file)
    told_in_a_sentence(file, words, "holds more than tensors and was not opened.*mkdir.*safetensors")
    assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists()                # it would have


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("damage", ["cut short", "cut to its start", "empty", "text", "a folder", "missing"])
def test_damaged_files_are_one_sentence_that_names_the_file(older, words, tmp_path, suffix, damage):
    file = tmp_path / f"model{suffix}"
    save_file(older.tensors, file) if suffix == ".safetensors" else torch.save(older.tensors, file)
    content = file.read_bytes()
    match damage:
        case "cut short":
            file.write_bytes(content[:-9000])
        case "cut to its start":
            file.write_bytes(content[:100])
        case "empty":
            file.write_bytes(b"")
        case "text":
            file.write_bytes(b"version https://example.org/pointer\nsize 12345\n")
        case "a folder":
            file.unlink()
            file.mkdir()
        case "missing":
            file.unlink()
    told_in_a_sentence(file, words, "truncated|cannot be read|missing")


def test_a_flipped_bit_in_a_header_is_refused(tiny_file, words):
    content = bytearray(tiny_file.read_bytes())
    place = content.index(b'"data_offsets":[') + 16
    for flip in (0x01, 0x04, 0x40):
        damaged = bytearray(content)
        damaged[place] ^= flip
        tiny_file.write_bytes(damaged)
        told_in_a_sentence(tiny_file, words, "truncated or not a safetensors file|does not fit|damaged header")


@pytest.mark.parametrize("part", ["/data/7", "data.pkl"])
def test_a_flipped_bit_in_a_zip_is_found_by_its_checksum(older, words, tmp_path, part):
    file = tmp_path / "model.ckpt"
    torch.save(older.tensors, file)
    with zipfile.ZipFile(file) as archive:
        [entry] = [entry for entry in archive.infolist() if entry.filename.endswith(part)]
        size = entry.file_size
        raw = archive.read(entry)
    content = bytearray(file.read_bytes())
    place = content.index(raw, entry.header_offset) + size // 2
    content[place] ^= 0x10
    file.write_bytes(content)
    told_in_a_sentence(file, words, f"is damaged: its part .*{part}")


def test_a_header_that_claims_more_than_the_file_holds_is_refused(words, tmp_path):
    file = tmp_path / "model.safetensors"
    name = f"{UNET}input_blocks.0.0.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    told_in_a_sentence(file, words, "truncated or not a safetensors file")
    file.write_bytes((2**60).to_bytes(8, "little") + header)
    told_in_a_sentence(file, words, "truncated or not a safetensors file")


@pytest.mark.parametrize("claimed", [4, 10**12])
def test_a_pickle_that_claims_more_than_the_file_holds_is_refused(words, tmp_path, claimed):
    """The file holds four numbers; its pickle speaks of a tensor of 10^12, in a storage of `claimed`."""
    storage = object()

    class Pickler(pickle.Pickler):
        def persistent_id(self, one):
            return ("storage", torch.FloatStorage, "0", "cpu", claimed) if one is storage else None

    class Rebuilt:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, 0, (10**12,), (1,), False, OrderedDict())

    file, buffer = tmp_path / "model.ckpt", io.BytesIO()
    torch.save({"a": torch.zeros(4)}, file)
    Pickler(buffer, 2).dump({f"{UNET}input_blocks.0.0.weight": Rebuilt()})
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    entries["model/data.pkl"] = buffer.getvalue()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    told_in_a_sentence(file, words, "cannot be read as tensors")


def test_a_packed_zip_is_refused_before_it_is_unpacked(words, tmp_path):
    file = tmp_path / "model.ckpt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(10**6))
    told_in_a_sentence(file, words, "is damaged: its part model/data.pkl")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {"a": "b"}}], ids=str)
def test_pickles_of_other_things_are_refused(words, tmp_path, content):
    torch.save(content, tmp_path / "model.ckpt")
    told_in_a_sentence(tmp_path / "model.ckpt", words, "holds no table of tensors")


@pytest.mark.parametrize("change, part", [
    (lambda values: "{", "JSON"), (lambda values: "[]", "tokenizer"),
    (lambda values: values | {"unet": {}}, "unet"), (lambda values: values | {"vae": None}, "vae"),
    (lambda values: values | {"text": {"layer_norm_eps": 1}}, "text"),
    (lambda values: values | {"noise": values["noise"] | {"prediction_type": "flow"}}, "noise"),
    (lambda values: values | {"tokenizer": {"vocab": {}, "merges": ["a"]}}, "tokenizer"),
    (lambda values: values | {"world": {"objects": 1}}, "list of objects"),
    (lambda values: values | {"image_size": "large"}, "image_size"),
    (lambda values: values | {"vision": 3}, "vision"),
])
def test_a_damaged_header_of_ours_is_told_with_its_part(tiny_file, words, change, part):
    with safe_open(tiny_file, framework="pt") as there:
        values = json.loads(there.metadata()["sdlearn"])
    changed = change(values)
    save_file(load_file(tiny_file), tiny_file,
              {"sdlearn": changed if isinstance(changed, str) else json.dumps(changed)})
    told_in_a_sentence(tiny_file, words, part)


# --- model folders from elsewhere -------------------------------------------------------------------

@pytest.fixture
def folder(tiny, tmp_path):
    return save_folder(tmp_path / "folder", tiny)


def test_early_spellings_of_the_autoencoder_s_attention_are_read(folder, tiny):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for ours, theirs in old.items():
        tensors = {name.replace(f".{ours}.", f".{theirs}.") if "attentions" in name else name: one
                   for name, one in tensors.items()}
    assert sum("proj_attn" in name for name in tensors) == 4
    save_file(tensors, file)
    same_parts(load_folder(folder), tiny)


def test_folders_with_half_precision_variants_alone_are_read(folder, tiny):
    for part, name in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
                       ("text_encoder", "model")):
        (folder / part / f"{name}.safetensors").rename(folder / part / f"{name}.fp16.safetensors")
    same_parts(load(folder), tiny)


def test_pickles_in_a_folder_are_told_as_such(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="unet.diffusion_pytorch_model.safetensors is missing.*model.bin, a pic"):
        load_folder(folder)


def test_a_folder_s_tensors_that_are_not_finite_are_named(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"conv_out.bias": torch.full((4,), float("nan"))}, file)
    with pytest.raises(TensorsNotFinite, match="conv_out.bias"):
        load_folder(folder)


@pytest.mark.parametrize("scheduler", [
    {"_class_name": "PNDMScheduler", "skip_prk_steps": True}, {"_class_name": "DDIMScheduler", "clip_sample": False},
    {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False},
    {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2, "algorithm_type": "dpmsolver++"}])
def test_schedulers_of_every_kind_give_the_noise_schedule(folder, scheduler):
    common = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "trained_betas": None,
              "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(common | scheduler))
    assert load_folder(folder).config.noise == NoiseConfig(prediction_type="v_prediction")


def test_load_finds_out_what_it_was_given(tiny, tiny_file, folder, tmp_path):
    same_parts(load(tiny_file), tiny)
    same_parts(load(str(folder)), tiny)
    replaced = tokenizer(pad_with_end=False)
    assert load(folder, tokenizer=replaced).tokenizer is replaced
    for missing in (tmp_path / "no" / "model.safetensors", "nothing", "a/b/c", "../x"):
        with pytest.raises(CheckpointError, match="no file or folder"):
            load(missing)
    with pytest.raises(CheckpointError, match="is not a model folder"):
        load(Path(folder) / "unet")
