"""What a single file holds, read off the names and shapes of its tensors: none of them is read.

Widths, levels, layers and the levels with attention stand in the shapes. Where several tensors tell the same
number they vote, so that one that is missing or damaged does not change what the others are compared with.
What no tensor tells follows the published models: 8 heads where the text is 768 wide (SD 1.x), heads 64
wide where it is 1024 wide (SD 2.x), 32 groups, 4 channels out of the U-Net, the scaling factor, the noise
schedule.
"""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ..config import PRESETS, ControlNetConfig, ModelConfig, NoiseConfig, TextConfig, UNetConfig, VAEConfig
from .errors import CheckpointError
from .files import Shape
from .layouts import count_numbers

UNET, VAE = "model.diffusion_model.", "first_stage_model."
HF_TEXT, OPEN_CLIP_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
CONTROL = "control_model."
PREDICTIONS = ("epsilon", "v_prediction", "sample")

# Left beside the weights by the code that trained them, and the last layer of OpenCLIP's text encoder with
# what follows it, which Stable Diffusion 2.x does not run.
IGNORED = re.compile(
    r"model_ema\.|(first_stage_model\.)?loss\.|(betas|alphas_cumprod(_prev)?|scale_factor|logvar)$"
    r"|(sqrt|log_one_minus|posterior)_\w+$|.*\.embeddings\.position_ids$|.*\.attn_mask$"
    r"|cond_stage_model\.model\.(text_projection$|logit_scale$|transformer\.resblocks\.23\.)")

# What else people have in files of these kinds, told by a name that only it has.
OTHER_KINDS = {
    r"conditioner\.embedders\.": "Stable Diffusion XL",
    r"(model\.diffusion_model\.)?(joint_blocks|double_blocks)\.": "a later diffusion transformer",
    r".*(lora_(up|down|A|B)\b|\.lora\.)|lora_(unet|te)_": "a LoRA, which is added to a model",
    r".*(zero_convs|controlnet_down_blocks)\.": "a ControlNet, which works beside a model",
    r"(model\.)?(down_blocks|encoder\.down(_blocks)?|input_blocks|encoder\.layers|text_model)\.": "one part of a model",
    r"(string_to_param$|<.*>$|emb_params$)": "the embedding of a word",
}


def detect_config(file: Path, shapes: dict[str, Shape], prediction: str | None = None) -> ModelConfig:
    """The config of an SD 1.x or 2.x single file, from {name: shape}; it is named after the file.

    Raises CheckpointError for a file without one of the three parts, for another kind of model, and for an
    SD 2.x file without a `prediction`.
    """
    check_parts(file, shapes)
    unet, text = detect_unet(file, select_part(shapes, UNET)), detect_text_encoder(shapes)
    if text.dim != unet.context_dim:
        raise CheckpointError(f"{file} has a U-Net that reads text {unet.context_dim} wide, but its text encoder is "
                              f"{text.dim} wide; its parts are of different models, use another file.")
    if unet.in_channels not in (4, 9):
        raise CheckpointError(f"{file} has a U-Net of {unet.in_channels} input channels; only models with 4, from "
                              "text, and with 9, for inpainting, can be read.")
    newer = unet.context_dim == 1024
    if newer and prediction is None:
        raise CheckpointError(f"{file} is a Stable Diffusion 2.x, and its tensors do not tell what it predicts; give "
                              "prediction=\"epsilon\" for 2.0-base, 2.1-base and inpainting, \"v_prediction\" for "
                              "the models of 768 pixels.")
    noise = NoiseConfig(prediction_type=prediction or "epsilon")
    side = 768 if newer and noise.prediction_type == "v_prediction" else 512
    return ModelConfig(file.stem, unet, detect_vae(select_part(shapes, VAE)), text, None, noise, side)


def check_parts(file: Path, shapes: dict[str, Shape]):
    missing = [name for name, prefixes in (("U-Net", [UNET]), ("autoencoder", [VAE]),
                                           ("text encoder", [HF_TEXT, OPEN_CLIP_TEXT]))
               if not any(name.startswith(prefix) for name in shapes for prefix in prefixes)]
    if not missing:
        return
    for pattern, kind in OTHER_KINDS.items():
        if any(re.match(pattern, name) for name in shapes):
            raise CheckpointError(f"{file} holds {kind}, not a whole Stable Diffusion 1.x or 2.x in the layout of "
                                  "single files; give a file with U-Net, autoencoder and text encoder.")
    raise CheckpointError(f"{file} has no {' and no '.join(missing)}; give a single file with all parts of a Stable "
                          "Diffusion 1.x or 2.x.")


