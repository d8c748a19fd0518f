"""The roofline model: FLOPs equal PyTorch's count, and times are those of the slower of two peaks."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdlearn.bench.peaks import PEAKS, Peak
from sdlearn.bench.roofline import (
    Work,
    decoder_work,
    least_seconds,
    least_seconds_of_run,
    memory_breakdown,
    record_work,
    sum_by_kind,
    unet_work,
)
from sdlearn.config import PRESETS
from sdlearn.diagnostics.costs import step_flops
from sdlearn.vae import VAE


@pytest.mark.parametrize("preset", ["tiny", "mini", "sd15", "sd21"])
def test_flops_over_all_kinds_equal_pytorchs_count(preset):
    config, side = PRESETS[preset].unet, PRESETS[preset].latent_size
    assert sum(one.flops for _, one in unet_work(config, side, batch=1)) == step_flops(config, side)


def test_work_of_one_convolution():
    """A 3x3 convolution of 2 channels to 5 on 4 x 6: 18 multiplications and additions for each of 120 numbers."""
    found = []
    with record_work(layer := nn.Conv2d(2, 5, 3, padding=1), 2, found):
        layer(torch.zeros(1, 2, 4, 6))
    assert found == [("convolutions", Work(1, 2 * 18 * 120, 2 * (48 + 120 + 5 * 2 * 9 + 5)))]
    layer(torch.zeros(1, 2, 4, 6))
    assert len(found) == 1, "hooks are removed"


def test_a_layer_takes_the_longer_of_arithmetic_and_memory_traffic():
    peak = Peak(flops=10.0, bandwidth=1.0)
    found = [("a", Work(1, 100, 5)), ("b", Work(1, 10, 5))]              # 10 s of arithmetic; 5 s of moving
    assert least_seconds(found, peak) == 15
    assert sum_by_kind([*found, ("a", Work(1, 1, 1))])["a"] == Work(2, 101, 6)
    assert Work(1, 100, 5).intensity == 20


def test_a_batch_reads_the_weights_once():
    """Twice the images, twice the arithmetic, less than twice the bytes."""
    once, twice = (sum((one for _, one in unet_work(PRESETS["sd15"].unet, 64, batch)), Work()) for batch in (2, 4))
    assert twice.bytes < 1.9 * once.bytes and twice.flops == pytest.approx(2 * once.flops, rel=1e-3)


def test_the_roofline_of_an_h100():
    """About 490 guided steps a second, at the data sheet's peaks (Stable Diffusion 1.5, 512 x 512, bfloat16)."""
    assert 1 / least_seconds(unet_work(PRESETS["sd15"].unet, 64), PEAKS["H100"]) == pytest.approx(490, rel=0.03)


def test_the_roofline_of_a_run_adds_passes_and_decoder():
    config, peak = PRESETS["tiny"], PEAKS["H100"]
    side, decoding = config.latent_size, least_seconds(decoder_work(config.vae, config.latent_size, 3), peak)
    run = [least_seconds_of_run(config, config.image_size, peak, steps=steps, batch=3) for steps in (1, 4)]
    assert run[0] == pytest.approx(least_seconds(unet_work(config.unet, side, batch=6), peak) + decoding)
    assert run[1] - run[0] == pytest.approx(3 * (run[0] - decoding))
    alone = least_seconds_of_run(config, config.image_size, peak, steps=1, batch=3, guided=False, element_size=4)
    assert alone == pytest.approx(least_seconds(unet_work(config.unet, side, 3, element_size=4), peak)
                                  + least_seconds(decoder_work(config.vae, side, 3, element_size=4), peak))


def test_memory_by_purpose_counts_weights_and_attention_maps():
    memory = memory_breakdown(PRESETS["sd15"], 512)
    assert memory["weights of the U-Net"] == 2 * 859_520_964
    assert memory["largest attention map"] == 2 * 2 * 8 * 4096**2             # a guided image, 8 heads, half precision
    assert memory["latents"] == 2 * 2 * 4 * 64 * 64 and memory["texts"] == 2 * 2 * 77 * 768
    assert memory["decoder"] == 2 * 2 * 256 * 512 * 512                       # 256 channels in, 256 out, at full size
    large = memory_breakdown(PRESETS["sd15"], 1024, batch=3)
    assert large["largest attention map"] == 3 * 16 * memory["largest attention map"]
    assert large["decoder"] == 4 * memory["decoder"], "images are decoded one by one"
    assert large["skips"] == 12 * memory["skips"]


@pytest.mark.parametrize("preset", ["tiny", "sd15"])
def test_decoder_flops_equal_pytorchs_count_but_for_attention(preset):
    config, side = PRESETS[preset].vae, PRESETS[preset].latent_size
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        VAE(config).decode(torch.empty(2, config.latent_channels, side, side))
    products = 2 * 4 * side**4 * config.channels[-1]
    assert sum(one.flops for _, one in decoder_work(config, side, batch=2)) + products == counter.get_total_flops()
