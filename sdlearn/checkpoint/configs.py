"""Our config dataclasses as the config.json files of diffusers and transformers, and back.

Each part has two functions, `x_to_dict(config)` and `x_from_dict(values)`. What our classes do in one
way only (SiLU, the order of sine and cosine, ...) is written from a table of fixed values, and a
config that asks for anything else is refused with the key's name, never passed over.
"""

import math
from numbers import Real

from ..config import ControlNetConfig, NoiseConfig, SamplingConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from .errors import CheckpointError

ATTENDING, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"

UNET_FIXED = {
    "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1, "flip_sin_to_cos": True,
    "freq_shift": 0, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5, "dual_cross_attention": False, "num_class_embeds": None, "class_embed_type": None,
    "addition_embed_type": None, "encoder_hid_dim": None, "time_embedding_type": "positional",
    "transformer_layers_per_block": 1, "resnet_time_scale_shift": "default", "only_cross_attention": False,
    "conv_in_kernel": 3, "conv_out_kernel": 3,
}
CONTROL_FIXED = {
    "_class_name": "ControlNetModel", "act_fn": "silu", "downsample_padding": 1, "flip_sin_to_cos": True,
    "freq_shift": 0, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5, "num_class_embeds": None, "class_embed_type": None, "addition_embed_type": None,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "transformer_layers_per_block": 1,
    "resnet_time_scale_shift": "default", "only_cross_attention": False,
    "controlnet_conditioning_channel_order": "rgb", "global_pool_conditions": False,
}
VAE_FIXED = {"act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True,
             "use_post_quant_conv": True, "shift_factor": None, "latents_mean": None, "latents_std": None}
CLIP_FIXED = {"layer_norm_eps": 1e-5}
# transformers computes in the type named here, whatever the file is written in, unless told otherwise.
CLIP_SPARE = {"attention_dropout": 0.0, "initializer_factor": 1.0, "initializer_range": 0.02, "dtype": "float32"}
SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}


# --- U-Net: diffusers' UNet2DConditionModel ---------------------------------------------------------

def unet_to_dict(config: UNetConfig, latent_size: int) -> dict:
    """`latent_size` is the side of the latents the model was trained at, a default for images' size."""
    encoder = _encoder_to_dict(config)
    return {
        "_class_name": "UNet2DConditionModel",
        **UNET_FIXED,
        "sample_size": latent_size,
        **encoder,
        "out_channels": config.out_channels,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(encoder["down_block_types"])],
    }


def unet_from_dict(values: dict) -> UNetConfig:
    _check_fixed(values, UNET_FIXED)
    encoder, down = _encoder_from_dict(values), values["down_block_types"]
    if values["up_block_types"] != [name.replace("Down", "Up") for name in reversed(down)]:
        raise CheckpointError(f"up_block_types is {values['up_block_types']}, which does not mirror {down}")
    return UNetConfig(out_channels=values["out_channels"], **encoder)


def _encoder_to_dict(config: UNetConfig) -> dict:
    """What the configs of a U-Net and a ControlNet have in common: the half that both consist of."""
    return {
        "in_channels": config.in_channels,
        "block_out_channels": list(config.channels),
        "down_block_types": [ATTENDING if attends else PLAIN for attends in config.attention],
        "layers_per_block": config.layers_per_block,
        # diffusers gives the number of heads under the name of their width.
        "attention_head_dim": config.heads or [config.heads_at(width) for width in config.channels],
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.groups,
    }


def _encoder_from_dict(values: dict) -> dict:
    """The same as arguments of UNetConfig."""
    down, channels = values["down_block_types"], tuple(values["block_out_channels"])
    if not set(down) <= {ATTENDING, PLAIN}:
        raise CheckpointError(f"down_block_types is {down}, but only {ATTENDING} and {PLAIN} can be read")
    return {
        "in_channels": values["in_channels"], "channels": channels,
        "attention": tuple(name == ATTENDING for name in down), "layers_per_block": values["layers_per_block"],
        **_heads(values.get("num_attention_heads") or values.get("attention_head_dim", 8), channels),
        "context_dim": values["cross_attention_dim"],
        "linear_projection": values.get("use_linear_projection", False),
        "groups": values.get("norm_num_groups", 32),
    }


def _heads(counts: int | list[int], channels: tuple[int, ...]) -> dict[str, int | None]:
    """A number counts the heads of each level alike; a list, as SD 2.x has it, gives heads of one width."""
    if isinstance(counts, int):
        return {"heads": counts, "head_dim": None}
    widths = {width / count for width, count in zip(channels, counts, strict=True)}
    if len(widths) == 1:
        return {"heads": None, "head_dim": int(widths.pop())}
    if len(set(counts)) == 1:
        return {"heads": counts[0], "head_dim": None}
    raise CheckpointError(f"attention_head_dim is {counts}: no one number and no one width of heads")


# --- ControlNet: diffusers' ControlNetModel ----------------------------------------------------------

def controlnet_to_dict(config: ControlNetConfig) -> dict:
    return {
        **CONTROL_FIXED,
        **_encoder_to_dict(config.unet),
        "conditioning_channels": config.hint_channels,
        "conditioning_embedding_out_channels": list(config.hint_widths),
    }


def controlnet_from_dict(values: dict) -> ControlNetConfig:
    """A ControlNet has no output of its own; the U-Net's is taken to have the channels of its input."""
    _check_fixed(values, CONTROL_FIXED)
    encoder = _encoder_from_dict(values)
    return ControlNetConfig(
        unet=UNetConfig(out_channels=encoder["in_channels"], **encoder),
        hint_channels=values.get("conditioning_channels", 3),       # the first ControlNets are older than the key
        hint_widths=tuple(values["conditioning_embedding_out_channels"]),
    )


