"""Embedding files: both kinds are read and written, diffusers agrees, and damage is told in a sentence."""

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from models import one_thread, tiny_parts  # noqa: F401
from safetensors.torch import load_file, save_file

from sdlearn.checkpoint import CheckpointError, save_folder
from sdlearn.checkpoint.embedding import load_embedding, save_embedding
from sdlearn.finetune import Embedding, add_embedding, read_embedding

ENDINGS = (".safetensors", ".bin", ".pt")
VECTORS = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def parts():
    return tiny_parts(vision=False)


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("models") / "tiny", parts)


# --- both kinds -------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, file, token", [
    ({"<toy>": VECTORS}, "learned.bin", "<toy>"),
    ({"<toy>": VECTORS}, "learned.safetensors", "<toy>"),
    ({"emb_params": VECTORS}, "toy.safetensors", "toy"),
    ({"string_to_token": {"*": 265}, "string_to_param": {"*": VECTORS}, "name": "toy-style", "step": 400,
      "sd_checkpoint": "abc", "sd_checkpoint_name": None}, "x.pt", "toy-style"),
    ({"string_to_param": {"*": torch.nn.Parameter(VECTORS)}}, "by_file.pt", "by_file"),
])
def test_each_kind_is_read(tmp_path, content, file, token):
    path = tmp_path / file
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    embedding = load_embedding(path)
    assert embedding.token == token
    assert torch.equal(embedding.vectors, VECTORS) and embedding.vectors.dtype == torch.float32
    assert not embedding.vectors.requires_grad
    assert load_embedding(path, "<mine>").token == "<mine>"


def test_one_vector_may_come_without_a_row_and_in_half_precision(tmp_path):
    save_file({"<toy>": VECTORS[0].half()}, tmp_path / "a.safetensors")
    embedding = load_embedding(tmp_path / "a.safetensors")
    assert torch.equal(embedding.vectors, VECTORS[:1].half().float())


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_saved_is_loaded_bit_by_bit(tmp_path, ending):
    table = torch.randn(50, 16, requires_grad=True)
    path = save_embedding(tmp_path / "new" / f"toy{ending}", Embedding("<toy>", table[3:5]))
    again = load_embedding(path)
    assert again.token == "<toy>" and torch.equal(again.vectors, table[3:5])
    assert path.stat().st_size < 3000                               # two rows, not the table that they are of
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_are_of_the_kind_that_their_ending_says(tmp_path):
    embedding = Embedding("<toy>", VECTORS)
    assert list(load_file(save_embedding(tmp_path / "a.safetensors", embedding))) == ["<toy>"]
    assert list(torch.load(save_embedding(tmp_path / "a.bin", embedding), weights_only=True)) == ["<toy>"]
    content = torch.load(save_embedding(tmp_path / "a.pt", embedding), weights_only=True)
    assert torch.equal(content["string_to_param"]["*"], VECTORS) and content["name"] == "<toy>"


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("count", [1, 2])
def test_diffusers_reads_what_is_saved_and_encodes_the_prompt_alike(folder, tmp_path, ending, count):
    path = save_embedding(tmp_path / f"toy{ending}", Embedding("<toy>", VECTORS[:count]))
    parts = tiny_parts(vision=False)
    add_embedding(parts.tokenizer, parts.text_encoder, load_embedding(path))
    prompts = ["a <toy> to the left of a cat", "a <TOY>", "two cars"]
    with torch.no_grad():
        ours = parts.text_encoder(parts.tokenizer(prompts)).hidden
        known = [prompt.lower().replace("<toy>", "toy") for prompt in prompts]
        plain = parts.text_encoder(parts.tokenizer(known)).hidden

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_textual_inversion(tmp_path, weight_name=path.name)
        # diffusers keeps the case of an added word, so it is written as it was added.
        theirs, _ = pipe.encode_prompt([prompt.replace("TOY", "toy") for prompt in prompts], "cpu", 1, False)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - plain)[:2].abs().max() > 0.1 and torch.equal(ours[2], plain[2])


def test_a_whole_model_with_a_new_word_is_saved_and_opens_in_diffusers(tmp_path):
    parts = tiny_parts(vision=False)
    add_embedding(parts.tokenizer, parts.text_encoder, Embedding("<toy>", torch.randn(120, 16)))
    parts.config = replace(parts.config, text=parts.text_encoder.config)
    folder = save_folder(tmp_path / "tiny", parts)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        theirs, _ = pipe.encode_prompt("two <toy>", "cpu", 1, False)
        assert (parts.text_encoder(parts.tokenizer("two <toy>")).hidden - theirs).abs().max() < 1e-5


