"""diffusers' pipeline as its own documentation makes it fastest, without giving up precision."""

import torch
import torch._inductor

# What diffusers' guide "Accelerate inference" (docs/source/en/optimization/fp16.md, section torch.compile) sets in
# torch._inductor.config for maximum speed.
FLAGS = {"conv_1x1_as_mm": True, "coordinate_descent_tuning": True, "epilogue_fusion": False,
         "coordinate_descent_check_all_directions": True}


def speed_up(pipe, gpu: bool):
    """Change a pipeline of diffusers as the guide "Accelerate inference" says. Its images stay, up to rounding.

    channels_last, U-Net and decoder compiled whole; on a GPU as "max-autotune" with the compiler's `FLAGS`, and with
    the projections of every attention fused, which keeps the unfused ones in memory, too. The guide sets the flags for
    the whole process; here they are options of these two compilations, so that no other has them, and what others set
    around theirs is not lost. Of the guide is left out what changes precision: quantisation, TensorFloat-32.
    """
    if gpu:
        pipe.fuse_qkv_projections()
    options = torch._inductor.list_mode_options("max-autotune") | FLAGS if gpu else None
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    pipe.unet = torch.compile(pipe.unet, options=options, fullgraph=True)
    pipe.vae.decode = torch.compile(pipe.vae.decode, options=options, fullgraph=True)
