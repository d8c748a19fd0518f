"""What only a GPU can show: a run that never waits, graphs that are replayed, the image that the CPU makes.

Without a GPU these are skipped; `tests/test_fullsize.py` proves on the meta device what can be proven there.
"""

from contextlib import contextmanager

import pytest
import torch

from sdlearn import StableDiffusion
from sdlearn.bench import Benchmark, list_steps, run_steps
from sdlearn.checkpoint.shipped import list_shipped_models
from sdlearn.config import PRESETS
from sdlearn.guidance import predict_x0
from sdlearn.inpaint import blended_denoise, repaint
from sdlearn.pipeline.cache import with_cache
from sdlearn.pipeline.compiled import CompiledUNet
from sdlearn.samplers import SAMPLERS, make_timesteps_for
from sdlearn.schedule import NoiseSchedule
from sdlearn.unet import UNet

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
shipped = pytest.mark.skipif("mini" not in list_shipped_models(), reason="the shipped weights are not here")


@contextmanager
def never_waiting():
    """Inside, PyTorch raises where the CPU would have to wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def network(preset="tiny"):
    torch.manual_seed(0)
    unet = UNet(PRESETS[preset].unet)
    for parameter in unet.conv_out.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return unet.cuda().requires_grad_(False)


def run(name, unet, way="plain", steps=4):
    config, schedule = PRESETS["tiny"], NoiseSchedule(PRESETS["tiny"].noise)
    grid, side = make_timesteps_for(name, schedule, steps), config.latent_size
    make = torch.Generator("cuda").manual_seed(1)
    x, known = (torch.randn(2, 4, side, side, device="cuda", generator=make) for _ in range(2))
    context, uncond = torch.randn(2, 2, 77, config.unet.context_dim, device="cuda", generator=make)
    mask = (torch.rand(1, 1, side, side, device="cuda", generator=make) > 0.5).float()
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    with never_waiting():
        denoise = predict_x0(with_cache(unet, [t for t, _ in grid]), schedule, context, uncond,
                             guidance_scale=5, guidance_rescale=0.5)
        sample = SAMPLERS[name]
        if way == "blended":
            denoise = blended_denoise(denoise, known, mask, x, schedule)
        if way == "repaint":
            sample = repaint(sample, known, mask, times=2)
        *_, last = sample(denoise, x, grid, schedule, generator=generators)
    return last.x


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_never_waits(name):
    assert run(name, network()).isfinite().all()


@pytest.mark.parametrize("way", ["blended", "repaint"])
def test_inpainting_never_waits(way):
    assert run("ddim", network(), way).isfinite().all()


def test_waiting_would_be_told():
    with pytest.raises(RuntimeError), never_waiting():
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_it_is_the_same_network(graphs):
    unet = network()
    compiled, config = CompiledUNet(unet, graphs=graphs), unet.config
    for t in (999, 500, 1):
        x = torch.randn(2, 4, 8, 8, device="cuda")
        context = torch.randn(2, 77, config.context_dim, device="cuda")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, t, context), unet(x, t, context), rtol=1e-3, atol=1e-3)


def test_every_exact_optimization_step_makes_the_same_image():
    benchmark = Benchmark(preset="tiny", device="cuda", rounds=1)
    steps = run_steps(benchmark, list_steps("cuda", steps=4, fewer=3))["optimization steps"]
    assert all(one["the same image"] and one["the first's image"] for one in steps if one["exact"])
    assert all(one["peak memory, MiB"] > 0 for one in steps)


@shipped
def test_the_image_is_the_cpus():
    images = [StableDiffusion.load(device=device).text2img("a red apple on a yellow background",
                                                           num_inference_steps=10, seed=0)[0]
                for device in ("cpu", "cuda")]
    a, b = (torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).int() for one in images)
    assert (a - b).abs().max() <= 3


@shipped
def test_memory_is_bounded_for_a_batch():
    """Decoding goes image by image: a batch of 8 takes little more than its latents, not 8 decoders."""
    model, peaks = StableDiffusion.load(device="cuda"), {}
    for batch in (1, 8):
        latents = torch.randn(batch, 4, 16, 16, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.decode(latents)
        peaks[batch] = torch.cuda.max_memory_allocated() - before
    assert peaks[8] < 2 * peaks[1]
