"""Attention equals PyTorch's and diffusers', and recording its maps does not change it."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU as DiffusersGEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention import FeedForward as DiffusersFeedForward
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdlearn.attention import (
    GEGLU,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
    TransformerBlock,
    attend,
    attention_map,
    causal_attention,
    eager_attention,
    split_heads,
)
from sdlearn.diagnostics.attention import attention_cost, heat_maps, record_attention
from sdlearn.layers import Downsample, ResBlock, Upsample, timestep_embedding, zero_conv


def same(ours, reference, tolerance=1e-5):
    """Whether the largest difference is within `tolerance` of the reference's scale."""
    assert ours.shape == reference.shape
    assert reference.abs().max() > 0, "a reference of zeros would prove nothing"
    assert (ours - reference).abs().max() <= tolerance * reference.abs().max()


def randomise(module):
    """Random values everywhere, also in norms and in what starts at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def qkv(batch=2, queries=7, keys=5, channels=12):
    return (torch.randn(batch, queries, channels), torch.randn(batch, keys, channels),
            torch.randn(batch, keys, channels))


MASKS = {
    "none": None,
    "causal": torch.ones(7, 5, dtype=torch.bool).tril(),
    "keys": torch.tensor([True, True, False, True, False]),
    "samples": torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)[:, None, None],
    "heads": torch.randn(3, 1, 5),
    "full": torch.randn(2, 3, 7, 5),
}


# ---------------------------------------------------------------------------- attend

@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_attend_is_scaled_dot_product_attention(mask):
    q, k, v = qkv()
    heads = [x.view(2, -1, 3, 4).transpose(1, 2) for x in (q, k, v)]
    full = None if mask is None else mask.expand(2, 3, 7, 5)
    reference = F.scaled_dot_product_attention(*heads, attn_mask=full)
    reference = reference.transpose(1, 2).reshape(2, 7, 12)
    same(attend(q, k, v, 3, mask), reference)
    weights = attention_map(q, k, 3, mask)
    same((weights @ split_heads(v, 3)).transpose(1, 2).reshape(2, 7, 12), reference)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_rows_of_the_map_sum_to_one_and_masked_keys_have_weight_zero(mask):
    q, k, _ = qkv()
    weights = attention_map(q, k, 3, mask)
    assert weights.shape == (2, 3, 7, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 7))
    if mask is not None and mask.dtype == torch.bool:
        assert (weights[~mask.expand_as(weights)] == 0).all()


def test_scores_are_scaled_by_the_width_of_one_head():
    # Scores of 4 and 0 in each head of width 4: over sqrt(4) that is 2 and 0, not 4 / sqrt(8).
    q, k = torch.ones(1, 1, 8), torch.stack([torch.ones(8), torch.zeros(8)])[None]
    expected = math.exp(2) / (math.exp(2) + 1)
    torch.testing.assert_close(attention_map(q, k, 2)[0, :, 0, 0], torch.full((2,), expected))
    torch.testing.assert_close(attend(q, k, k, 2), torch.full((1, 1, 8), expected))


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 5))
def test_attention_is_invariant_to_the_order_of_keys(batch, queries, keys, heads, width):
    q, k, v = qkv(batch, queries, keys, heads * width)
    order = torch.randperm(keys)
    torch.testing.assert_close(attend(q, k[:, order], v[:, order], heads), attend(q, k, v, heads))


@pytest.mark.parametrize("context_dim", [None, 10])
def test_cross_attention_is_multihead_attention(context_dim):
    ours = CrossAttention(12, context_dim, heads=3)
    width = context_dim or 12
    torchs = nn.MultiheadAttention(12, 3, kdim=width, vdim=width, batch_first=True)
    weights = [ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]
    with torch.no_grad():       # its own biases of q, k and v start at zero
        if context_dim is None:
            torchs.in_proj_weight.copy_(torch.cat(weights))
        else:
            for mine, weight in zip((torchs.q_proj_weight, torchs.k_proj_weight, torchs.v_proj_weight),
                                    weights, strict=True):
                mine.copy_(weight)
        torchs.out_proj.load_state_dict(ours.to_out[0].state_dict())
    x = torch.randn(2, 7, 12)
    context = x if context_dim is None else torch.randn(2, 5, width)
    mask = torch.rand(7, context.shape[1]) < 0.6
    mask[:, 0] = True
    reference, maps = torchs(x, context, context, attn_mask=~mask, average_attn_weights=False)
    with record_attention(ours) as record:
        same(ours(x, None if context_dim is None else context, mask), reference)
    same(record.maps[""], maps)
    same(ours(x, None if context_dim is None else context, mask), reference)


@pytest.mark.parametrize(("shapes", "heads", "mask", "words"), [
    ([(2, 7, 12), (2, 5, 12), (2, 6, 12)], 3, None, "as many tokens"),
    ([(2, 7, 12), (2, 5, 8), (2, 5, 8)], 2, None, "one batch and width"),
    ([(2, 7, 12), (1, 5, 12), (1, 5, 12)], 3, None, "one batch and width"),
    ([(7, 12), (5, 12), (5, 12)], 3, None, "(batch, tokens, channels)"),
    ([(2, 7, 12), (2, 5, 12), (2, 5, 12)], 5, None, "5 heads"),
    ([(2, 7, 12), (2, 5, 12), (2, 5, 12)], 0, None, "0 heads"),
    ([(2, 7, 12), (2, 5, 12), (2, 5, 12)], 3, torch.ones(5, 7), "must broadcast to (2, 3, 7, 5)"),
    ([(2, 7, 12), (2, 5, 12), (2, 5, 12)], 3, torch.ones(1, 1, 1, 1, 5), "must broadcast"),
])
def test_attend_raises_for_shapes_that_do_not_fit(shapes, heads, mask, words):
    with pytest.raises(ValueError) as error:
        attend(*(torch.randn(shape) for shape in shapes), heads, mask)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_causal_attention_is_pytorchs():
    q, k, v = (torch.randn(2, 7, 12) for _ in range(3))
    heads = [x.view(2, 7, 3, 4).transpose(1, 2) for x in (q, k, v)]
    reference = F.scaled_dot_product_attention(*heads, is_causal=True)
    same(causal_attention(q, k, v, 3), reference.transpose(1, 2).reshape(2, 7, 12))


@pytest.mark.parametrize(("queries", "keys", "channels", "heads"), [(4096, 4096, 320, 8), (64, 77, 128, 4)])
def test_attention_cost_equals_pytorchs_flop_counter(queries, keys, channels, heads):
    q, k, v = (torch.empty(1, n, channels, dtype=torch.float16, device="meta") for n in (queries, keys, keys))
    with FlopCounterMode(display=False) as counter:
        weights = split_heads(q, heads) @ split_heads(k, heads).mT
        weights @ split_heads(v, heads)
    assert attention_cost(queries, keys, channels, heads) == (counter.get_total_flops(), weights.nbytes)
    assert attention_cost(queries, keys, channels, heads, bytes_each=4)[1] == 2 * weights.nbytes


# ---------------------------------------------------------------------------- blocks

def test_geglu_is_diffusers():
    reference = randomise(DiffusersGEGLU(6, 10))
    ours = GEGLU(6, 10)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 6)
    same(ours(x), reference(x), 1e-6)


def test_geglu_gates_with_the_second_half_by_the_exact_gelu():
    geglu = GEGLU(1, 1)
    with torch.no_grad():
        geglu.proj.weight.copy_(torch.tensor([[3.0], [1.0]]))
        geglu.proj.bias.zero_()
    value, gate = 3.0, 1.0
    exact = gate * 0.5 * (1 + math.erf(gate / math.sqrt(2)))
    assert geglu(torch.ones(1, 1)).item() == pytest.approx(value * exact, rel=1e-6)


def test_feed_forward_is_diffusers():
    reference = randomise(DiffusersFeedForward(8, activation_fn="geglu"))
    ours = FeedForward(8)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 8)
    same(ours(x), reference(x), 1e-6)


def test_transformer_block_is_diffusers():
    reference = randomise(BasicTransformerBlock(12, 3, 4, cross_attention_dim=10, activation_fn="geglu"))
    ours = TransformerBlock(12, 10, heads=3)
    ours.load_state_dict(reference.state_dict())
    x, context = torch.randn(2, 7, 12), torch.randn(2, 5, 10)
    same(ours(x, context), reference(x, encoder_hidden_states=context))


def test_linear_and_convolutional_projections_are_equal():
    conv, linear = (SpatialTransformer(8, 6, 2, linear=kind, groups=4) for kind in (False, True))
    randomise(conv)
    assert conv.proj_in.weight.shape == (8, 8, 1, 1) and linear.proj_in.weight.shape == (8, 8)
    linear.load_state_dict({k: v.flatten(1) if v.ndim == 4 else v for k, v in conv.state_dict().items()})
    x, context = torch.randn(2, 8, 5, 3), torch.randn(2, 4, 6)
    same(linear(x, context), conv(x, context), 1e-6)
    as_convolution = nn.Conv2d(8, 8, 1)
    as_convolution.load_state_dict(conv.proj_in.state_dict())
    same(conv.proj_in(x.flatten(2).mT), as_convolution(x).flatten(2).mT)


def test_an_untrained_transformer_is_the_identity():
    x = torch.randn(2, 8, 5, 3)
    assert torch.equal(SpatialTransformer(8, 6, 2, groups=4)(x, torch.randn(2, 4, 6)), x)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="10 channels cannot be split into 4 heads"):
        CrossAttention(10, heads=4)


# ---------------------------------------------------------------------------- layers

@given(st.lists(st.floats(0, 999), min_size=1, max_size=4), st.integers(1, 80))
def test_timestep_embedding_is_diffusers(timesteps, half):
    t = torch.tensor(timesteps)
    reference = get_timestep_embedding(t, 2 * half, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, 2 * half), reference, rtol=0, atol=2e-7)


def test_timestep_embedding_of_integers_cosines_first():
    embedding = timestep_embedding(torch.tensor([0, 999]), 8)
    assert embedding.dtype == torch.float32
    assert embedding[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert embedding[1, 1].item() == pytest.approx(math.cos(999 * 10000 ** (-1 / 4)), abs=1e-4)
    assert embedding[1, 7].item() == pytest.approx(math.sin(999 * 10000 ** (-3 / 4)), abs=1e-4)


@pytest.mark.parametrize("dim", [7, 0, -2])
def test_timestep_embedding_needs_an_even_width(dim):
    with pytest.raises(ValueError, match=f"even width of at least 2, not {dim}"):
        timestep_embedding(torch.zeros(1), dim)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (8, 12), (12, 8)])
def test_res_block_is_diffusers(inputs, outputs):
    reference = randomise(ResnetBlock2D(in_channels=inputs, out_channels=outputs, temb_channels=6, groups=4,
                                        eps=1e-5))
    ours = ResBlock(inputs, outputs, 6, groups=4)
    ours.load_state_dict(reference.state_dict())
    x, temb = torch.randn(2, inputs, 5, 3), torch.randn(2, 6)
    same(ours(x, temb), reference(x, temb))
    # One embedding for the whole batch is that embedding for each.
    same(ours(x, temb[:1]), reference(x, temb[:1].expand(2, -1)))


def test_an_untrained_res_block_is_the_identity():
    x = torch.randn(2, 8, 5, 3)
    assert torch.equal(ResBlock(8, 8, 6, groups=4)(x, torch.randn(2, 6)), x)


@given(st.integers(1, 9), st.integers(1, 9))
def test_upsample_undoes_the_size_of_downsample(h, w):
    x = torch.randn(1, 2, h, w)
    small = Downsample(2)(x)
    assert small.shape[2:] == (math.ceil(h / 2), math.ceil(w / 2))
    assert Upsample(2)(small, x.shape[2:]).shape == x.shape
    assert Upsample(2)(small).shape[2:] == (2 * small.shape[2], 2 * small.shape[3])


def test_upsample_repeats_cells():
    up = Upsample(1)
    with torch.no_grad():       # a convolution that passes its input on
        up.conv.weight.zero_()[0, 0, 1, 1] = 1
        up.conv.bias.zero_()
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    assert up(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_a_zero_convolution_outputs_zero_and_has_gradients():
    conv, x = zero_conv(4), torch.randn(2, 4, 5, 3, requires_grad=True)
    out = conv(x)
    assert torch.equal(out, torch.zeros(2, 4, 5, 3))
    out.square().add(out).sum().backward()
    assert conv.weight.grad.abs().min() > 0 and conv.bias.grad.abs().min() > 0
    assert torch.equal(x.grad, torch.zeros_like(x))


# ---------------------------------------------------------------------------- recording

def two_blocks():
    return randomise(nn.ModuleDict({"first": TransformerBlock(8, 6, 2), "second": TransformerBlock(8, 6, 4)}))


def run(blocks, x, context):
    for block in blocks.values():
        x = block(x, context)
    return x


def test_recording_returns_every_map_and_does_not_change_the_output():
    blocks, x, context = two_blocks(), torch.randn(3, 5, 8), torch.randn(3, 7, 6)
    plain = run(blocks, x, context)
    with record_attention(blocks) as record:
        same(run(blocks, x, context), plain)
    assert {name: tuple(m.shape) for name, m in record.maps.items()} == {
        "first.attn1": (3, 2, 5, 5), "first.attn2": (3, 2, 5, 7),
        "second.attn1": (3, 4, 5, 5), "second.attn2": (3, 4, 5, 7),
    }
    for weights in record.maps.values():
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert torch.equal(run(blocks, x, context), plain)


def test_recording_some_layers_and_the_latest_pass():
    blocks, context = two_blocks(), torch.randn(1, 7, 6)
    with record_attention(blocks, only="attn2") as record:
        run(blocks, torch.randn(1, 5, 8), context)
        assert set(record.maps) == {"first.attn2", "second.attn2"}
        x = torch.randn(1, 5, 8)
        run(blocks, x, context)
    first = blocks["first"]
    x = x + first.attn1(first.norm1(x))
    expected = attention_map(first.attn2.to_q(first.norm2(x)), first.attn2.to_k(context), 2)
    torch.testing.assert_close(record.maps["first.attn2"], expected)


def test_recordings_nest_and_end_after_an_error():
    blocks, x, context = two_blocks(), torch.randn(1, 5, 8), torch.randn(1, 7, 6)
    with record_attention(blocks) as outer:
        with pytest.raises(ZeroDivisionError), record_attention(blocks, only="first") as inner:
            run(blocks, x, context)
            raise ZeroDivisionError
        assert set(inner.maps) == {"first.attn1", "first.attn2"}
        assert set(outer.maps) == {"second.attn1", "second.attn2"}
        run(blocks, x, context)
        assert len(outer.maps) == 4
    assert all(m.attend is attend for m in blocks.modules() if isinstance(m, CrossAttention))


def test_recording_no_layer_raises():
    with pytest.raises(ValueError, match="no attention layer of this ModuleDict has 'attn3' in its name"):
        with record_attention(two_blocks(), only="attn3"):
            pass
    with pytest.raises(ValueError, match="nothing to record"):
        with record_attention(nn.Linear(2, 2)):
            pass


# ---------------------------------------------------------------------------- heat maps

@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_a_heat_map_is_highest_at_the_cell_that_attends_to_the_token(rows, columns, halvings):
    """All that token 1 gets, it gets from one cell: there the map is highest."""
    h, w = (-(-side // 2**halvings) for side in (rows, columns))
    row, column = h // 2, w - 1
    weights = torch.zeros(1, 2, h * w, 3)
    weights[..., 0] = 1
    weights[:, :, row * w + column] = torch.tensor([0.0, 1.0, 0.0])
    shown = heat_maps({"layer": weights}, (rows, columns))
    assert shown.shape == (1, 3, rows, columns)
    torch.testing.assert_close(shown.sum(dim=1), torch.ones(1, rows, columns))
    at = shown[0, 1].amax(dim=1).argmax() * h // rows, shown[0, 1].amax(dim=0).argmax() * w // columns
    assert at == (row, column)


def test_heat_maps_are_means_over_heads_and_layers():
    fine, coarse = torch.rand(2, 3, 24, 5), torch.rand(2, 4, 6, 5)              # 4 x 6 and 2 x 3 cells
    alone = [heat_maps({"": one}, (8, 12)) for one in (fine, coarse)]
    torch.testing.assert_close(heat_maps({"a": fine, "b": coarse}, (8, 12)), (alone[0] + alone[1]) / 2)
    torch.testing.assert_close(heat_maps({"a": fine}, (4, 6)).flatten(2).mT, fine.mean(dim=1))


def test_heat_maps_are_enlarged_bilinearly():
    """Between the centres of two cells the weights change linearly; past the outermost centres they are constant."""
    weights = torch.tensor([[0.9, 0.1], [0.1, 0.9]])[None, None]                # (B, H, N, M), two cells in one row
    shown = heat_maps({"": weights}, (1, 4))
    torch.testing.assert_close(shown[0, :, 0], torch.tensor([[0.9, 0.7, 0.3, 0.1], [0.1, 0.3, 0.7, 0.9]]))


@pytest.mark.parametrize(("maps", "words"), [({}, "no attention maps"), ({"x.attn2": torch.rand(1, 2, 5, 3)},
                                                                          "x.attn2 has 5 cells")])
def test_heat_maps_of_another_size_raise(maps, words):
    with pytest.raises(ValueError, match=words):
        heat_maps(maps, (8, 8))


def test_eager_attention_has_the_same_output_and_gradients():
    """Values and gradients of the fused kernel; afterwards it is back, also after an error."""
    torch.manual_seed(0)
    layer, x, text = CrossAttention(24, 10, heads=3), torch.randn(2, 6, 24, requires_grad=True), torch.randn(2, 5, 10)
    inputs = [x, *layer.parameters()]

    def both():
        out = layer(x, text)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    fused = both()
    with pytest.raises(RuntimeError, match="on the way"), eager_attention(nn.Sequential(layer)):
        assert layer.attend is not attend
        for one, other in zip(fused, both(), strict=True):
            torch.testing.assert_close(one, other)
        with record_attention(layer) as record:
            layer(x, text)
        assert len(record.maps) == 1, "it can be recorded as well"
        raise RuntimeError("on the way")
    assert layer.attend is attend


@pytest.fixture
def fused_calls(monkeypatch):
    """A list that grows with each call of the fused kernel."""
    kernel, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **b: calls.append(1) or kernel(*a, **b))
    return calls


@pytest.mark.parametrize("largest, opened", [(29, False), (30, True)])
def test_attention_is_eager_up_to_a_map_of_that_size(fused_calls, largest, opened):
    """6 queries times 5 keys."""
    layer = CrossAttention(8, 8, heads=2)
    with eager_attention(layer, largest=largest):
        layer(torch.randn(1, 6, 8), torch.randn(1, 5, 8))
    assert len(fused_calls) == (not opened)


@pytest.mark.parametrize("tokens, opened", [(512, True), (513, False)])
def test_self_attention_is_eager_up_to_512_tokens_unless_a_limit_is_given(fused_calls, tokens, opened):
    layer = CrossAttention(2, heads=1)
    with eager_attention(layer), torch.no_grad():
        layer(torch.randn(1, tokens, 2))
    assert len(fused_calls) == (not opened)


def test_leaving_a_nested_eager_context_restores_the_outer_one(fused_calls):
    """Also when the inner one has another limit, or ends in an error."""
    layer, x, context = CrossAttention(8, 8, heads=2), torch.randn(1, 6, 8), torch.randn(1, 5, 8)
    with eager_attention(layer):
        with pytest.raises(ZeroDivisionError), eager_attention(layer, largest=29):
            layer(x, context)
            raise ZeroDivisionError
        assert len(fused_calls) == 1
        layer(x, context)
        assert len(fused_calls) == 1, "the outer context is eager"
    layer(x, context)
    assert len(fused_calls) == 2
