"""Networks on the Hub: what is written and uploaded, and read from a folder or huggingface_hub's cache. No network."""

import functools
import json
import shutil
import sys
import types
from pathlib import Path

import huggingface_hub
import pytest
import torch
from edm_reference import SIZE, SMALL, fill, inputs

from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.interop import hub
from gdd_fast.models.precond import GDDPrecond


@pytest.fixture
def net() -> GDDPrecond:
    return fill(GDDPrecond(SIZE, 3, **SMALL["ddpmpp"]))


def outputs(net: GDDPrecond) -> torch.Tensor:
    with torch.no_grad():
        return net(**inputs(SMALL["ddpmpp"]))


def test_a_folder_gives_the_network_back(net, tmp_path):
    assert hub.save_pretrained(net, tmp_path / "my-net") is None
    assert {path.name for path in (tmp_path / "my-net").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert torch.equal(outputs(hub.from_pretrained(tmp_path / "my-net")), outputs(net))
    assert "# my-net" in (tmp_path / "my-net" / "README.md").read_text()


def test_a_generator_is_stored_as_its_network_and_a_card_that_is_there_stays(net, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    hub.save_pretrained(OneStepGenerator.from_network(net), tmp_path)
    assert torch.equal(outputs(hub.from_pretrained(str(tmp_path))), outputs(net))
    assert (tmp_path / "README.md").read_text() == "mine"


def test_push_uploads_the_folder(net, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["create"] = options
            return types.SimpleNamespace(repo_id=f"user/{repo_id}")

        def create_branch(self, repo_id, **options):
            calls["branch"] = options

        def upload_folder(self, *, folder_path, repo_id, **options):
            calls["upload"] = options | {"repo_id": repo_id}
            calls["files"] = sorted(path.name for path in folder_path.iterdir())
            calls["config"] = json.loads((folder_path / "config.json").read_text())
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub.push_to_hub(net, "name", private=True, token="t", branch="b") == "https://hub/commit"
    assert calls["files"] == ["README.md", "config.json", "model.safetensors"]
    assert calls["config"]["precond"] == "gdd"
    assert (calls["token"], calls["create"]["private"]) == ("t", True)
    assert (calls["upload"]["repo_id"], calls["upload"]["revision"]) == ("user/name", "b")


def test_save_pretrained_can_push(net, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(hub, "_upload", lambda folder, repo_id, **options: seen.append((folder, repo_id)) or "commit")
    assert hub.save_pretrained(net, tmp_path / "net", push_to_hub=True, repo_id="user/net") == "commit"
    assert seen == [(tmp_path / "net", "user/net")]


def put_in_cache(net: GDDPrecond, cache: Path) -> None:
    """As huggingface_hub keeps the repository user/name."""
    repository = cache / "models--user--name"
    hub.save_pretrained(net, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)


def test_a_repository_is_read_from_the_cache(net, tmp_path):
    put_in_cache(net, tmp_path)
    loaded = hub.from_pretrained("user/name", cache_dir=tmp_path, local_files_only=True, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(loaded.state_dict(), net.state_dict())


@pytest.mark.parametrize("name", ["user/name", "no such name!"])
def test_what_is_not_there_is_one_error(name, tmp_path):
    with pytest.raises(WeightsError, match="neither a path that exists nor a network on the Hub"):
        hub.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)


def test_a_generator_of_a_repository(net, tmp_path, monkeypatch):
    put_in_cache(net, tmp_path)
    monkeypatch.chdir(tmp_path)
    load = functools.partial(OneStepGenerator.from_pretrained, device="cpu")
    generator = load("user/name", cache_dir=tmp_path, local_files_only=True, dtype="bfloat16")
    assert (generator.device.type, generator.dtype) == ("cpu", torch.bfloat16)
    torch.testing.assert_close(generator.network.state_dict(), net.state_dict())
    other = fill(GDDPrecond(SIZE, 3, **SMALL["adm"]))
    hub.save_pretrained(other, tmp_path / "user" / "name")
    assert load("user/name", cache_dir=tmp_path).network.model_type == other.model_type, "a path comes first"


def test_a_generator_is_downloaded(net, tmp_path, monkeypatch):
    """All files of one commit, whatever the branch comes to name meanwhile."""
    other = fill(GDDPrecond(SIZE, 3, **SMALL["adm"]))
    commits = {"a" * 40: net, "b" * 40: other}
    for commit, network in commits.items():
        hub.save_pretrained(network, tmp_path / "repository" / commit)
    branch, asked = iter(commits), []

    def download(repo_id, name, **options):
        asked.append((repo_id, name, options["revision"], options["token"]))
        commit = next(branch) if options["revision"] == "v1" else options["revision"]
        target = tmp_path / "cache" / "snapshots" / commit / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "repository" / commit / name, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    generator = OneStepGenerator.from_pretrained("name", device="cpu", revision="v1", token="t")
    torch.testing.assert_close(generator.network.state_dict(), net.state_dict())
    assert asked == [("name", "config.json", "v1", "t"), ("name", "model.safetensors", "a" * 40, "t")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user/name", "neither a path that exists nor a network on the Hub"),
        ("../nowhere", "neither a path that exists nor a network on the Hub, such as user/name"),
        ("a/b/c", "neither a path"),
        ("runs/net.pkl", "does not exist"),
        (Path("user/name"), "does not exist"),
    ],
)
def test_a_generator_that_is_nowhere_is_one_error(name, message, tmp_path, monkeypatch):
    """Without a network or a connection, and never a question to the Hub about what is a path."""

    def offline(repo_id, name, **options):
        assert repo_id == "user/name"
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the Hub\nnor find the file in the cache")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(WeightsError, match=message) as error:
        OneStepGenerator.from_pretrained(name, device="cpu")
    assert "\n" not in str(error.value)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match="pip install huggingface_hub"):
        OneStepGenerator.from_pretrained("user/name", device="cpu")


def test_other_modules_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="can be saved"):
        hub.save_pretrained(torch.nn.Linear(1, 1), tmp_path)


def test_a_repository_with_a_pipeline_of_diffusers_is_a_teacher(monkeypatch, tmp_path):
    asked = []

    def file(repo_id, name, **options):
        asked.append((repo_id, name))
        return str(tmp_path / "commit" / name)

    def snapshot(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision))
        assert "model_index.json" in allow_patterns
        return str(tmp_path / "commit")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.locate_teacher("google/ddpm-cifar10-32") == tmp_path / "commit"
    assert asked == [("google/ddpm-cifar10-32", "model_index.json"), ("google/ddpm-cifar10-32", "commit")]
    assert hub.locate_teacher("no-such.pkl") == Path("no-such.pkl") and len(asked) == 2
    with pytest.raises(WeightsError, match="no/such/folder"):
        hub.locate_teacher("no/such/folder")


def test_a_repository_without_a_pipeline_is_our_own(monkeypatch, tmp_path):
    from huggingface_hub.errors import EntryNotFoundError

    def file(repo_id, name, **options):
        if name == "model_index.json":
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(tmp_path / "commit" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", file)
    assert hub.locate_teacher("user/name") == tmp_path / "commit"
