"""Fine-tuning on tiny models: the loss falls, what should learn does, and nothing else moves a bit."""

import importlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import ZERO_SNR, one_thread, tiny_parts  # noqa: F401

from sdlearn.config import NoiseConfig
from sdlearn.controlnet import ControlNet
from sdlearn.finetune import (
    Diverged,
    Embedding,
    add_embedding,
    diffusion_loss,
    diffusion_losses,
    dreambooth_loss,
    grow_token_embedding,
    init_embedding,
    new_lora,
    prior_preservation_loss,
    read_embedding,
    replace_token_embedding,
    train,
    train_controlnet,
    train_dreambooth,
    train_embedding,
    train_lora,
)
from sdlearn.finetune.loop import draw_indices, draw_timesteps, encode_prompts
from sdlearn.schedule import NoiseSchedule

SIDE = 16


def make(noise=ZERO_SNR) -> SimpleNamespace:
    parts = tiny_parts(noise, vision=False)
    return SimpleNamespace(tokenizer=parts.tokenizer, text_encoder=parts.text_encoder, unet=parts.unet, vae=parts.vae,
                           schedule=NoiseSchedule(noise), config=parts.config)


@pytest.fixture
def model():
    return make()


def images(count=1, seed=0):
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def bits(*modules):
    return [{name: tensor.clone() for name, tensor in module.state_dict().items()} for module in modules]


def changed(module, before):
    now = module.state_dict()
    return {name for name in before if not torch.equal(now[name], before[name])}


def falls(steps, by):
    """Whether the mean loss of the last fifth of the steps is below that of the first fifth by this factor."""
    losses = [step.loss for step in steps]
    fifth = len(losses) // 5
    return sum(losses[-fifth:]) < by * sum(losses[:fifth])


def loss_of(model, pixels, prompt):
    """The loss on one set of noise and timesteps, so that two moments of a training can be compared."""
    with torch.no_grad():
        latents = model.vae.to_latent(pixels).repeat(16, 1, 1, 1)
        context = encode_prompts(model, [prompt]).expand(len(latents), -1, -1)
        return diffusion_loss(model.unet, model.schedule, latents, context, torch.Generator().manual_seed(9)).item()


# --- the loss ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_the_squared_error_of_what_the_network_should_predict(model, prediction):
    schedule = NoiseSchedule(NoiseConfig(prediction_type=prediction))
    latents, context = torch.randn(3, 4, 8, 8), torch.randn(3, 77, 16)
    seen = []

    def network(x, t, context):
        seen.append((x, t, context))
        return torch.full_like(x, 0.5)

    losses = diffusion_losses(network, schedule, latents, context, torch.Generator().manual_seed(3))
    [(x, t, given)] = seen
    assert given is context and t.shape == (3,) and t.dtype == torch.int64
    alpha, sigma = (value.float()[:, None, None, None] for value in schedule.alpha_sigma(t))
    noise = (x - alpha * latents) / sigma
    wanted = {"epsilon": noise, "sample": latents, "v_prediction": alpha * noise - sigma * latents}[prediction]
    assert torch.allclose(losses, (0.5 - wanted).square().mean(dim=(1, 2, 3)), rtol=1e-4)
    mean = diffusion_loss(network, schedule, latents, context, torch.Generator().manual_seed(3))
    assert torch.equal(mean, losses.mean())