# --- autoencoder: diffusers' AutoencoderKL ----------------------------------------------------------

def vae_to_dict(config: VAEConfig, image_size: int) -> dict:
    levels = len(config.channels)
    return {
        "_class_name": "AutoencoderKL",
        **VAE_FIXED,
        "sample_size": image_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.groups,
        "scaling_factor": config.scaling_factor,
        "force_upcast": False,
    }


def vae_from_dict(values: dict) -> VAEConfig:
    _check_fixed(values, VAE_FIXED)
    if set(values["down_block_types"]) != {"DownEncoderBlock2D"}:
        raise CheckpointError(f"down_block_types is {values['down_block_types']}, but only "
                              "DownEncoderBlock2D can be read")
    return VAEConfig(
        in_channels=values["in_channels"], latent_channels=values["latent_channels"],
        channels=tuple(values["block_out_channels"]), layers_per_block=values["layers_per_block"],
        groups=values.get("norm_num_groups", 32),
        scaling_factor=values.get("scaling_factor", 0.18215),   # left out by the first SD 1.x folders
    )


# --- encoders: transformers' CLIPTextModel and CLIPVisionModelWithProjection ---------------------------

def text_to_dict(config: TextConfig, start: int | None = None, end: int | None = None) -> dict:
    """`start` and `end` are the tokenizer's ids, by default the last two of the vocabulary."""
    end = config.vocab_size - 1 if end is None else end
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "dtype": "float32",         # to compute in: without it transformers keeps that of a half-precision file
        **CLIP_FIXED, **CLIP_SPARE,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.length,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "projection_dim": config.projection_dim,
        "bos_token_id": config.vocab_size - 2 if start is None else start,
        "eos_token_id": end,
        "pad_token_id": end if config.pad_with_end else 0,
    }


def text_from_dict(values: dict, pad_with_end: bool = True) -> TextConfig:
    """Padding is the tokenizer's affair: nothing pads with the pad_token_id of SD's text encoders."""
    _check_fixed(values, CLIP_FIXED)
    return TextConfig(
        vocab_size=values["vocab_size"], dim=values["hidden_size"], layers=values["num_hidden_layers"],
        heads=values["num_attention_heads"], mlp_dim=values["intermediate_size"],
        length=values["max_position_embeddings"], activation=values["hidden_act"],
        projection_dim=values["projection_dim"], pad_with_end=pad_with_end,
    )


def vision_to_dict(config: VisionConfig) -> dict:
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        **CLIP_FIXED, **CLIP_SPARE,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "hidden_act": config.activation,
        "projection_dim": config.projection_dim,
    }


def vision_from_dict(values: dict) -> VisionConfig:
    _check_fixed(values, CLIP_FIXED)
    return VisionConfig(
        image_size=values["image_size"], patch_size=values["patch_size"], dim=values["hidden_size"],
        layers=values["num_hidden_layers"], heads=values["num_attention_heads"],
        mlp_dim=values["intermediate_size"], activation=values["hidden_act"],
        projection_dim=values["projection_dim"],
    )


# --- noise schedule: the scheduler_config.json of diffusers' schedulers ------------------------------

def noise_to_dict(config: NoiseConfig) -> dict:
    """PNDM as in SD 1.x, or, where PNDM cannot follow (zero terminal SNR, x0 prediction), DDIM."""
    values = {
        "num_train_timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": SCHEDULES[config.beta_schedule],
        "trained_betas": None,
        "prediction_type": config.prediction_type,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
    }
    if config.zero_terminal_snr or config.prediction_type == "sample":
        # Only a trailing grid starts at the last timestep, the one that holds no signal.
        return {"_class_name": "DDIMScheduler", **values, "rescale_betas_zero_snr": config.zero_terminal_snr,
                "timestep_spacing": "trailing" if config.zero_terminal_snr else "leading"}
    return {"_class_name": "PNDMScheduler", **values, "skip_prk_steps": True, "timestep_spacing": "leading"}


def noise_from_dict(values: dict) -> NoiseConfig:
    _check_fixed(values, {"trained_betas": None})
    names = {theirs: ours for ours, theirs in SCHEDULES.items()}
    if values["beta_schedule"] not in names:
        raise CheckpointError(f"beta_schedule is '{values['beta_schedule']}', but only {', '.join(names)} "
                              "can be read")
    prediction = values.get("prediction_type", "epsilon")       # SD 1.x' files are older than the key
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise CheckpointError(f"prediction_type is '{prediction}', but only epsilon, v_prediction and sample "
                              "can be read")
    return NoiseConfig(
        num_train_timesteps=values["num_train_timesteps"], beta_start=values["beta_start"], beta_end=values["beta_end"],
        beta_schedule=names[values["beta_schedule"]], prediction_type=prediction,
        zero_terminal_snr=values.get("rescale_betas_zero_snr", False),
    )


# --- default sampling settings: a file of ours, in diffusers' words -----------------------------------

def sampling_to_dict(config: SamplingConfig) -> dict:
    return {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}


def sampling_from_dict(values: dict) -> SamplingConfig:
    steps, scale = values["num_inference_steps"], values["guidance_scale"]
    if type(steps) is not int or steps < 1:
        raise CheckpointError(f"num_inference_steps is {steps!r}, but must be a whole number from 1")
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise CheckpointError(f"guidance_scale is {scale!r}, but must be a finite number")
    return SamplingConfig(steps, float(scale))


def _check_fixed(values: dict, fixed: dict):
    """A key that is absent has its library's default, which is the value of the table."""
    for key, value in fixed.items():
        if values.get(key, value) not in (value, [value]):
            raise CheckpointError(f"{key} is {values[key]!r}, but only {value!r} can be read")
