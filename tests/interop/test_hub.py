"""Networks on the Hub: what is written and uploaded, and read from a folder or huggingface_hub's cache. No network."""

import functools
import json
import shutil
import sys
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from edm_reference import SIZE, SMALL, fill, inputs

from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.errors import ConfigError, WeightsError
from gdd_fast.evaluate import EvaluateConfig, evaluate
from gdd_fast.export import ExportConfig, export
from gdd_fast.interop import hub
from gdd_fast.interop.model_card import license_of_teacher
from gdd_fast.models.files.load import load_generator
from gdd_fast.models.files.save import save_network
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.sample import SampleConfig, sample


@pytest.fixture
def net() -> GDDPrecond:
    return fill(GDDPrecond(SIZE, 3, **SMALL["ddpmpp"]))


def outputs(net: GDDPrecond) -> torch.Tensor:
    # frozen, as what is loaded is: a CPU computes frozen convolutions in another order
    with torch.no_grad():
        return net.requires_grad_(False)(**inputs(SMALL["ddpmpp"]))


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
    monkeypatch.setattr(hub, "upload", lambda folder, repo_id, **options: seen.append((folder, repo_id)) or "commit")
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

    def file(repo_id, name, *, local_files_only):
        assert not local_files_only
        asked.append((repo_id, name))
        return str(tmp_path / "commit" / name)

    def snapshot(repo_id, *, revision, allow_patterns, local_files_only):
        asked.append((repo_id, revision))
        assert "model_index.json" in allow_patterns
        return str(tmp_path / "commit")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, **options: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.locate_teacher("google/ddpm-cifar10-32") == tmp_path / "commit"
    assert asked == [("google/ddpm-cifar10-32", "model_index.json"), ("google/ddpm-cifar10-32", "commit")]
    assert hub.locate_teacher("no-such.pkl") == Path("no-such.pkl") and len(asked) == 2
    with pytest.raises(WeightsError, match="no/such/folder"):
        hub.locate_teacher("no/such/folder")


def test_a_hub_that_does_not_answer_is_asked_once_and_the_cache_is_read(net, tmp_path, monkeypatch):
    """A mistyped name of a run, on a machine without a connection: no tries again, and the cause in the error."""

    class NoConnection(Exception):
        """An error of the HTTP library, which is no OSError."""

    asked = []

    def no_connection(url, **options):
        asked.append(url)
        raise NoConnection("Name or service not known\nmany more lines")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", no_connection)
    # the client's own questions, which it repeats
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", lambda **_: pytest.fail("asked again"))
    monkeypatch.chdir(tmp_path)
    for find in (hub.network_path, hub.locate):
        with pytest.raises(WeightsError, match=r"^runmine is neither .* on the Hub: Name or service not known\. Check"):
            find("runmine")
    assert len(asked) == 2 and asked[0].endswith("/runmine/resolve/main/model_index.json")
    put_in_cache(net, tmp_path / "cache")
    assert hub.network_path("user/name") == hub.locate("user/name")
    assert len(asked) == 4