def test_timesteps_are_one_from_each_part_in_random_order_and_reach_both_ends(model):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_timesteps(4, model.schedule, generator) for _ in range(2000)])
    assert torch.equal((drawn // 250).sort(dim=1).values, torch.arange(4).expand(2000, 4))
    assert ((drawn.float().mean(dim=0) - 499.5).abs() < 30).all()        # no place has timesteps of its own
    assert drawn.min() < 5 and drawn.max() > 994
    assert 0 <= draw_timesteps(1, model.schedule, generator).item() <= 999


def test_rows_are_drawn_without_repeats_while_there_are_enough():
    generator = torch.Generator().manual_seed(0)
    assert sorted(draw_indices(5, 5, generator).tolist()) == [0, 1, 2, 3, 4]
    assert len(set(draw_indices(5, 3, generator).tolist())) == 3
    assert sorted(draw_indices(2, 4, generator).tolist()) == [0, 0, 1, 1]


# --- the loop ---------------------------------------------------------------------------------------

def quadratic(parameter):
    return lambda generator: (parameter - 3).square().sum() + 0 * torch.rand((), generator=generator)


def test_training_reaches_a_minimum():
    parameter = torch.zeros(2)
    steps = list(train([parameter], quadratic(parameter), max_steps=200, learning_rate=0.1, weight_decay=0.0))
    assert [step.index for step in steps] == list(range(200))
    assert torch.allclose(parameter, torch.tensor(3.0), atol=0.05)
    assert steps[0].loss == 18 and steps[0].gradient_norm == pytest.approx(6 * math.sqrt(2))


def test_the_first_step_is_adamw_s_with_warm_up_and_weight_decay():
    """After one step AdamW has moved by the learning rate against the gradient's sign, after decay."""
    for warmup, rate in ((0, 0.1), (4, 0.025)):
        parameter = torch.ones(2)
        next(train([parameter], quadratic(parameter), max_steps=1, learning_rate=0.1, warmup=warmup, weight_decay=0.5))
        assert torch.allclose(parameter, torch.tensor(1 - rate * 0.5 + rate), atol=1e-6)


def test_the_gradient_is_clipped_as_a_whole(monkeypatch):
    norms, first, second = [], torch.zeros(2), torch.zeros(3)
    original = torch.optim.AdamW.step

    def step(optimiser):
        norms.append(torch.cat([first.grad, second.grad]).norm().item())
        original(optimiser)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    [step] = train([first, second], lambda _: 1e3 * (first.sum() + second.sum() - 1).square(), max_steps=1,
                   learning_rate=0.1, clip=0.5)
    assert norms == [pytest.approx(0.5, rel=1e-4)]
    assert step.gradient_norm == pytest.approx(2000 * math.sqrt(5))


@pytest.mark.parametrize("end", ["finished", "closed", "dropped", "failed", "diverged"])
def test_however_it_ends_models_are_as_they_were_but_for_what_learnt(model, end):
    model.unet.train()
    flags = {}
    for index, (name, parameter) in enumerate(model.unet.named_parameters()):
        flags[name] = index % 3 != 0
        parameter.requires_grad_(flags[name])
    parameter = model.unet.conv_in.bias
    before = bits(model.unet)[0]

    def loss(generator):
        assert not model.unet.training
        assert [p for p in model.unet.parameters() if p.requires_grad] == [parameter] or len(parameter) == 0
        if calls and end == "failed":
            raise RuntimeError("out of something")
        calls.append(1)
        return parameter.sum() * (math.nan if end == "diverged" and len(calls) > 1 else 1)

    calls = []
    run = train([parameter], loss, max_steps=2, learning_rate=0.1, models=[model.unet])
    next(run)
    after = parameter.detach().clone()
    assert parameter.grad is None                       # at every step, so that nothing is held while it waits
    match end:
        case "finished":
            assert len(list(run)) == 1
        case "closed":
            run.close()
        case "dropped":
            del run
        case "failed":
            with pytest.raises(RuntimeError):
                next(run)
        case "diverged":
            with pytest.raises(Diverged, match="nan.*at step 1.*lower learning rate"):
                next(run)
    assert changed(model.unet, before) == {"conv_in.bias"}
    assert end == "finished" or torch.equal(parameter, after)
    assert {name: p.requires_grad for name, p in model.unet.named_parameters()} == flags
    assert all(p.grad is None for p in model.unet.parameters())
    assert not model.unet.training


def test_nothing_is_touched_before_the_first_step(model):
    model.unet.train()
    train(model.unet.parameters(), lambda _: None, max_steps=1, learning_rate=0.1, models=[model.unet])
    assert model.unet.training


def test_training_goes_on_where_gradients_are_off_outside_and_leaves_them_off():
    parameter = torch.zeros(2)
    with torch.no_grad():
        steps = list(train([parameter], quadratic(parameter), max_steps=2, learning_rate=0.1))
        assert not torch.is_grad_enabled()
    assert len(steps) == 2 and (parameter > 0).all()


@pytest.mark.parametrize("settings, words", [
    ({"max_steps": 0}, "max_steps is 0"), ({"max_steps": 1.5}, "max_steps is 1.5"), ({"max_steps": True}, "is True"),
    ({"learning_rate": 0.0}, "learning rate is 0"), ({"learning_rate": math.nan}, "learning rate is nan"),
    ({"warmup": -1}, "warmup is -1"), ({"parameters": []}, "nothing to train"),
    ({"parameters": [torch.zeros(2, dtype=torch.float16)]}, "float16.*float32"),
])
def test_settings_that_cannot_be_are_refused_at_once(settings, words):
    given = {"parameters": [torch.zeros(2)], "max_steps": 1, "learning_rate": 0.1} | settings
    with pytest.raises(ValueError, match=words):
        train(given.pop("parameters"), lambda _: None, **given)


# --- textual inversion ------------------------------------------------------------------------------

def test_a_grown_table_keeps_its_rows_bits(model):
    before = model.text_encoder.embeddings.token_embedding.weight.detach().clone()
    ids = model.tokenizer("two small green cars")
    hidden = model.text_encoder(ids).hidden
    grow_token_embedding(model.text_encoder, 3)
    table = model.text_encoder.embeddings.token_embedding
    assert table.weight.shape == (603, 16) and table.num_embeddings == 603 and table.weight.requires_grad
    assert torch.equal(table.weight[:600], before) and not table.weight[600:].any()
    assert model.text_encoder.config.vocab_size == 603
    assert torch.equal(model.text_encoder(ids).hidden, hidden)


@pytest.mark.parametrize("learns", [False, True])
def test_a_grown_table_learns_if_it_did_before(model, learns):
    model.text_encoder.requires_grad_(learns)
    grow_token_embedding(model.text_encoder, 2)
    assert model.text_encoder.embeddings.token_embedding.weight.requires_grad == learns
    lacking = model.text_encoder.config.vocab_size - model.tokenizer.vocab_size
    add_embedding(model.tokenizer, model.text_encoder, Embedding("<toy>", torch.ones(lacking + 3, 16)))   # grows it
    assert model.text_encoder.config.vocab_size == 605
    assert all(parameter.requires_grad == learns for parameter in model.text_encoder.parameters())


def test_an_added_word_is_read_as_its_vectors(model):
    vectors = torch.randn(3, 16)
    known = model.tokenizer.vocab_size
    ids = add_embedding(model.tokenizer, model.text_encoder, Embedding("<Toy>", vectors))
    assert ids == [known, known + 1, known + 2] == model.tokenizer.encode("<toy>")
    assert torch.equal(read_embedding(model.tokenizer, model.text_encoder, "<toy>").vectors, vectors)
    assert model.text_encoder.config.vocab_size == max(600, known + 3)
    more = add_embedding(model.tokenizer, model.text_encoder, Embedding("<more>", torch.ones(300, 16)))
    table = model.text_encoder.embeddings.token_embedding
    assert model.text_encoder.config.vocab_size == more[-1] + 1 == len(table.weight)
    assert torch.equal(read_embedding(model.tokenizer, model.text_encoder, "<toy>").vectors, vectors)
    embedded = model.text_encoder.embeddings(torch.tensor([ids]))
    assert torch.equal(embedded[0], vectors + model.text_encoder.embeddings.position_embedding.weight[:3])


def test_a_new_word_starts_like_a_known_one(model):
    [cat] = model.tokenizer.encode("cat")
    embedding = init_embedding(model.tokenizer, model.text_encoder, "<toy>", "cat", 2)
    row = model.text_encoder.embeddings.token_embedding.weight[cat]
    assert torch.equal(embedding.vectors, torch.stack([row, row]))
    with pytest.raises(ValueError, match="'red cat' is 2 tokens, but '<toy>' has 1"):
        init_embedding(model.tokenizer, model.text_encoder, "<toy>", "red cat")
    with pytest.raises(ValueError, match="is 0 tokens"):
        init_embedding(model.tokenizer, model.text_encoder, "<toy>", " ")


@pytest.mark.parametrize("embedding, words", [
    (Embedding("<toy>", torch.zeros(1, 24)), "24 wide.*takes 16"),
    (Embedding("<taken>", torch.zeros(1, 16)), "has '<taken>' already"),
    (Embedding("Cat", torch.zeros(1, 16)), "'Cat' is a word of this model already.*'<Cat>'"),
    (Embedding("two words", torch.zeros(1, 16)), "without spaces"),
    (Embedding("<toy>", torch.full((1, 16), math.nan)), "not finite"),
])
def test_an_embedding_that_does_not_fit_changes_nothing(model, embedding, words):
    add_embedding(model.tokenizer, model.text_encoder, Embedding("<taken>", torch.ones(1, 16)))
    before, known = bits(model.text_encoder)[0], model.tokenizer.vocab_size
    with pytest.raises(ValueError, match=words):
        add_embedding(model.tokenizer, model.text_encoder, embedding)
    assert not changed(model.text_encoder, before) and model.tokenizer.vocab_size == known


def test_vectors_are_rows(model):
    with pytest.raises(ValueError, match=r"'<toy>' are \(16,\)"):
        Embedding("<toy>", torch.zeros(16))


def test_vectors_of_some_tokens_are_exchanged():
    table, rows = torch.randn(9, 4), torch.randn(2, 4, requires_grad=True)
    tokens = torch.tensor([[3, 7, 7, 0], [1, 5, 2, 8]])
    out = replace_token_embedding(table[tokens], tokens, torch.tensor([7, 5]), rows)
    wanted = table[tokens].clone()
    wanted[0, 1], wanted[0, 2], wanted[1, 1] = rows.detach()[0], rows.detach()[0], rows.detach()[1]
    assert torch.equal(out, wanted)
    out.sum().backward()
    assert torch.equal(rows.grad, torch.tensor([[2.0], [1.0]]).expand(2, 4))     # each as often as it stands there
    without = replace_token_embedding(table[tokens], tokens, torch.tensor([4]), torch.full((1, 4), torch.nan))
    assert torch.equal(without, table[tokens])


@pytest.mark.parametrize("count", [1, 3])
def test_textual_inversion_moves_the_word_s_rows_and_nothing_else(model, count):
    start = init_embedding(model.tokenizer, model.text_encoder, "<toy>", "cat", count)
    ids = add_embedding(model.tokenizer, model.text_encoder, start)
    before = bits(model.text_encoder, model.unet, model.vae)
    table = model.text_encoder.embeddings.token_embedding.weight
    first = loss_of(model, images(), "a picture of <toy>")
    for _ in train_embedding(model, "<toy>", images(), max_steps=30, learning_rate=0.1, batch_size=8):
        assert model.text_encoder.embeddings.token_embedding.weight is table
    assert loss_of(model, images(), "a picture of <toy>") < 0.98 * first
    others = [row for row in range(len(table)) if row not in ids]
    assert torch.equal(table[others], before[0]["embeddings.token_embedding.weight"][others])
    assert (table[ids] != before[0]["embeddings.token_embedding.weight"][ids]).all()
    assert changed(model.text_encoder, before[0]) == {"embeddings.token_embedding.weight"}
    assert not changed(model.unet, before[1]) and not changed(model.vae, before[2])
    assert torch.equal(read_embedding(model.tokenizer, model.text_encoder, "<toy>").vectors, table[ids])
    assert table.requires_grad and not model.text_encoder.embeddings.token_embedding._forward_hooks


def test_rows_without_a_gradient_do_not_move(model):
    """Neither weight decay nor anything else pulls at them: with a silent U-Net, the loss says nothing."""
    torch.nn.init.zeros_(model.unet.conv_out.weight)
    add_embedding(model.tokenizer, model.text_encoder, Embedding("<toy>", torch.ones(2, 16)))
    steps = list(train_embedding(model, "<toy>", images(), max_steps=3, learning_rate=0.1))
    assert steps[-1].gradient_norm == 0
    assert torch.equal(read_embedding(model.tokenizer, model.text_encoder, "<toy>").vectors, torch.ones(2, 16))


def test_between_steps_and_after_an_early_stop_the_model_has_the_rows_so_far(model):
    start = init_embedding(model.tokenizer, model.text_encoder, "<toy>", "cat")
    add_embedding(model.tokenizer, model.text_encoder, start)
    seen = []
    run = train_embedding(model, "<toy>", images(), max_steps=50, learning_rate=0.05)
    for step in run:
        with torch.no_grad():
            seen.append(encode_prompts(model, ["a <toy>"]))
        if step.index == 2:
            break
    run.close()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert torch.equal(encode_prompts(model, ["a <toy>"]), seen[2])
    assert all(p.requires_grad for p in model.unet.parameters())


def test_a_word_that_no_template_shows_would_not_learn(model):
    add_embedding(model.tokenizer, model.text_encoder, Embedding("<toy>", torch.ones(1, 16)))
    for templates in (["an image"], [], "a cat"):
        with pytest.raises(ValueError, match="templates must be sentences with {}"):
            train_embedding(model, "<toy>", images(), max_steps=1, templates=templates)
    with pytest.raises(ValueError, match="'<other>' is not a word that was added.*<toy>"):
        train_embedding(model, "<other>", images(), max_steps=1)


# --- DreamBooth -------------------------------------------------------------------------------------

@pytest.mark.parametrize("train_text", [False, True])
def test_dreambooth_learns_the_image(model, train_text):
    before = bits(model.text_encoder, model.unet, model.vae)
    steps = list(train_dreambooth(model, images(), "a zwx cat", max_steps=40, learning_rate=2e-3, batch_size=4,
                                  train_text=train_text))
    assert falls(steps, 0.9)
    assert len(changed(model.unet, before[1])) > 0.9 * len(before[1])
    assert bool(changed(model.text_encoder, before[0])) == train_text
    assert not changed(model.vae, before[2])


def test_prior_preservation_keeps_the_class_where_training_alone_loses_it():
    own, rest = images(), images(3, seed=1) * 0.2
    lost = {}
    for prior in (False, True):
        model = make()
        # First the class is learnt, as a trained model knows it.
        list(train_dreambooth(model, rest, "a cat", max_steps=40, learning_rate=4e-3, batch_size=4))
        knew = loss_of(model, rest, "a cat")
        kind = {"class_pixels": rest, "class_prompt": "a cat"} if prior else {}
        list(train_dreambooth(model, own, "a zwx cat", max_steps=30, learning_rate=4e-3, batch_size=2, **kind))
        lost[prior] = loss_of(model, rest, "a cat") - knew
    assert lost[False] > 0 and lost[True] < 0.5 * lost[False]


def test_a_prior_of_weight_zero_is_no_prior():
    runs = []
    for kind in ({}, {"class_pixels": images(2, 1), "class_prompt": "a cat", "prior_weight": 0.0}):
        runs.append(list(train_dreambooth(make(), images(), "a zwx cat", max_steps=3, learning_rate=1e-3, **kind)))
    assert runs[0] == runs[1]


def test_the_two_losses_are_weighed(model):
    """The first step's loss is linear in the weight."""
    def first(weight):
        return next(train_dreambooth(make(), images(), "a zwx cat", max_steps=1, batch_size=2, prior_weight=weight,
                                     class_pixels=images(2, 1), class_prompt="a cat")).loss
    assert first(3.0) - first(1.0) == pytest.approx(2 * (first(2.0) - first(1.0)), rel=1e-4)
    assert first(2.0) > first(1.0)


def test_the_prior_s_half_is_weighed():
    losses = torch.tensor([1.0, 3.0, 10.0, 20.0])
    assert [prior_preservation_loss(losses, weight).item() for weight in (0.0, 1.0, 0.5)] == [2.0, 17.0, 9.5]


def test_one_run_holds_both_kinds_each_under_its_prompt(model):
    """The network is run once, on rows of which each has its own kind's prompt."""
    thing, kind = (torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    contexts, seen = torch.stack([torch.zeros(5, 16), torch.ones(5, 16)]), []

    def network(x, t, context):
        seen.append(context[:, 0, 0].tolist())
        return torch.zeros_like(x)

    def lost(latents, contexts, weight=1.0):
        return dreambooth_loss(network, model.schedule, latents, contexts, torch.Generator().manual_seed(0), weight)

    both = [lost([thing, kind], contexts, weight) for weight in (0.0, 1.0, 2.0)]
    assert seen == [[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]] * 3
    assert both[2] - both[1] == pytest.approx(float(both[1] - both[0]), rel=1e-5) and both[1] > both[0]
    alone = diffusion_loss(network, model.schedule, thing, contexts[:1].expand(3, -1, -1),
                           torch.Generator().manual_seed(0))
    assert lost([thing], contexts[:1]) == alone


@pytest.mark.parametrize("arguments, words", [
    ({"class_pixels": images()}, "needs both class_pixels and class_prompt"),
    ({"class_prompt": "a cat"}, "needs both"),
    ({"prior_weight": -1.0}, "weight of the prior is -1"),
    ({"class_pixels": torch.zeros(1, 3, 8, 8), "class_prompt": "a cat"}, r"\(3, 8, 8\)"),
    ({"batch_size": 0}, "batch size is 0"),
    ({"pixels": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, "uint8.*floating-point"),
    ({"pixels": images() * 127}, r"give pixels in \[-1, 1\]"),
    ({"pixels": torch.full((1, 3, 16, 16), math.nan)}, r"give pixels in \[-1, 1\]"),
    ({"pixels": torch.zeros(0, 3, 16, 16)}, "at least one"),
    ({"pixels": torch.zeros(3, 16, 16)}, "at least one"),
    ({"max_steps": 0}, "max_steps is 0"),
])
def test_dreambooth_refuses_at_once_what_does_not_fit(model, arguments, words):
    given = {"pixels": images(), "max_steps": 1} | arguments
    with pytest.raises(ValueError, match=words):
        train_dreambooth(model, given.pop("pixels"), "a zwx cat", **given)


def test_an_inpainting_unet_is_refused_at_once(model):
    model.unet.config = replace(model.unet.config, in_channels=9)
    with pytest.raises(ValueError, match="inpainting model"):
        train_dreambooth(model, images(), "a zwx cat", max_steps=1)


# --- ControlNet -------------------------------------------------------------------------------------

def test_a_controlnet_learns_and_its_base_keeps_its_bits(model):
    net = ControlNet.from_unet(model.unet, hint_widths=(4, 8))
    before = bits(model.unet, model.text_encoder, model.vae, net)
    pixels = images(2)
    hints = (pixels > 0).float()
    steps = list(train_controlnet(model, net, pixels, ["a cat", "a car"], hints, max_steps=40, learning_rate=3e-3))
    assert falls(steps, 0.95)
    for module, old in zip((model.unet, model.text_encoder, model.vae), before, strict=False):
        assert not changed(module, old)
        assert all(p.requires_grad and p.grad is None for p in module.parameters())
    # Behind the zero convolutions, which begin to pass something on after the first step, all of it learns.
    assert len(changed(net, before[3])) > 0.9 * len(before[3])


@pytest.mark.parametrize("dropout, wanted", [(0.0, {"a cat"}), (1.0, {""}), (0.5, {"a cat", ""})])
def test_captions_are_dropped_at_the_share_that_is_asked_for(model, dropout, wanted):
    net = ControlNet.from_unet(model.unet, hint_widths=(4, 8))
    asked, tokenizer = [], model.tokenizer
    model.tokenizer = lambda prompts, length: asked.extend(prompts) or tokenizer(prompts, length)
    list(train_controlnet(model, net, images(), ["a cat"], torch.zeros(1, 3, SIDE, SIDE), max_steps=10,
                          batch_size=8, dropout=dropout))
    assert len(asked) == 80 and set(asked) == wanted
    assert abs(asked.count("") / 80 - dropout) < 0.2


@pytest.mark.parametrize("arguments, words", [
    ({"captions": "a cat"}, "as many captions"), ({"captions": []}, "as many captions"),
    ({"hints": torch.zeros(1, 3, 8, 8)}, "a hint for each"), ({"hints": torch.zeros(2, 3, SIDE, SIDE)}, "a hint for"),
    ({"hints": -torch.ones(1, 3, SIDE, SIDE)}, r"hints go from -1 to -1: give them in \[0, 1\]"),
    ({"dropout": 1.5}, "dropout of captions is 1.5"),
])
def test_controlnet_training_refuses_at_once_what_does_not_fit(model, arguments, words):
    given = {"captions": ["a cat"], "hints": torch.zeros(1, 3, SIDE, SIDE)} | arguments
    with pytest.raises(ValueError, match=words):
        train_controlnet(model, torch.nn.Linear(1, 1), images(), given.pop("captions"), given.pop("hints"),
                         max_steps=1, **given)


# --- all --------------------------------------------------------------------------------------------

@pytest.fixture
def shown(monkeypatch):
    """What each step trains on: lists of (latents, contexts), with the loss made a sum that any network has."""
    steps = []

    def recorded(network, schedule, latents, context, generator):
        steps.append((latents, context))
        return network(latents, torch.zeros(len(latents)), context).flatten(1).sum(dim=1)

    for room in ("controlnet", "dreambooth", "lora"):
        module = importlib.import_module(f"sdlearn.finetune.{room}")
        name = "diffusion_losses" if room == "dreambooth" else "diffusion_loss"
        monkeypatch.setattr(module, name, recorded if room == "dreambooth" else lambda *given: recorded(*given).sum())
    return steps


class Recorder(torch.nn.Module):
    """Stands for a ControlNet, and keeps the hints it was given."""

    def __init__(self, counts):
        super().__init__()
        self.weight, self.counts, self.hints = torch.nn.Parameter(torch.ones(())), counts, []

    def forward(self, x, t, context, hint):
        self.hints.append(hint)
        return [self.weight * torch.zeros(1, count, 1, 1) for count in self.counts]


CAPTIONS = ["a cat", "two cars", "a large blue star"]


@pytest.mark.parametrize("kind", ["lora", "controlnet"])
def test_each_image_comes_with_its_own_caption_and_hint(model, shown, kind):
    pixels, hints = images(3), torch.arange(3)[:, None, None, None].expand(3, 3, SIDE, SIDE) / 2
    with torch.no_grad():
        latents, contexts = model.vae.to_latent(pixels), encode_prompts(model, CAPTIONS)
    net = SimpleNamespace(hints=[None] * 6)
    if kind == "lora":
        list(train_lora(model, new_lora(model.unet), pixels, CAPTIONS, max_steps=6, batch_size=2))
    else:
        model.unet.forward = lambda x, t, context, residuals: x * residuals[0].mean()
        net = Recorder([8])
        list(train_controlnet(model, net, pixels, CAPTIONS, hints, max_steps=6, batch_size=2, dropout=0.0))
    rows = []
    for (x0, context), hint in zip(shown, net.hints, strict=True):
        for place in range(2):
            [row] = [row for row in range(3) if torch.allclose(x0[place], latents[row], atol=1e-6)]
            assert torch.allclose(context[place], contexts[row], atol=1e-6)
            assert hint is None or torch.equal(hint[place], hints[row])
            rows.append(row)
    assert set(rows) == {0, 1, 2}


def test_dreambooth_shows_both_kinds_in_one_batch_each_under_its_prompt(model, shown):
    pixels, others = images(2), images(3, seed=1)
    with torch.no_grad():
        latents = [model.vae.to_latent(part) for part in (pixels, others)]
        contexts = encode_prompts(model, ["a zwx cat", "a cat"])
    list(train_dreambooth(model, pixels, "a zwx cat", max_steps=3, batch_size=2, class_pixels=others,
                          class_prompt="a cat"))
    assert len(shown) == 3
    for x0, context in shown:
        assert x0.shape[0] == 4
        for place, latent in enumerate(x0):
            kind = place // 2
            assert any(torch.allclose(latent, one, atol=1e-6) for one in latents[kind])
            assert torch.allclose(context[place], contexts[kind], atol=1e-6)


def test_a_half_precision_model_learns_words_and_loras_and_says_why_not_more(model):
    for module in (model.unet, model.text_encoder, model.vae):
        module.to(torch.bfloat16)
    start = init_embedding(model.tokenizer, model.text_encoder, "<toy>", "cat")
    ids = add_embedding(model.tokenizer, model.text_encoder, start)
    before = model.text_encoder.embeddings.token_embedding.weight[ids].clone()
    assert all(math.isfinite(step.loss) for step in train_embedding(model, "<toy>", images(), max_steps=3))
    assert (model.text_encoder.embeddings.token_embedding.weight[ids] != before).any()
    lora = new_lora(model.unet, model.text_encoder)
    assert all(math.isfinite(step.loss) for step in train_lora(model, lora, images(), "a cat", max_steps=3))
    assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in lora.tensors())
    with pytest.raises(ValueError, match="bfloat16.*load the model in float32"):
        train_dreambooth(model, images(), "a zwx cat", max_steps=1)


def by_embedding(model, seed):
    start = init_embedding(model.tokenizer, model.text_encoder, "<toy>", "cat")
    add_embedding(model.tokenizer, model.text_encoder, start)
    return train_embedding(model, "<toy>", images(3), max_steps=4, batch_size=2, seed=seed)


def by_dreambooth(model, seed):
    return train_dreambooth(model, images(3), "a zwx cat", max_steps=4, learning_rate=1e-3, seed=seed,
                            class_pixels=images(2, 1), class_prompt="a cat")


def by_lora(model, seed):
    return train_lora(model, new_lora(model.unet, model.text_encoder), images(3), "a cat", max_steps=4, seed=seed)


def by_controlnet(model, seed):
    net = ControlNet.from_unet(model.unet, hint_widths=(4, 8))
    return train_controlnet(model, net, images(3), ["a", "b", "c"], torch.zeros(3, 3, SIDE, SIDE), max_steps=4,
                            seed=seed)


@pytest.mark.parametrize("start", [by_embedding, by_dreambooth, by_lora, by_controlnet])
def test_a_seed_gives_the_same_run_and_another_another(start):
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(len(runs))
        torch.randn(7)                  # nothing hangs on the global generator ...
        model = make()
        torch.manual_seed(0)            # ... but a fresh ControlNet's hint encoder
        runs.append(list(start(model, seed)))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