def select_part(shapes: dict[str, Shape], prefix: str) -> dict[str, Shape]:
    """The tensors of a part, without its prefix."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def detect_unet(file: Path, shapes: dict[str, Shape]) -> UNetConfig:
    """Of a U-Net's tensors or, as far as it goes, a ControlNet's, without their prefix."""
    halvings = [int(name.split(".")[1]) for name in shapes if re.match(r"input_blocks\.\d+\.0\.op\.", name)]
    blocks = count_numbers(shapes, r"input_blocks\.(\d+)\.")
    layers = max(1, min(halvings, default=blocks) - 1)
    rows = [range(first, first + layers) for first in range(1, blocks, layers + 1)]
    level = ["|".join(map(str, row)) for row in rows]
    context = majority_size(shapes, r".*\.attn2\.to_[kv]\.weight", 1, 768)
    if context not in (768, 1024):
        raise CheckpointError(f"{file} has a U-Net that reads text {context} wide; Stable Diffusion 1.x reads 768, "
                              "2.x 1024, and nothing in the file tells the heads of another.")
    ranks = Counter(len(shape) for name, shape in shapes.items() if re.fullmatch(r".*\.proj_(in|out)\.weight", name))
    return UNetConfig(
        in_channels=majority_size(shapes, r"input_blocks\.0\.0\.weight", 1, 4),
        channels=tuple(majority_size(shapes, rf"input_blocks\.({row})\.0\.(in_layers\.2|out_layers\.\d)\.\w+", 0, 320)
                       for row in level),
        attention=tuple(any(re.match(rf"input_blocks\.({row})\.1\.", name) for name in shapes) for row in level),
        layers_per_block=layers, heads=8 if context == 768 else None, head_dim=None if context == 768 else 64,
        context_dim=context, linear_projection=ranks.most_common(1) != [] and ranks.most_common(1)[0][0] == 2)


def detect_controlnet(file: Path, shapes: dict[str, Shape]) -> ControlNetConfig:
    """Of a ControlNet's tensors, without their prefix."""
    if not any(name.startswith("zero_convs.") for name in shapes):
        raise CheckpointError(f"{file} holds no ControlNet in the layout of single files; give one that does, or the "
                              "folder of a ControlNet to load_controlnet.")
    # The first convolution of the hint's network, and then every second one, gives a new width.
    widths = [majority_size(shapes, rf"input_hint_block\.{4 * i}\.\w+", 0, 16)
              for i in range((count_numbers(shapes, r"input_hint_block\.(\d+)\.") + 1) // 2)]
    return ControlNetConfig(detect_unet(file, shapes), majority_size(shapes, r"input_hint_block\.0\.weight", 1, 3),
                            tuple(widths) or (16,))


def detect_vae(shapes: dict[str, Shape]) -> VAEConfig:
    return VAEConfig(
        in_channels=majority_size(shapes, r"encoder\.conv_in\.weight", 1, 3),
        latent_channels=majority_size(shapes, r"post_quant_conv\.(weight|bias)", 0, 4),
        channels=tuple(majority_size(shapes, rf"encoder\.down\.{i}\.block\.\d+\.(conv\d|norm2)\.\w+", 0, 128)
                       for i in range(count_numbers(shapes, r"encoder\.down\.(\d+)\."))),
        layers_per_block=count_numbers(shapes, r"encoder\.down\.0\.block\.(\d+)\."))


def detect_text_encoder(shapes: dict[str, Shape]) -> TextConfig:
    """Of a whole file's tensors, in either layout of the text encoder; its activation follows its width."""
    names = select_part({name: shape for name, shape in shapes.items() if not IGNORED.match(name)}, "cond_stage_model.")
    dim = majority_size(names, r".*\.(layer_norm\d|final_layer_norm|ln_\d|ln_final)\.\w+", 0, 768)
    published = PRESETS["sd2_base" if dim == 1024 else "sd15"].text
    return replace(
        published, dim=dim, heads=max(1, dim // 64), projection_dim=dim,
        vocab_size=majority_size(names, r".*token_embedding\.weight", 0, published.vocab_size),
        length=majority_size(names, r".*position(al)?_embedding(\.weight)?", 0, published.length),
        mlp_dim=majority_size(names, r".*\.mlp\.(fc1|c_fc)\.\w+", 0, published.mlp_dim),
        layers=count_numbers(names, r".*?(?:encoder\.layers|resblocks)\.(\d+)\."))


def majority_size(shapes: dict[str, Shape], pattern: str, axis: int, default: int) -> int:
    """The size of an axis that most of the tensors have whose whole name fits `pattern`."""
    sizes = Counter(shape[axis] for name, shape in shapes.items()
                    if len(shape) > axis and re.fullmatch(pattern, name))
    return sizes.most_common(1)[0][0] if sizes else default