@pytest.fixture
def offline_cache(tmp_path, monkeypatch) -> Path:
    """huggingface_hub's cache, without a connection."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_commands_take_the_name_of_a_repository(offline_cache, net):
    """What `sample`, `evaluate`, `export` and `analyze` do with --net, with the real client and a cache."""
    put_in_cache(net, offline_cache)
    sample(SampleConfig(net="user/name", seeds="0-1", out=Path("by-name.npz"), device="cpu"))
    save_network(net, "folder")
    sample(SampleConfig(net="folder", seeds="0-1", out=Path("by-path.npz"), device="cpu"))
    by_name, by_path = (np.load(name)["arr_0"] for name in ("by-name.npz", "by-path.npz"))
    assert by_name.shape == (2, SIZE, SIZE, 3) and np.array_equal(by_name, by_path)
    for command in (
        EvaluateConfig(net="user/other", data="demo-test"),
        ExportConfig(net="user/other", web=Path("web")),
    ):
        with pytest.raises(WeightsError, match="user/other is neither a path that exists nor a network on the Hub"):
            (evaluate if isinstance(command, EvaluateConfig) else export)(command)
    assert hub.network_path("demo").is_dir()
    (offline_cache.parent / "runs").mkdir()
    with pytest.raises(WeightsError, match=r"^runs/typo does not exist: give an EDM \.pkl"):
        hub.network_path("runs/typo")  # there is such a folder here: a path, and nobody is asked


def test_a_pipeline_in_the_cache_is_a_teacher(offline_cache):
    pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
    diffusers = pytest.importorskip("diffusers")
    from diffusers_teachers import random_unet

    snapshot = offline_cache / "models--user--ddpm" / "snapshots" / ("0" * 40)
    diffusers.DDPMPipeline(random_unet("plain"), diffusers.DDPMScheduler()).save_pretrained(snapshot)
    (snapshot / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# DDPM\n")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert hub.network_path("user/ddpm") == snapshot
    assert type(load_generator(hub.network_path("user/ddpm"))).__name__ == "UNet2DPrecond"
    assert license_of_teacher("user/ddpm") == "apache-2.0"
    assert license_of_teacher("user/unheard-of") is None


@pytest.fixture
def run_folder(net, tmp_path) -> Path:
    """A finished run, as far as a card looks at it."""
    folder = tmp_path / "run"
    save_network(net, folder / "generator_ema")
    settings = {"generator": {"teacher": "google/ddpm-cifar10-32", "freeze": 1}, "data": {"data": "data/my-images.zip"}}
    (folder / "config.json").write_text(json.dumps(settings))
    distances = {
        "teacher": {"lite0": 3.0, "pixels": 1.0},
        "untrained": {"lite0": 300.0, "pixels": 100.0},
        "distilled": {"lite0": 5.126, "pixels": 2.0},
    }
    report = {"images": 2000, "reference": "my-test", "reference_images": 5000, "distances": distances}
    (folder / "report.json").write_text(json.dumps(report | {"measured": {"trained_images": 16000}}))
    return folder


def test_the_card_of_a_run_says_teacher_data_metrics_and_licences(run_folder, net, tmp_path):
    licenses = {"license": "mit", "teacher_license": "apache-2.0", "data_license": "cc-by-4.0"}
    hub.save_pretrained(run_folder, tmp_path / "out", repo_id="user/mine", **licenses)
    assert torch.equal(outputs(hub.from_pretrained(tmp_path / "out")), outputs(net))
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")  # as the Hub reads it
    assert (card.data.license, card.data.base_model) == ("mit", "google/ddpm-cifar10-32")
    values = {result.metric_name: (result.dataset_name, result.metric_value) for result in card.data.eval_results}
    assert values == {"FD-lite0": ("my-images.zip", 5.126), "FD-pixels": ("my-images.zip", 2.0)}
    for line in (
        "| teacher | google/ddpm-cifar10-32 | apache-2.0 |",
        "| data | my-images.zip | cc-by-4.0 |",
        "| this generator | distilled for 16,000 images, --freeze 1 | mit |",
        "Frechet distance of 2,000 images against 5,000 of my-test",
        "| this generator, 1 step | 5.13 | 2.00 |",
        "| the teacher, many steps | 3.00 | 1.00 |",
    ):
        assert line in card.text, line
    with pytest.raises(ConfigError, match="teacher_license must be an identifier"):
        hub.save_pretrained(run_folder, tmp_path / "bad", teacher_license="MIT License")
    assert not (tmp_path / "bad").exists()


def test_a_card_claims_no_licence_that_nobody_stated(run_folder, tmp_path):
    hub.save_pretrained(run_folder, tmp_path / "out")
    card = huggingface_hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license is None and "| data | my-images.zip | not stated |" in card.text
    assert license_of_teacher("edm-cifar10-32x32-uncond-ve.pkl") == "cc-by-nc-sa-4.0"
    assert license_of_teacher("demo") == "mit"
    hub.save_pretrained(hub.network_path("demo"), tmp_path / "network")
    assert "| teacher | not stated | not stated |" in (tmp_path / "network" / "README.md").read_text()


def test_a_repository_without_a_pipeline_is_our_own(monkeypatch, tmp_path):
    from huggingface_hub.errors import EntryNotFoundError

    def file(repo_id, name, **options):
        if name == "model_index.json":
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(tmp_path / "commit" / name)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, **options: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", file)
    assert hub.locate_teacher("user/name") == tmp_path / "commit"