def test_adding_one_s_own_word_again_is_the_same_word(parts, tmp_path):
    ours, other = tiny_parts(vision=False), tiny_parts(vision=False)
    add_embedding(ours.tokenizer, ours.text_encoder, Embedding("<toy>", VECTORS))
    path = save_embedding(tmp_path / "a.safetensors", read_embedding(ours.tokenizer, ours.text_encoder, "<toy>"))
    add_embedding(other.tokenizer, other.text_encoder, load_embedding(path))
    ids = ours.tokenizer("a <toy>")
    assert torch.equal(ids, other.tokenizer("a <toy>"))
    assert torch.equal(ours.text_encoder(ids).hidden, other.text_encoder(ids).hidden)


# --- damage -----------------------------------------------------------------------------------------

class Attack:
    """A pickle of this runs a command of its maker's choice when it is loaded carelessly."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.mark.parametrize("ending", [".pt", ".bin"])
def test_code_in_a_pickle_does_not_run(tmp_path, ending):
    mark = tmp_path / "mark"
    torch.save({"<toy>": VECTORS, "more": Attack(str(mark))}, tmp_path / f"a{ending}")
    with pytest.raises(CheckpointError, match=f"a{ending} holds more than tensors.*use a .safetensors"):
        load_embedding(tmp_path / f"a{ending}")
    assert not mark.exists()
    torch.load(tmp_path / f"a{ending}", weights_only=False)        # the attack is a real one
    assert mark.exists()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("damage", ["cut short", "empty", "text", "missing", "a folder"])
def test_damaged_files_are_one_sentence_that_names_the_file(tmp_path, ending, damage):
    path = save_embedding(tmp_path / f"a{ending}", Embedding("<toy>", VECTORS))
    content = path.read_bytes()
    path.unlink()
    match damage:
        case "cut short":
            path.write_bytes(content[:-40])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_bytes(b"version https://example.org/pointer\nsize 12345\n")
        case "a folder":
            path.mkdir()
    with pytest.raises(CheckpointError) as caught:
        load_embedding(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content, words", [
    ({"a": VECTORS, "b": VECTORS + 1}, "holds a, b"),
    ({"clip_l": VECTORS, "clip_g": VECTORS + 1}, "1.x or 2.x: it holds clip_"),
    ({"<toy>": torch.zeros(2, 3, 16)}, r"'<toy>' is \[2, 3, 16\]"),
    ({"<toy>": torch.zeros(0, 16)}, r"'<toy>' is \[0, 16\]"),
    ({"<toy>": torch.zeros(2, 16, dtype=torch.int64)}, r"'<toy>' is \[2, 16\]"),
    ({"<toy>": torch.full((1, 16), float("nan"))}, "not finite"),
])
def test_what_is_no_embedding_is_refused(tmp_path, content, words):
    save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"a.safetensors .*{words}"):
        load_embedding(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content, words", [
    ([VECTORS], "holds a list"), ({3: VECTORS}, "its key is 3"), ({"<toy>": "hello"}, "'<toy>' is str"),
    ({}, "it holds nothing"),
    ({"string_to_param": {"*": VECTORS, "+": VECTORS}, "name": "x"}, "holds 2 embeddings"),
    ({"string_to_param": {}, "name": "x"}, "holds 0 embeddings"),
])
def test_a_pickle_that_holds_something_else_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=f"a.pt .*{words}"):
        load_embedding(tmp_path / "a.pt")


def test_endings_that_say_no_format_are_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a.png has an ending that cannot be read"):
        load_embedding(tmp_path / "a.png")
    with pytest.raises(CheckpointError, match="a.txt has an ending that says no format"):
        save_embedding(tmp_path / "a.txt", Embedding("<toy>", VECTORS))


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path):
    path = save_embedding(tmp_path / "a.safetensors", Embedding("<toy>", VECTORS))
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="a.safetensors was not written.*'<toy>' are not finite"):
        save_embedding(path, Embedding("<toy>", VECTORS * float("inf")))
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="cannot be written"):
        save_embedding(path / "deeper.safetensors", Embedding("<toy>", VECTORS))


def test_an_embedding_for_another_model_is_told_with_both_widths(parts, tmp_path):
    path = save_embedding(tmp_path / "a.safetensors", Embedding("<toy>", torch.zeros(1, 768)))
    with pytest.raises(ValueError, match="768 wide.*takes 16"):
        add_embedding(parts.tokenizer, parts.text_encoder, load_embedding(path))
    shutil.rmtree(tmp_path)
