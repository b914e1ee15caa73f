"""Networks on the Hugging Face Hub: three functions that follow the names and conventions of huggingface_hub.

    save_pretrained(net, "folder")                             config.json, model.safetensors, README.md
    push_to_hub("runs/mine", "user/name", license="mit")       uploads the same, with what is known about the run
    net = from_pretrained("user/name", revision="main")        or a folder

`gdd_fast.OneStepGenerator.from_pretrained` takes a repository too, found by `locate`.

`net` is a network of gdd_fast, a `OneStepGenerator` (its network is stored), a network that `accelerate` changed, or
the folder of a training run: then its averaged generator is stored, with a card that names teacher, data, metrics and
the licence of each (`gdd_fast.interop.model_card`). The format is the folder of `gdd_fast.models.files.save`: no code,
no pickle. Arguments not described here have their meaning in huggingface_hub.

`network_path` resolves what a command's --net or --teacher names: `demo`, a path or a repository.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from gdd_fast.bundled import teacher_path
from gdd_fast.errors import WeightsError
from gdd_fast.files import atomic_write
from gdd_fast.interop.model_card import Origin, model_card, origin_of_run
from gdd_fast.models.files.load import KINDS, load_generator
from gdd_fast.models.files.save import save_network
from gdd_fast.models.preconditioned import Preconditioned

FILES = ("config.json", "model.safetensors")
# The files of a diffusers pipeline: its description and its components, in subfolders or beside it.
PIPELINE = (
    "model_index.json",
    "*config.json",
    "*diffusion_pytorch_model.safetensors",
    "*diffusion_pytorch_model.bin",
    "README.md",  # states the teacher's licence, for the card of generators distilled from it
)
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


class HasNetwork(Protocol):
    """A OneStepGenerator, or anything else that keeps the network it was made from."""

    network: Preconditioned


def save_pretrained(
    net: Preconditioned | HasNetwork | str | Path,
    save_directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    license: str | None = None,
    teacher_license: str | None = None,
    data_license: str | None = None,
    repo_id: str | None = None,
    push_to_hub: bool = False,
    **push_to_hub_kwargs: Any,
) -> str | None:
    """Write `net` to a folder, each file atomically, with weights in `dtype`. An existing README.md is left alone.

    `license`, `teacher_license` and `data_license` are the Hub's identifiers, such as apache-2.0, and override what is
    known on the card. With `push_to_hub=True` the folder is also uploaded to `repo_id` (by default the folder's name).

    Returns:
        The address of the commit on the Hub, or None.

    Raises:
        ConfigError: `net` is not a network that can be stored, or a licence is not an identifier.
        WeightsError: there is no network at the path `net`.
        huggingface_hub.errors.HfHubHTTPError: the Hub refused, or cannot be reached.
    """
    folder = Path(save_directory)
    licenses = {"license": license, "teacher_license": teacher_license, "data_license": data_license}
    network, origin = _network(net), _origin(net).licensed(**licenses)
    save_network(network, folder, dtype)
    card = folder / "README.md"
    if not card.exists():
        with atomic_write(card) as temporary:
            temporary.write_text(_card(network, repo_id or folder.name, origin))
    if not push_to_hub:
        return None
    return upload(folder, repo_id or folder.name, **push_to_hub_kwargs)


def push_to_hub(net: Preconditioned | HasNetwork | str | Path, repo_id: str, **options: Any) -> str | None:
    """Upload `net` to the Hub's repository `repo_id`, created if it does not exist. Returns the commit's address.

    `options` and errors are those of `save_pretrained` and `upload`.
    """
    with tempfile.TemporaryDirectory() as folder:
        return save_pretrained(net, folder, repo_id=repo_id, push_to_hub=True, **options)


def from_pretrained(
    pretrained_model_name_or_path: str | Path,
    *,
    revision: str | None = None,
    force_download: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Preconditioned:
    """A network as `load_generator` returns it, from a Hub repository or from anything `load_generator` takes.

    Args:
        pretrained_model_name_or_path: "user/name" on the Hub; a path that exists is preferred.
        revision: branch, tag or commit.
        device, dtype: where to put the network, and what it computes in.

    Raises:
        WeightsError: not a path or repository that holds a network, or the network is broken.
    """
    path = locate(
        pretrained_model_name_or_path,
        revision=revision,
        force_download=force_download,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    return load_generator(path, device, dtype)


def locate(name_or_path: str | Path, **options: Any) -> Path:
    """Where a network is: the path itself if it exists, else the folder that `download` fetches, given its options.

    A repository's name is a string of letters, digits, `-`, `_`, `.` and at most one `/`, such as "user/name". What can
    only be a path (a Path, a .pkl) is returned even if missing; `load_generator` then says so.

    Raises WeightsError for a string that is neither, and where `download` does.
    """
    path = Path(name_or_path)
    if path.exists() or isinstance(name_or_path, Path) or path.suffix.lower() == ".pkl":
        return path
    if not _REPOSITORY.fullmatch(name_or_path):
        raise WeightsError(f"{name_or_path} is neither a path that exists nor a network on the Hub, such as user/name")
    return download(name_or_path, **options)


def network_path(name: str | Path) -> Path:
    """The path of a network that a command names: `demo`, a path, or a Hub repository, ours or a pipeline.

    A name inside an existing folder (runs/mine if there is runs/) is a path, and the Hub is not asked. Raises
    WeightsError if there is no such network.
    """
    path = teacher_path(str(name))
    if path.exists() or isinstance(name, Path):
        return path
    if path.parent != Path() and path.parent.is_dir():
        raise WeightsError(f"{name} does not exist: give {KINDS}, or a Hub repository")
    return locate_teacher(str(name))


def locate_teacher(name: str) -> Path:
    """As `locate`; also the folder of a repository that holds a diffusers pipeline, as google/ddpm-cifar10-32.

    Raises WeightsError for a string that names neither.
    """
    if Path(name).exists() or Path(name).suffix.lower() == ".pkl" or not _REPOSITORY.fullmatch(name):
        return locate(name)
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ModuleNotFoundError:
        return download(name)  # says so

    silent = _no_answer(name, PIPELINE[0], {})
    options = {"local_files_only": silent is not None}
    try:
        commit = Path(hf_hub_download(name, PIPELINE[0], **options)).parent.name
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(PIPELINE), **options))
    except LocalEntryNotFoundError as error:  # a subclass of EntryNotFoundError: the Hub cannot be reached
        return _download(name, silent or error, options)
    except EntryNotFoundError:
        return _download(name, silent, {})
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise _unknown(name, error) from error


def _unknown(repo_id: str, error: Exception) -> WeightsError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return WeightsError(
        f"{repo_id} is neither a path that exists nor a network on the Hub: {reason}. Check the name, your "
        "connection, and that you are logged in if the repository is private."
    )


def _no_answer(repo_id: str, filename: str, options: dict[str, Any]) -> ConnectionError | None:
    """Why the Hub cannot be asked for a file; None if it answers at all."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from gdd_fast.models.files.hub_question import ask_hub

    try:
        ask_hub(repo_id, filename, revision=options.get("revision"), token=options.get("token"))
    except (HfHubHTTPError, HFValidationError):
        return None
    except ConnectionError as error:
        return error
    return None


def download(repo_id: str, **options: Any) -> Path:
    """The folder in huggingface_hub's cache that holds a repository's network; options as for `hf_hub_download`.

    If the Hub does not answer the first time, only the cache is read. Raises WeightsError if there is no such
    repository, it holds no network, or the Hub cannot be reached and the network is not in the cache.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError as error:
        raise WeightsError(
            f"{repo_id} is not a path that exists, and the Hub needs `pip install huggingface_hub`"
        ) from error

    return _download(
        repo_id, None if options.get("local_files_only") else _no_answer(repo_id, FILES[0], options), options
    )


def _download(repo_id: str, silent: Exception | None, options: dict[str, Any]) -> Path:
    """`silent`: why only the cache is read; None to ask the Hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if silent is not None:
        options = options | {"local_files_only": True}
    try:
        # the cache's folders are named after commits, and the second file is requested by that commit, as a branch may
        # move in between
        folder = Path(hf_hub_download(repo_id, FILES[0], **options)).parent
        for name in FILES[1:]:
            hf_hub_download(repo_id, name, **options | {"revision": folder.name})
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _unknown(repo_id, silent or error) from error
    return folder


def _network(net: Preconditioned | HasNetwork | str | Path) -> Preconditioned:
    if isinstance(net, str | Path):
        return load_generator(net)
    return net if isinstance(net, nn.Module) else getattr(net, "network", net)


def _origin(net: Preconditioned | HasNetwork | str | Path) -> Origin:
    return origin_of_run(Path(net)) if isinstance(net, str | Path) else Origin()


def form_of(network: Preconditioned) -> str:
    """What the network's images are, in words."""
    classes = f" in {network.label_dim} classes" if network.label_dim else ""
    return f"{network.img_channels} x {network.img_resolution} x {network.img_resolution} pixels{classes}"


def _card(network: Preconditioned, title: str, origin: Origin) -> str:
    loading = f'from gdd_fast import OneStepGenerator\n\nimages = OneStepGenerator.from_pretrained("{title}")(16)'
    return model_card(title, form_of(network), loading, origin)


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str = "Push model using gdd_fast",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    allow_patterns: Sequence[str] | None = (*FILES, "README.md"),
) -> str:
    """Upload a folder's files to the Hub repository `repo_id`, created if missing. Returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=None if allow_patterns is None else list(allow_patterns),
        commit_message=commit_message,
        revision=branch,
        create_pr=create_pr,
    )
    return str(commit)
