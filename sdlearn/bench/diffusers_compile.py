"""diffusers' pipeline in the fastest configuration that its own documentation has for full precision."""

import torch
import torch._inductor

# Options of torch._inductor that diffusers' guide "Accelerate inference" (docs/source/en/optimization/fp16.md, section
# torch.compile) sets for maximum speed.
INDUCTOR_OPTIONS = {"conv_1x1_as_mm": True, "coordinate_descent_tuning": True, "epilogue_fusion": False,
                    "coordinate_descent_check_all_directions": True}


def compile_pipeline(pipe, gpu: bool):
    """Compile a pipeline of diffusers in place, as the guide "Accelerate inference" does; images differ by rounding.

    channels_last, U-Net and decoder compiled whole; on a GPU in mode "max-autotune" with `INDUCTOR_OPTIONS`, and with
    the projections of every attention fused, while the unfused ones stay in memory. The guide sets the options for the
    whole process; here they belong to these two compilations alone. What changes precision is left out of the guide's
    steps: quantisation, TensorFloat-32.
    """
    if gpu:
        pipe.fuse_qkv_projections()
    options = torch._inductor.list_mode_options("max-autotune") | INDUCTOR_OPTIONS if gpu else None
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)
    pipe.unet = torch.compile(pipe.unet, options=options, fullgraph=True)
    pipe.vae.decode = torch.compile(pipe.vae.decode, options=options, fullgraph=True)
