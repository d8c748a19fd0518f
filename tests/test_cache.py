"""The cache of a sampling run: same outputs, each key, value and time embedding computed once."""

import pytest
import torch
from torch import nn

from sdlearn.attention import CrossAttention
from sdlearn.config import PRESETS
from sdlearn.controlnet import Control, ControlNet, add_control
from sdlearn.inpaint import nine_channels
from sdlearn.pipeline.cache import ConditioningCache, with_cache
from sdlearn.unet import UNet


class Counted(nn.Linear):
    """A linear layer that counts its calls."""

    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


@pytest.mark.parametrize("kind", ["plain", "controlled", "guess"])
def test_a_run_computes_keys_values_and_embeddings_once(kind, monkeypatch):
    """The outputs equal uncached ones, at timesteps of the run and at another, for two contexts in turn."""
    torch.manual_seed(0)
    unet = UNet(PRESETS["tiny"].unet).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.05)
    network, width = unet, unet.config.context_dim
    if kind != "plain":
        net = ControlNet.from_unet(unet, hint_widths=(4, 4))
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.05)
        network = add_control(unet, [Control(net, torch.rand(1, 3, 16, 16), guess_mode=kind == "guess")], batch=1)
    texts = [torch.randn(2, 7, width), torch.randn(2, 7, width)]
    calls = [(torch.randn(2, 4, 8, 8), t, text) for t in (900, 500.0, 20.5, 333.3) for text in texts]
    with torch.no_grad():
        wanted = [network(*call) for call in calls]
        layers = [layer for one in (unet, *([net] if kind != "plain" else [])) for layer in one.modules()
                  if isinstance(layer, CrossAttention) and layer.to_k.in_features == width != layer.to_q.in_features]
        embedding = [one.time_embedding.linear_1 for one in (unet, *([net] if kind != "plain" else []))]
        for linear in [*(layer.to_k for layer in layers), *embedding]:
            linear.__class__ = Counted
        monkeypatch.setattr(Counted, "calls", 0)
        run = with_cache(network, [900, 500, 20.5])
        for call, output in zip(calls, wanted, strict=True):
            torch.testing.assert_close(run(*call), output, rtol=1e-5, atol=1e-5)
    # Once for each layer and context; embeddings once for the run, and twice at the timestep that is not among them.
    assert layers and Counted.calls == len(texts) * len(layers) + 3 * len(embedding)


def test_a_cache_ends_with_its_run():
    """Weights that change between two runs have an effect in the second."""
    unet = UNet(PRESETS["tiny"].unet).eval()
    nn.init.normal_(unet.conv_out.weight)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, unet.config.context_dim)
    with torch.no_grad():
        with_cache(unet, [10])(x, 10, text)
        nn.init.normal_(unet.time_embedding.linear_2.weight)
        torch.testing.assert_close(with_cache(unet, [10])(x, 10, text), unet(x, 10, text))


def test_contexts_are_recognised_by_identity():
    """Equal numbers in another tensor, and another slice of one tensor, are other contexts."""
    cache, layer, context = ConditioningCache(), CrossAttention(8, 6, heads=2), torch.randn(4, 5, 6)
    first = cache.keys_values(layer, context)
    assert all(one is other for one, other in zip(first, cache.keys_values(layer, context), strict=True))
    assert torch.equal(first[0], layer.to_k(context)) and torch.equal(first[1], layer.to_v(context))
    assert cache.keys_values(layer, context.clone())[0] is not first[0]
    for rows in (slice(0, 2), slice(2, 4), slice(0, 4, 2)):
        part = context[rows]
        assert torch.equal(cache.keys_values(layer, part)[0], layer.to_k(part))
    other = CrossAttention(8, 6, heads=2)
    assert torch.equal(cache.keys_values(other, context)[0], other.to_k(context))


def test_contexts_do_not_lose_their_identity_when_they_are_deleted():
    """The cache holds them, so that no new tensor gets the identity of an old one."""
    cache, layer = ConditioningCache(), CrossAttention(8, 6, heads=2)
    for _ in range(50):
        context = torch.randn(1, 2, 6)
        assert torch.equal(cache.keys_values(layer, context)[0], layer.to_k(context))
        del context


def test_a_timestep_of_a_run_is_a_row_of_its_embeddings():
    """Repeated timesteps and whole numbers included; tensors, and numbers that are not of the run, are not cached."""
    unet, x = UNet(PRESETS["tiny"].unet), torch.zeros(2, 4, 8, 8)
    cache = ConditioningCache([900, 500.5, 900, 0])
    for t in (900, 900.0, 500.5, 0, 499, torch.tensor(900.0), torch.tensor([900.0, 3.0])):
        found, expected = cache.embed_time(unet, t, x), unet.embed_time(t, x)
        torch.testing.assert_close(found, expected)
    assert cache.embeddings[unet].shape == (3, *expected.shape[1:])


def test_a_cache_passes_through_an_inpainting_model_to_its_unet():
    config = PRESETS["tiny"].unet
    unet = UNet(type(config)(**{**vars(config), "in_channels": 9})).eval()
    nn.init.normal_(unet.conv_out.weight)
    run = nine_channels(unet, torch.ones(1, 1, 8, 8), torch.randn(1, 4, 8, 8))
    cached, x, context = with_cache(run, [10.0]), torch.randn(1, 4, 8, 8), torch.randn(1, 5, config.context_dim)
    with torch.no_grad():
        torch.testing.assert_close(cached(x, 10.0, context), run(x, 10.0, context))
    assert unet in cached.keywords["cache"].embeddings and cached.keywords["cache"].pairs
