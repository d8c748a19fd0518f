"""Model folders: what is written is read back, libraries agree on it, and damage is told in a sentence."""

import inspect
import json
import shutil
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from models import EPSILON, ZERO_SNR, one_thread, randomise, tiny_config, tiny_parts  # noqa: F401
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from sdlearn.checkpoint import (
    CheckpointError,
    TensorMismatch,
    configs,
    first_line,
    load_folder,
    load_single,
    save_folder,
    save_single,
)
from sdlearn.checkpoint import files as checkpoint_files
from sdlearn.clip import CLIP
from sdlearn.config import PRESETS, ControlNetConfig, NoiseConfig, SamplingConfig
from sdlearn.schedule import NoiseSchedule
from sdlearn.unet import UNet
from sdlearn.vae import VAE

UNET, VAE_FILE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT, VISION = "text_encoder/model.safetensors", "vision/model.safetensors"
MODULES = ("text_encoder", "vae", "unet", "clip")


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


@pytest.fixture(scope="module")
def written(parts, tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("models") / "tiny", parts)


@pytest.fixture
def folder(written, tmp_path):
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "tiny")


def rewrite(file, change):
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- configs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_the_way_to_json_and_back(name):
    config = PRESETS[name]
    through = lambda values: json.loads(json.dumps(values))     # noqa: E731
    assert configs.unet_from_dict(through(configs.unet_to_dict(config.unet, 64))) == config.unet
    assert configs.vae_from_dict(through(configs.vae_to_dict(config.vae, 512))) == config.vae
    text = through(configs.text_to_dict(config.text))
    assert configs.text_from_dict(text, config.text.pad_with_end) == config.text
    assert configs.noise_from_dict(through(configs.noise_to_dict(config.noise))) == config.noise
    if config.vision:
        assert configs.vision_from_dict(through(configs.vision_to_dict(config.vision))) == config.vision


@pytest.mark.parametrize("noise", [
    NoiseConfig(), NoiseConfig(prediction_type="v_prediction"),
    NoiseConfig(prediction_type="sample"), ZERO_SNR,
    NoiseConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02), NoiseConfig(beta_schedule="cosine"),
], ids=str)
def test_noise_configs_survive(noise):
    assert configs.noise_from_dict(configs.noise_to_dict(noise)) == noise


def test_zero_terminal_snr_is_written_for_a_scheduler_that_starts_at_the_last_timestep():
    values = configs.noise_to_dict(ZERO_SNR)
    assert (values["_class_name"], values["timestep_spacing"], values["rescale_betas_zero_snr"],
            values["prediction_type"]) == ("DDIMScheduler", "trailing", True, "v_prediction")
    assert configs.noise_to_dict(EPSILON)["_class_name"] == "PNDMScheduler"


# The values in the config.json files published with SD 1.5 and SD 2.1.
UNET_15 = {"act_fn": "silu", "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
           "center_input_sample": False, "cross_attention_dim": 768,
           "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
           "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
           "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
           "sample_size": 64, "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3}
UNET_21 = UNET_15 | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "dual_cross_attention": False,
                     "num_class_embeds": None, "only_cross_attention": False, "use_linear_projection": True,
                     "sample_size": 96}
VAE_15 = {"act_fn": "silu", "block_out_channels": [128, 256, 512, 512], "down_block_types":
          ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
          "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
          "up_block_types": ["UpDecoderBlock2D"] * 4}
