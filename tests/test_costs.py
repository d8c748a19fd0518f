"""The FLOPs of a U-Net, counted without computing, are those of a real pass."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdlearn.config import PRESETS
from sdlearn.diagnostics.costs import (
    OperationCounter,
    conv_cost,
    fleet,
    layer_flops,
    peak_bytes,
    roofline_seconds,
    step_flops,
)
from sdlearn.unet import UNet


def test_step_flops_equal_those_of_a_computed_pass():
    config = PRESETS["classroom"].unet
    unet, counter = UNet(config), FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):    # whose two products are counted one by one
        unet(torch.zeros(1, 4, 16, 16), 500, torch.zeros(1, 77, config.context_dim))
    assert step_flops(config, 16) == counter.get_total_flops()
    assert 3.5 < step_flops(config, 32) / step_flops(config, 16) < 5


def test_layer_flops_equal_the_formulas():
    """A 3x3 convolution: two for each of 9 * inputs weights, each output channel and each cell."""
    counts = layer_flops(PRESETS["sd15"].unet, 64)
    assert sum(counts["conv_in"].values()) == 2 * 9 * 4 * 320 * 64**2
    assert sum(counts["mid_block.resnets.0.conv1"].values()) == 2 * 9 * 1280 * 1280 * 8**2
    assert sum(counts[""].values()) == step_flops(PRESETS["sd15"].unet, 64)


def test_peak_bytes_are_those_of_simultaneously_live_tensors():
    for device in ("cpu", "meta"):
        x = torch.empty(256, device=device)                     # 1024 bytes, there before
        assert peak_bytes(lambda x=x: ((x + 1) + 1) + 1) == 2048     # the result, and what it is made from
        assert peak_bytes(lambda x=x: [x + 1 for _ in range(5)]) == 5 * 1024
        assert peak_bytes(lambda x=x: [(x + 1).sum() for _ in range(5)]) == 1024 + 5 * 4
        assert peak_bytes(lambda x=x: x.view(2, 128).t().add_(1)) == 0    # views, and in place


def test_in_place_results_and_views_are_counted_once():
    def run():
        y = torch.zeros(100)
        return y.add_(1), y.view(10, 10), y.expand(5, 100)
    assert peak_bytes(run) == 400


@pytest.mark.parametrize("rows, columns, stride, kernel", [(4, 6, 1, 3), (5, 7, 2, 3), (3, 8, 1, 1)])
def test_conv_cost_equals_pytorchs_flop_counter(rows, columns, stride, kernel):
    layer = torch.nn.Conv2d(2, 5, kernel, stride, padding=kernel // 2)
    x = torch.zeros(3, 2, rows, columns)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = layer(x)
    flops, moved = conv_cost(rows, columns, 2, 5, kernel, stride=stride, batch=3, bytes_each=4)
    assert flops == counter.get_total_flops()
    assert moved == 4 * (x.numel() + y.numel() + sum(one.numel() for one in layer.parameters()))


def test_roofline_time_is_the_larger_of_compute_and_memory_for_each_operation():
    assert roofline_seconds([(100, 5), (10, 5)], 10, 1) == 15
    assert roofline_seconds([], 10, 1) == 0


def test_a_fleet_is_the_cheapest_that_is_in_time():
    seconds = {1: 1.0, 2: 1.6, 4: 2.8}
    assert fleet(10, seconds, 5, busy=0.7) == (4, 10)                   # 10 * 2.8 / 4 / 0.7
    assert fleet(10, seconds, 2, busy=0.7) == (2, 12)
    assert fleet(10, seconds, 1, busy=0.7) == (1, 15)
    assert fleet(0.5, seconds, 5, busy=0.7) == (1, 1), "a slow stream does not fill batches, and needs no more chips"
    with pytest.raises(ValueError, match="within 0.9 s"):
        fleet(10, seconds, 0.9)


def test_the_first_image_of_a_batch_waits_for_the_others():
    """(batch - 1) / rate, and then for the batch: at one image a second the last of four comes three seconds later."""
    seconds = {1: 0.5, 4: 0.5}
    assert fleet(1, seconds, 3.4, busy=0.25) == (1, 2)
    assert fleet(1, seconds, 3.5, busy=0.25) == (4, 1), "just in time"
    assert fleet(100, seconds, 0.53, busy=0.25) == (4, 50), "a fast stream fills a batch at once"
    with pytest.raises(ValueError, match="no batch is ready within 3.4 s"):
        fleet(1, {4: 0.5}, 3.4)
    with pytest.raises(ValueError, match="no batch is ready within 0.4 s"):
        fleet(1000, {1: 0.5}, 0.4)


def test_a_fleet_has_whole_chips_at_the_given_utilisation():
    assert fleet(7, {1: 1.0}, 2, busy=1.0) == (1, 7) and fleet(7.1, {1: 1.0}, 2, busy=1.0) == (1, 8)
    assert fleet(7, {1: 1.0}, 2, busy=0.5) == (1, 14)
    assert fleet(7, {1: 1.0}, 2) == fleet(7, {1: 1.0}, 2, busy=0.7) == (1, 10)
    assert fleet(8, {4: 4.0, 2: 2.0, 8: 8.0}, 20, busy=1.0) == (2, 8), "of equal fleets the smallest batch"


def test_views_are_not_counted_as_operations():
    for device in ("cpu", "meta"):
        x = torch.ones(4, 6, device=device)
        with OperationCounter() as started:
            x.view(6, 4).t()[1:].add(1).mul_(2)
        assert started.count == 2
