"""The roofline counts what PyTorch counts, and its bounds are those of the two peaks."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdlearn.bench.machine import PEAKS, Peak
from sdlearn.bench.roofline import (
    Work,
    by_kind,
    decoder_work,
    least_seconds,
    least_seconds_of_run,
    memory_ledger,
    watched,
    work,
)
from sdlearn.config import PRESETS
from sdlearn.diagnostics.costs import step_flops
from sdlearn.vae import VAE


@pytest.mark.parametrize("preset", ["tiny", "mini", "sd15", "sd21"])
def test_all_kinds_together_are_what_pytorch_counts(preset):
    config, side = PRESETS[preset].unet, PRESETS[preset].latent_size
    assert sum(one.flops for _, one in work(config, side, batch=1)) == step_flops(config, side)


def test_one_layer_by_hand():
    """A 3x3 convolution of 2 channels to 5 on 4 x 6: 18 multiplications and additions for each of 120 numbers."""
    found = []
    with watched(layer := nn.Conv2d(2, 5, 3, padding=1), 2, found):
        layer(torch.zeros(1, 2, 4, 6))
    assert found == [("convolutions", Work(1, 2 * 18 * 120, 2 * (48 + 120 + 5 * 2 * 9 + 5)))]
    layer(torch.zeros(1, 2, 4, 6))
    assert len(found) == 1, "afterwards nobody watches"


def test_a_layer_takes_the_slower_of_the_two():
    peak = Peak(flops=10.0, bandwidth=1.0)
    found = [("a", Work(1, 100, 5)), ("b", Work(1, 10, 5))]              # 10 s of arithmetic; 5 s of moving
    assert least_seconds(found, peak) == 15
    assert by_kind([*found, ("a", Work(1, 1, 1))])["a"] == Work(2, 101, 6)
    assert Work(1, 100, 5).intensity == 20


def test_a_batch_reuses_the_weights():
    """Twice the images, twice the arithmetic, less than twice the bytes."""
    once, twice = (Work() + sum((one for _, one in work(PRESETS["sd15"].unet, 64, batch)), Work()) for batch in (2, 4))
    assert twice.bytes < 1.9 * once.bytes and twice.flops == pytest.approx(2 * once.flops, rel=1e-3)


def test_the_published_roofline_of_an_h100():
    """About 490 guided steps a second, at the data sheet's peaks (Stable Diffusion 1.5, 512 x 512, bfloat16)."""
    assert 1 / least_seconds(work(PRESETS["sd15"].unet, 64), PEAKS["H100"]) == pytest.approx(490, rel=0.03)


def test_a_run_is_its_passes_and_the_decoder():
    config, peak = PRESETS["tiny"], PEAKS["H100"]
    side, decoding = config.latent_size, least_seconds(decoder_work(config.vae, config.latent_size, 3), peak)
    run = [least_seconds_of_run(config, config.image_size, peak, steps=steps, batch=3) for steps in (1, 4)]
    assert run[0] == pytest.approx(least_seconds(work(config.unet, side, batch=6), peak) + decoding)
    assert run[1] - run[0] == pytest.approx(3 * (run[0] - decoding))
    alone = least_seconds_of_run(config, config.image_size, peak, steps=1, batch=3, guided=False, bytes_each=4)
    assert alone == pytest.approx(least_seconds(work(config.unet, side, 3, bytes_each=4), peak)
                                  + least_seconds(decoder_work(config.vae, side, 3, bytes_each=4), peak))


def test_the_ledger_counts_weights_and_maps():
    told = memory_ledger(PRESETS["sd15"], 512)
    assert told["weights of the U-Net"] == 2 * 859_520_964
    assert told["largest attention map"] == 2 * 2 * 8 * 4096**2             # a guided image, 8 heads, half precision
    assert told["latents"] == 2 * 2 * 4 * 64 * 64 and told["texts"] == 2 * 2 * 77 * 768
    assert told["decoder"] == 2 * 2 * 256 * 512 * 512                       # 256 channels in, 256 out, at full size
    large = memory_ledger(PRESETS["sd15"], 1024, batch=3)
    assert large["largest attention map"] == 3 * 16 * told["largest attention map"]
    assert large["decoder"] == 4 * told["decoder"], "images are decoded one by one"
    assert large["skips"] == 12 * told["skips"]


@pytest.mark.parametrize("preset", ["tiny", "sd15"])
def test_the_decoder_is_what_pytorch_counts_but_for_its_attention(preset):
    config, side = PRESETS[preset].vae, PRESETS[preset].latent_size
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        VAE(config).decode(torch.empty(2, config.latent_channels, side, side))
    products = 2 * 4 * side**4 * config.channels[-1]
    assert sum(one.flops for _, one in decoder_work(config, side, batch=2)) + products == counter.get_total_flops()