TEXT_15 = {"attention_dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
           "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
           "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
           "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408}
SCHEDULER_15 = {"beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
                "steps_offset": 1, "trained_betas": None, "clip_sample": False}


def test_published_configs_of_sd_give_the_presets():
    """Keys they left out take defaults."""
    assert configs.unet_from_dict(UNET_15) == PRESETS["sd15"].unet
    assert configs.unet_from_dict(UNET_21 | {"upcast_attention": True}) == PRESETS["sd21"].unet
    assert configs.vae_from_dict(VAE_15) == PRESETS["sd15"].vae
    assert configs.text_from_dict(TEXT_15) == PRESETS["sd15"].text
    assert configs.noise_from_dict(SCHEDULER_15) == PRESETS["sd15"].noise
    assert configs.noise_from_dict(SCHEDULER_15 | {"prediction_type": "v_prediction"}) == PRESETS["sd21"].noise


@pytest.mark.parametrize("published, written", [
    (UNET_15, configs.unet_to_dict(PRESETS["sd15"].unet, 64)),
    (UNET_21, configs.unet_to_dict(PRESETS["sd21"].unet, 96)),
    (VAE_15, configs.vae_to_dict(PRESETS["sd15"].vae, 512)),
    (TEXT_15, configs.text_to_dict(PRESETS["sd15"].text)),
    (SCHEDULER_15, configs.noise_to_dict(PRESETS["sd15"].noise)),
    (SCHEDULER_15 | {"prediction_type": "v_prediction"}, configs.noise_to_dict(PRESETS["sd21"].noise)),
], ids=["SD 1.5 U-Net", "SD 2.1 U-Net", "autoencoder", "text encoder", "scheduler", "SD 2.1 scheduler"])
def test_the_presets_of_sd_are_written_as_they_were_published(published, written):
    assert {key: written.get(key, "missing") for key in published} == published


@pytest.mark.parametrize("noise", [
    NoiseConfig(), NoiseConfig(num_train_timesteps=500, prediction_type="v_prediction"),
    NoiseConfig(prediction_type="sample"), ZERO_SNR,
    NoiseConfig(beta_schedule="linear", beta_start=1e-4, beta_end=0.02), NoiseConfig(beta_schedule="cosine"),
], ids=str)
def test_diffusers_makes_the_same_noise_schedule_of_our_config(noise):
    values = configs.noise_to_dict(noise)
    scheduler = getattr(diffusers, values["_class_name"]).from_config(values)
    assert torch.allclose(scheduler.alphas_cumprod.double(), NoiseSchedule(noise).alphas_cumprod, atol=1e-6)
    assert scheduler.config.prediction_type == noise.prediction_type
    scheduler.set_timesteps(10)
    assert (scheduler.timesteps[0] == noise.num_train_timesteps - 1) == noise.zero_terminal_snr
    assert int(scheduler.timesteps[-1]) == (noise.num_train_timesteps // 10 - 1 if noise.zero_terminal_snr else 1)


@pytest.mark.parametrize("counts, heads, head_dim", [
    (8, 8, None), ([8, 8, 8, 8], 8, None), ([5, 10, 20, 20], None, 64), ([10, 20, 40, 40], None, 32)], ids=str)
def test_counts_of_heads_are_one_number_or_one_width(counts, heads, head_dim):
    """As diffusers builds them, and written again as they were read."""
    found = configs.unet_from_dict(UNET_15 | {"attention_head_dim": counts})
    assert (found.heads, found.head_dim) == (heads, head_dim)
    assert [found.heads_at(width) for width in found.channels] == (counts if isinstance(counts, list) else [counts] * 4)
    assert configs.unet_from_dict(configs.unet_to_dict(found, 64)) == found
    newer = UNET_15 | {"attention_head_dim": 3, "num_attention_heads": counts}
    assert configs.unet_from_dict(newer) == found, "where both are given, the number of heads counts"


def test_heads_left_out_are_eight():
    """As in diffusers."""
    assert inspect.signature(UNet2DConditionModel.__init__).parameters["attention_head_dim"].default == 8
    without = {key: value for key, value in UNET_15.items() if key != "attention_head_dim"}
    assert configs.unet_from_dict(without) == configs.unet_from_dict(UNET_15)


@pytest.mark.parametrize("counts", [[5, 10, 20, 10], [10, 10, 20, 20], [4, 8, 8, 8]], ids=str)
def test_heads_without_one_number_or_one_width_are_refused(counts):
    with pytest.raises(CheckpointError, match="attention_head_dim is"):
        configs.unet_from_dict(UNET_15 | {"attention_head_dim": counts})


# What diffusers' networks can do beyond ours, by the key that asks for it.
ENCODER_OTHER = {
    "act_fn": "gelu", "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "mid_block_scale_factor": 2,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "norm_eps": 1e-6, "num_class_embeds": 10,
    "class_embed_type": "timestep", "addition_embed_type": "text", "encoder_hid_dim": 64,
    "transformer_layers_per_block": 2, "resnet_time_scale_shift": "scale_shift", "only_cross_attention": True}
OTHER = {
    "unet": ENCODER_OTHER | {"center_input_sample": True, "dual_cross_attention": True, "conv_in_kernel": 1,
                             "conv_out_kernel": 1, "time_embedding_type": "fourier"},
    "controlnet": ENCODER_OTHER | {"encoder_hid_dim_type": "text_proj", "global_pool_conditions": True,
                                   "controlnet_conditioning_channel_order": "bgr"},
    "vae": {"act_fn": "gelu", "mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False,
            "shift_factor": 0.1, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
}
FORMS = {
    "unet": (UNet2DConditionModel, configs.unet_from_dict, configs.unet_to_dict(PRESETS["tiny"].unet, 16)),
    "controlnet": (ControlNetModel, configs.controlnet_from_dict, configs.controlnet_to_dict(
        ControlNetConfig(PRESETS["tiny"].unet))),
    "vae": (AutoencoderKL, configs.vae_from_dict, configs.vae_to_dict(PRESETS["tiny"].vae, 32)),
}


@pytest.mark.parametrize("part, key", [(part, key) for part, keys in OTHER.items() for key in keys])
def test_what_our_networks_do_in_one_way_is_written_out_and_nothing_else_read(part, key):
    """The value that is written is diffusers' default, so a config without the key means the same."""
    theirs, read, values = FORMS[part]
    assert key in values and values[key] == inspect.signature(theirs.__init__).parameters[key].default
    with pytest.raises(CheckpointError, match=f"{key} is .* can be read"):
        read(values | {key: OTHER[part][key]})
    assert read({name: value for name, value in values.items() if name != key}) == read(values)


@pytest.mark.parametrize("part", FORMS)
def test_diffusers_knows_every_key_that_is_written(part):
    theirs, _, values = FORMS[part]
    known = set(inspect.signature(theirs.__init__).parameters) | {"_class_name"}
    assert set(values) <= known
    assert values["_class_name"] == theirs.__name__


@pytest.mark.parametrize("read, part, key, value", [
    (configs.unet_from_dict, "unet", "act_fn", "gelu"),
    (configs.unet_from_dict, "unet", "addition_embed_type", "text_time"),
    (configs.unet_from_dict, "unet", "down_block_types", ["DownBlock2D", "AttnDownBlock2D"]),
    (configs.unet_from_dict, "unet", "up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"]),
    (configs.unet_from_dict, "unet", "attention_head_dim", [2, 3]),
    (configs.vae_from_dict, "vae", "shift_factor", 0.1),
    (configs.vae_from_dict, "vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 2),
    (configs.text_from_dict, "text_encoder", "layer_norm_eps", 1e-6),
    (configs.vision_from_dict, "vision", "layer_norm_eps", 1e-6),
    (configs.noise_from_dict, "scheduler", "trained_betas", [0.1, 0.2]),
    (configs.noise_from_dict, "scheduler", "beta_schedule", "exponential"),
    (configs.noise_from_dict, "scheduler", "prediction_type", "flow"),
])
def test_what_our_classes_cannot_do_is_refused_by_name(written, read, part, key, value):
    [file] = (written / part).glob("*config.json") if part != "scheduler" else (written / part).glob("*.json")
    values = json.loads(file.read_text())
    read(values)
    with pytest.raises(CheckpointError, match=key):
        read(values | {key: value})


def theirs(make):
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()
                if not name.endswith("position_ids")}


@pytest.mark.parametrize("config", [
    PRESETS["tiny"].unet, PRESETS["mini"].unet,
    replace(PRESETS["tiny"].unet, heads=None, head_dim=4, linear_projection=True, in_channels=9),
], ids=["tiny", "mini", "as SD 2.x inpainting"])
def test_diffusers_builds_the_same_unet_from_our_config(config):
    values = configs.unet_to_dict(config, 16)
    assert theirs(lambda: UNet2DConditionModel.from_config(values)) == theirs(lambda: UNet(config))


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_the_libraries_build_the_same_autoencoder_and_encoders_from_our_configs(name):
    config = PRESETS[name]
    values = configs.vae_to_dict(config.vae, config.image_size)
    assert theirs(lambda: AutoencoderKL.from_config(values)) == theirs(lambda: VAE(config.vae))
    ours = theirs(lambda: CLIP(config.text, config.vision))
    text = theirs(lambda: CLIPTextModel(CLIPTextConfig(**configs.text_to_dict(config.text))))
    assert {f"text_model.{name.removeprefix('text_model.')}": shape for name, shape in text.items()} == {
        name: shape for name, shape in ours.items() if name.startswith("text_model.")}
    vision = theirs(lambda: CLIPVisionModelWithProjection(
        CLIPVisionConfig(**configs.vision_to_dict(config.vision))))
    assert vision == {name: shape for name, shape in ours.items() if name.startswith("vis")}


# --- save and load ----------------------------------------------------------------------------------

@pytest.mark.parametrize("noise", [EPSILON, ZERO_SNR], ids=["epsilon", "zero SNR"])
def test_what_is_saved_in_float32_is_loaded_bit_by_bit(noise, tmp_path):
    parts = tiny_parts(noise)
    again = load_folder(save_folder(tmp_path / "tiny", parts))
    assert again.config == parts.config
    assert again.world == parts.world
    assert again.tokenizer.encode("a red appletree!") == parts.tokenizer.encode("a red appletree!")
    for name in MODULES:
        ours, theirs = getattr(parts, name).state_dict(), getattr(again, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
        assert not getattr(again, name).training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_half_the_size_and_load_as_float32(parts, written, tmp_path, dtype):
    folder = save_folder(tmp_path / "half", parts, dtype=dtype)
    assert load_file(folder / UNET)["conv_in.weight"].dtype == dtype
    assert (folder / UNET).stat().st_size < 0.7 * (written / UNET).stat().st_size
    again = load_folder(folder)
    for name in MODULES:
        for key, tensor in getattr(again, name).state_dict().items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, getattr(parts, name).state_dict()[key].to(dtype).float()), key


def test_a_folder_can_be_loaded_in_another_precision(written):
    again = load_folder(written, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in again.unet.state_dict().values()} == {torch.bfloat16}


def test_clip_shares_the_text_encoder_that_the_unet_listens_to(written):
    again = load_folder(written)
    assert again.clip.text_model is again.text_encoder
    assert all(a is b for a, b in zip(again.clip.text_model.parameters(), again.text_encoder.parameters(), strict=True))


def test_loaded_weights_do_not_hang_on_the_file(folder):
    again = load_folder(folder)
    before = again.unet.conv_in.weight.clone()
    file = folder / UNET
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(again.unet.conv_in.weight, before)
    assert before.abs().max() > 0


def test_a_model_without_vision_and_world_is_whole(tmp_path):
    parts = tiny_parts(vision=False)
    parts.world = None
    folder = save_folder(tmp_path / "tiny", parts)
    again = load_folder(folder)
    assert again.config == parts.config
    assert again.clip is None and again.world is None
    assert not (folder / "vision").exists()


@pytest.mark.parametrize("pad_with_end", [True, False])
def test_padding_is_kept(parts, tmp_path, pad_with_end):
    config = replace(tiny_config(), text=replace(tiny_config().text, pad_with_end=pad_with_end))
    own = tiny_parts(config=config)
    own.tokenizer.pad_with_end = pad_with_end
    again = load_folder(save_folder(tmp_path / "tiny", own))
    assert again.config.text.pad_with_end == again.tokenizer.pad_with_end == pad_with_end


@pytest.mark.parametrize("pad_with_end", [True, False])
def test_transformers_reads_the_ids_of_start_end_and_padding(tmp_path, pad_with_end):
    """The same from the text encoder's config as from the tokenizer: SD 1.x pads with the end, SD 2.x with id 0."""
    own = tiny_parts(config=replace(tiny_config(), text=replace(tiny_config().text, pad_with_end=pad_with_end)))
    own.tokenizer.pad_with_end = pad_with_end
    folder = save_folder(tmp_path / "tiny", own)
    config = CLIPTextConfig.from_pretrained(folder / "text_encoder")
    words = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert (config.bos_token_id, config.eos_token_id) == (words.bos_token_id, words.eos_token_id)
    assert config.pad_token_id == words.pad_token_id == (words.eos_token_id if pad_with_end else 0)
    assert words("a cat", padding="max_length").input_ids == own.tokenizer("a cat", 77).tolist()[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_transformers_computes_in_float32_whatever_the_files_are(parts, tmp_path, dtype):
    folder = save_folder(tmp_path / "tiny", parts, dtype=dtype)
    assert CLIPTextModel.from_pretrained(folder / "text_encoder").dtype == torch.float32


def test_text_encoders_are_read_in_all_spellings(folder):
    """Without the prefix, as the newest transformers writes; with the positions that the oldest wrote."""
    wanted = load_folder(folder).text_encoder.state_dict()
    rewrite(folder / TEXT, lambda tensors: {
        **{name.removeprefix("text_model."): tensor for name, tensor in tensors.items()},
        "text_model.embeddings.position_ids": torch.arange(77)[None]})
    again = load_folder(folder).text_encoder.state_dict()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


# --- writing ----------------------------------------------------------------------------------------

def test_an_existing_folder_is_updated_and_what_is_no_model_stays(folder):
    (folder / "README.md").write_text("card")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    parts = tiny_parts(ZERO_SNR, vision=False)
    randomise(parts.unet, torch.Generator().manual_seed(5))
    save_folder(folder, parts)
    again = load_folder(folder)
    assert again.config == parts.config
    assert torch.equal(again.unet.conv_in.weight, parts.unet.conv_in.weight)
    assert (folder / "README.md").read_text() == "card"
    assert not (folder / "tokenizer" / "tokenizer.json").exists()
    assert not (folder / "vision" / "config.json").exists()


def test_all_files_can_be_read_by_whoever_may_read_the_user_s_files(written):
    assert len({file.stat().st_mode for file in written.rglob("*") if file.is_file()}) == 1


def test_a_failed_save_leaves_the_old_folder_and_nothing_beside(folder, monkeypatch):
    before = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    saved = []

    def full_disk(tensors, file, metadata):
        saved.append(file)
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata)

    monkeypatch.setattr(checkpoint_files, "save_file", full_disk)
    with pytest.raises(OSError, match=f"{folder} cannot be written: No space left"):
        save_folder(folder, tiny_parts(ZERO_SNR))
    after = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert after == before
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    parts = tiny_parts()
    with torch.no_grad():
        parts.vae.decoder.conv_in.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match="decoder.conv_in.bias.*not finite"):
        save_folder(tmp_path / "tiny", parts)
    assert not list(tmp_path.iterdir())


def test_what_float16_cannot_hold_is_not_saved_in_it(tmp_path):
    parts = tiny_parts()
    with torch.no_grad():
        parts.unet.conv_in.bias[0] = 1e6
    with pytest.raises(CheckpointError, match="conv_in.bias.*float16"):
        save_folder(tmp_path / "tiny", parts, dtype=torch.float16)
    save_folder(tmp_path / "tiny", parts)


def test_a_place_that_cannot_be_written_is_named(parts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file.tiny cannot be written"):
        save_folder(tmp_path / "file" / "tiny", parts)


# --- damage -----------------------------------------------------------------------------------------

def test_every_wrong_tensor_is_named(folder):
    def damage(tensors):
        del tensors["conv_in.weight"], tensors["time_embedding.linear_1.bias"]
        return {**tensors, "conv_out.bias": torch.zeros(7), "another.weight": torch.zeros(2)}

    rewrite(folder / UNET, damage)
    with pytest.raises(TensorMismatch) as caught:
        load_folder(folder)
    error = caught.value
    assert error.missing == ["conv_in.weight", "time_embedding.linear_1.bias"]
    assert error.unexpected == ["another.weight"]
    assert error.misshaped == [("conv_out.bias", (7,), (4,))]
    told = str(error)
    assert "2 missing, 1 unexpected, 1 of another shape" in first_line(error)
    assert UNET in first_line(error).replace("\\", "/")
    for name in ("conv_in.weight", "time_embedding.linear_1.bias", "another.weight"):
        assert f": {name}" in told
    assert "conv_out.bias is [7], the config asks for [4]" in told


@pytest.mark.parametrize("file", [UNET, VAE_FILE, TEXT, VISION])
@pytest.mark.parametrize("damage", ["cut short", "cut in its header", "empty", "text", "missing", "a folder"])
def test_damaged_weights_are_one_sentence_that_names_the_file(folder, file, damage):
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    match damage:
        case "cut short":
            path.write_bytes(content[:-7])
        case "cut in its header":
            path.write_bytes(content[:40])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_bytes(b"version https://example.org/pointer\nsize 12345\n")
        case "a folder":
            path.mkdir()
    with pytest.raises(CheckpointError) as caught:
        load_folder(folder)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(folder):
    header = json.dumps({"conv_in.weight": {"dtype": "F32", "shape": [10**9, 10**6],
                                            "data_offsets": [0, 4 * 10**15]}}).encode()
    (folder / UNET).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        load_folder(folder)


JSON_FILES = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "vision/config.json",
              "scheduler/scheduler_config.json", "tokenizer/vocab.json")


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize("content", ['{"half": ', "[1, 2]", "{}", b"\xff\xfe\x00"], ids=str)
def test_damaged_configs_are_one_sentence_that_names_the_file(folder, file, content):
    path = folder / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        load_folder(folder)
    assert str(path if file != "tokenizer/vocab.json" else path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", [*sorted(set(JSON_FILES) - {"vision/config.json"}), "tokenizer/merges.txt",
                                  "model_index.json"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=file.rpartition("/")[2]):
        load_folder(folder)


def test_default_sampling_settings_are_stored_with_the_model(tmp_path):
    parts = tiny_parts(config=replace(PRESETS["tiny"], sampling=SamplingConfig(12, 2.5)))
    folder = save_folder(tmp_path / "model", parts)
    assert load_folder(folder).config.sampling == SamplingConfig(12, 2.5)
    assert load_single(save_single(tmp_path / "model.safetensors", parts)).config.sampling == SamplingConfig(12, 2.5)
    (folder / "sampling.json").unlink()
    assert load_folder(folder).config.sampling == SamplingConfig(50, 7.5), "Stable Diffusion's, as in diffusers"


@pytest.mark.parametrize("values", [{}, {"num_inference_steps": 0, "guidance_scale": 3},
                                    {"num_inference_steps": 2.5, "guidance_scale": 3},
                                    {"num_inference_steps": 20, "guidance_scale": "3"},
                                    {"num_inference_steps": 20, "guidance_scale": float("nan")}], ids=str)
def test_damaged_default_sampling_settings_are_reported(folder, values):
    (folder / "sampling.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="sampling.json"):
        load_folder(folder)


@pytest.mark.parametrize("world", [{}, {"objects": ["cat"]}, {"objects": ["cat"], "words": "cat"},
                                   {"objects": [1], "words": []}], ids=str)
def test_a_world_that_is_no_lists_of_words_is_refused(folder, world):
    (folder / "world.json").write_text(json.dumps(world))
    with pytest.raises(CheckpointError, match="world.json"):
        load_folder(folder)


def test_parts_of_different_models_are_told_before_any_tensor_is_read(folder):
    edit(folder / "unet" / "config.json", cross_attention_dim=24)
    with pytest.raises(CheckpointError, match="24 wide.*16 wide"):
        load_folder(folder)
    edit(folder / "unet" / "config.json", cross_attention_dim=16)
    edit(folder / "text_encoder" / "config.json", vocab_size=520)
    with pytest.raises(CheckpointError, match="room for 520 tokens"):
        load_folder(folder)


def test_a_tokenizer_must_fit_into_the_text_encoders_vocabulary(folder):
    """To the token: one more is refused, as many fit."""
    file = folder / "text_encoder" / "config.json"
    known = load_folder(folder).tokenizer.vocab_size
    edit(file, vocab_size=known - 1)
    with pytest.raises(CheckpointError, match=f"room for {known - 1} tokens, but the tokenizer .* knows {known}"):
        load_folder(folder)
    edit(file, vocab_size=known)
    with pytest.raises(TensorMismatch):         # the vocabulary is large enough, the file's tensor is not
        load_folder(folder)


def test_config_values_of_the_wrong_kind_are_told(folder):
    edit(folder / "unet" / "config.json", block_out_channels=8)
    with pytest.raises(CheckpointError, match="unet.config.json cannot be read"):
        load_folder(folder)


def test_a_folder_that_is_no_model_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="is not a model folder"):
        load_folder(tmp_path)
