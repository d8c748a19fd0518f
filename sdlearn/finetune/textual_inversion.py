"""Textual inversion: a new word for something that the model can draw but has no word for.

n  vectors of the word      D  width of the text encoder's embeddings      B  batch

Everything is frozen but the new word's rows of the token embedding, which are sought so that the diffusion
loss on a few images is low. Gal et al. 2022, "An image is worth one word". A word's way:

    start = init_embedding(model.tokenizer, model.text_encoder, "<toy>", "cat")
    add_embedding(model.tokenizer, model.text_encoder, start)
    for step in train_embedding(model, "<toy>", pixels, max_steps=500):
        ...
    read_embedding(model.tokenizer, model.text_encoder, "<toy>")        # to be saved, and added to other models
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from ..clip import TextEncoder
from ..tokenizer import Tokenizer, clean
from .loop import (
    LatentDiffusion,
    TrainStep,
    check_batch,
    check_images,
    diffusion_loss,
    draw_indices,
    encode_images,
    encode_prompts,
    train,
)

# Neutral sentences, in which the word stands for what all images have in common.
TEMPLATES = ("a picture of {}", "{}", "a photo of one {}", "a clear image of {}", "a picture of {} in the middle",
             "a close view of {}", "{} seen from the front", "a small image of {}")


@dataclass(frozen=True, eq=False)
class Embedding:
    """A word and its vectors, (n, D): n tokens that always come together."""

    token: str
    vectors: Tensor

    def __post_init__(self):
        if self.vectors.ndim != 2 or len(self.vectors) < 1:
            raise ValueError(f"the vectors of '{self.token}' are {tuple(self.vectors.shape)}: give (n, width), "
                             "a row for each token")


def init_embedding(tokenizer: Tokenizer, text: TextEncoder, token: str, like: str, count: int = 1) -> Embedding:
    """`count` vectors for `token` to start from: those of the known word `like`, repeated where it has fewer.

    Raises ValueError if `like` is no word or has more tokens than `count`.
    """
    ids = tokenizer.encode(like)
    if not 1 <= len(ids) <= count:
        raise ValueError(f"'{like}' is {len(ids)} tokens, but '{token}' has {count} to start from it: choose a word "
                         "that is one token, or give the new word more vectors")
    table = text.embeddings.token_embedding.weight
    return Embedding(token, table.detach()[[ids[i % len(ids)] for i in range(count)]].clone())      # (n, D)


def grow_token_embedding(text: TextEncoder, count: int) -> None:
    """Give the text encoder `count` more rows of token embedding, zeros, behind those it has, whose bits stay.

    `text.config` is replaced by one with the new `vocab_size`.
    """
    embedding = text.embeddings.token_embedding
    old = embedding.weight
    more = old.detach().new_zeros(count, old.shape[1])
    embedding.weight = nn.Parameter(torch.cat([old.detach(), more]), requires_grad=old.requires_grad)
    embedding.num_embeddings = len(embedding.weight)
    text.config = replace(text.config, vocab_size=len(embedding.weight))


def add_embedding(tokenizer: Tokenizer, text: TextEncoder, embedding: Embedding) -> list[int]:
    """Teach a model the word: its tokenizer gets new ids, which are returned, its text encoder their rows.

    The table grows unless it has rows that no token uses. Raises ValueError, with nothing changed, for
    vectors of another width, values that are not finite, and a word that the model has already.
    """
    width, needed = embedding.vectors.shape[1], text.config.dim
    if width != needed:
        raise ValueError(f"the vectors of '{embedding.token}' are {width} wide, but this model's text encoder takes "
                         f"{needed}: the embedding was made for another model")
    if not embedding.vectors.isfinite().all():
        raise ValueError(f"the vectors of '{embedding.token}' are not finite: make or fetch the embedding again")
    if clean(embedding.token) not in tokenizer.added and len(tokenizer.encode(embedding.token)) == 1:
        raise ValueError(f"'{embedding.token}' is a word of this model already, and would be lost: choose another for "
                         f"the embedding, such as '<{embedding.token}>'")
    ids = tokenizer.add_token(embedding.token, len(embedding.vectors))
    if (lacking := tokenizer.vocab_size - text.config.vocab_size) > 0:
        grow_token_embedding(text, lacking)
    _write(text, ids, embedding.vectors)
    return ids


def read_embedding(tokenizer: Tokenizer, text: TextEncoder, token: str) -> Embedding:
    """An added word with its vectors, as they are now. Raises ValueError for a word that was not added."""
    table = text.embeddings.token_embedding.weight
    return Embedding(token, table.detach()[_ids_of(tokenizer, token)].clone())


def train_embedding(model: LatentDiffusion, token: str, pixels: Tensor, *, max_steps: int, learning_rate: float = 5e-3,
                    templates: str | Sequence[str] = TEMPLATES, batch_size: int = 4, warmup: int = 0,
                    seed: int = 0) -> Iterator[TrainStep]:
    """Train the vectors of an added word on images, pixels (B, 3, H, W) in [-1, 1].

    templates: a sentence or several, with {} where the word goes; each image is shown under one of them, drawn anew.
    After every step the word's rows in the text encoder are the new ones; every other number of the model
    keeps its bits, and no weight decay pulls at the rows. Raises ValueError for a word that was not added,
    templates without {}, and images that do not fit; Diverged as `train` does.
    """
    check_images(model, pixels)
    check_batch(batch_size)
    ids = _ids_of(model.tokenizer, token)
    templates = [templates] if isinstance(templates, str) else list(templates)
    if not templates or (bad := [template for template in templates if "{}" not in template]):
        raise ValueError("templates must be sentences with {} where the word goes, but "
                         + (f"'{bad[0]}' has no {{}}" if templates else "none are given"))
    rows = read_embedding(model.tokenizer, model.text_encoder, token).vectors.float()       # (n, D), what learns
    latents = cache(lambda: encode_images(model, pixels))                         # at the first step, then kept
    sentences = [template.replace("{}", token) for template in templates]

    def loss(generator: torch.Generator) -> Tensor:
        shown = draw_indices(len(pixels), batch_size, generator)
        chosen = torch.randint(len(sentences), (batch_size,), generator=generator).tolist()
        with override_token_embedding(model.text_encoder.embeddings.token_embedding, ids, rows):
            context = encode_prompts(model, [sentences[i] for i in chosen])         # (B, M, T)
        return diffusion_loss(model.unet, model.schedule, latents()[shown], context, generator)

    run = train([rows], loss, max_steps=max_steps, learning_rate=learning_rate, models=(model.text_encoder, model.unet),
                warmup=warmup, weight_decay=0.0, seed=seed)
    return _written_after_each(run, model.text_encoder, ids, rows)


def _written_after_each(run: Iterator[TrainStep], text: TextEncoder, ids: list[int], rows: Tensor):
    with closing(run):
        for step in run:
            _write(text, ids, rows)
            yield step


def replace_token_embedding(vectors: Tensor, tokens: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """Vectors (B, M, D) of tokens (B, M), with rows (n, D) for the tokens `ids` (n,), and as they are for all others.

    Differentiable in `rows`, which is all that learns in textual inversion.
    """
    same = tokens[..., None] == ids                                                 # (B, M, n)
    row = same.int().argmax(dim=-1)                                                 # (B, M), 0 where none is
    return torch.where(same.any(dim=-1, keepdim=True), rows[row].to(vectors.dtype), vectors)


@contextmanager
def override_token_embedding(embedding: nn.Embedding, ids: list[int], rows: Tensor):
    """Inside, `embedding` gives rows (n, D) for the n ids, differentiably, and its own for all others."""
    places = torch.tensor(ids, device=embedding.weight.device)

    def exchange(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return replace_token_embedding(output, inputs[0], places, rows)

    handle = embedding.register_forward_hook(exchange)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def _write(text: TextEncoder, ids: list[int], vectors: Tensor) -> None:
    table = text.embeddings.token_embedding.weight
    table[ids] = vectors.to(table)


def _ids_of(tokenizer: Tokenizer, token: str) -> list[int]:
    word = clean(token)
    if word not in tokenizer.added:
        raise ValueError(f"'{token}' is not a word that was added to this model: put it in with add_embedding first; "
                         f"added so far: {', '.join(tokenizer.added) or 'none'}")
    return tokenizer.added[word]
