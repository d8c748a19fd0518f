"""A tokenizer's files: the folder that transformers' CLIPTokenizer reads and writes, and CLIP's own vocabulary file.

    vocab.json, merges.txt                              the vocabulary and the merges
    tokenizer_config.json, special_tokens_map.json      settings, among them the padding token
    added_tokens.json                                   tokens that textual inversion added
    tokenizer.json                                      all of it in one file, as newer folders have it

    bpe_simple_vocab_16e6.txt.gz                        the merges as OpenAI published them with CLIP
"""

import gzip
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from ..files import write_atomically
from ..tokenizer import END, LENGTH, START, Pair, Tokenizer
from .errors import CheckpointError
from .files import read_json

PUBLISHED_MERGES = 48894        # of the 262,145 in CLIP's file: 49,408 ids in all
HEADER = "#version: 0.2"        # first line of a merges.txt


def load_tokenizer(path: str | Path, pad_with_end: bool | None = None) -> Tokenizer:
    """A folder with vocab.json and merges.txt (or a tokenizer.json with both), or CLIP's bpe_simple_vocab_16e6.txt.gz.

    pad_with_end: None takes the folder's padding token, the end token where it names none.
    Raises CheckpointError, in one sentence that names the file, for one that is missing or damaged.
    """
    path = Path(path)
    config, added = {}, {}
    if path.is_dir():
        vocab, merges = _read_folder(path)
        config, added = _read_settings(path)
    elif path.is_file():
        vocab, merges = None, _read_published(path)
    else:
        raise CheckpointError(f"There is no tokenizer at {path}: give a folder with vocab.json and merges.txt, or "
                              "CLIP's bpe_simple_vocab_16e6.txt.gz.")
    try:
        tokenizer = Tokenizer(merges, vocab)
    except ValueError as error:
        raise CheckpointError(f"The tokenizer at {path} is damaged: {error}") from error
    _add_tokens(tokenizer, added, path)
    pad = config.get("pad_token") or END
    pad = pad["content"] if isinstance(pad, dict) else pad
    if pad_with_end is None and pad not in (END, tokenizer.symbols[0]):
        raise CheckpointError(f"The tokenizer at {path} pads with {pad!r}, neither {END!r} as SD 1.x nor id 0 as "
                              "SD 2.x: choose one of the two with pad_with_end.")
    tokenizer.pad_with_end = pad == END if pad_with_end is None else pad_with_end
    return tokenizer


def save_tokenizer(folder: str | Path, tokenizer: Tokenizer) -> Path:
    """Write the folder that `load_tokenizer`, transformers and diffusers open. Raises OSError where it cannot be."""
    folder = Path(folder)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": tokenizer.symbols[tokenizer.pad]}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "add_prefix_space": False,
              "do_lower_case": True, "errors": "replace", **special}
    added = {symbol: i for i, symbol in enumerate(tokenizer.symbols) if symbol in tokenizer.added}
    with write_atomically(folder) as path:
        path.mkdir()
        for name, text in {
            "vocab.json": json.dumps(tokenizer.vocab, ensure_ascii=False),
            "merges.txt": "\n".join([HEADER, *map(" ".join, tokenizer.merges), ""]),
            "special_tokens_map.json": json.dumps(special, indent=2),
            "tokenizer_config.json": json.dumps(config, indent=2),
            "added_tokens.json": json.dumps(added),
        }.items():
            (path / name).write_text(text, encoding="utf-8", newline="\n")
    # Of an earlier tokenizer in the same folder: transformers would read it before the others.
    (folder / "tokenizer.json").unlink(missing_ok=True)
    return folder


# --- reading ----------------------------------------------------------------------------------------

def _add_tokens(tokenizer: Tokenizer, added: dict[str, int], path: Path):
    """Add tokens as a folder lists them: "<toy>", "<toy>_1", "<toy>_2" are one word of three ids."""
    names = sorted(added.keys() - tokenizer.vocab.keys(), key=added.get)
    first = tokenizer.vocab_size
    if [added[name] for name in names] != list(range(first, first + len(names))):
        raise CheckpointError(f"The tokenizer at {path} is damaged: the ids of its added tokens {names} do not follow "
                              f"its vocabulary, which ends before {first}.")
    while names:
        n = 1
        while names[n:n + 1] == [f"{names[0]}_{n}"]:
            n += 1
        try:
            tokenizer.add_token(names[0], n)
        except ValueError as error:
            raise CheckpointError(f"The tokenizer at {path} is damaged: {error}") from error
        names = names[n:]


def _split_pairs(lines: Iterable[str], path: Path) -> list[Pair]:
    pairs = [tuple(line.split()) for line in lines]
    for pair in pairs:
        if len(pair) != 2:
            raise CheckpointError(f"{path} is damaged, merge {' '.join(pair)!r} is not a pair: fetch it again.")
    return pairs


def _read_published(path: Path) -> list[Pair]:
    """CLIP's own file: a line with the version, then more merges than CLIP uses."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no complete gzip file of merges ({error}): fetch it again.") from error
    merges = lines[1:1 + PUBLISHED_MERGES]
    if len(merges) < PUBLISHED_MERGES:
        raise CheckpointError(f"{path} holds {len(merges)} merges where CLIP's file has {PUBLISHED_MERGES} and more: "
                              "fetch it again.")
    return _split_pairs(merges, path)


def _read_folder(folder: Path) -> tuple[dict[str, int], list[Pair]]:
    if (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        model = read_json(folder / "tokenizer.json").get("model", {})
        if model.get("type") != "BPE":
            raise CheckpointError(f"{folder} holds a tokenizer of type {model.get('type')}, not CLIP's BPE: give the "
                                  "folder of a CLIP tokenizer.")
        merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
        return model.get("vocab", {}), _split_pairs(merges, folder / "tokenizer.json")
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}: a tokenizer's folder holds vocab.json and merges.txt, and "
                                  "both are needed.")
    file = folder / "merges.txt"
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): fetch or write it again.") from error
    lines = lines[1:] if lines[0].startswith("#version") else lines      # "#" begins merges too
    return read_json(folder / "vocab.json"), _split_pairs(filter(str.strip, lines), file)


def _read_settings(folder: Path) -> tuple[dict, dict[str, int]]:
    """(settings, ids of the tokens that were added to the vocabulary)."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
    config, special, added, whole = (read_json(folder / n) if (folder / n).is_file() else {} for n in names)
    added = dict(added)
    added |= {token["content"]: int(i) for i, token in config.get("added_tokens_decoder", {}).items()}
    added |= {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
    return config | special, added
