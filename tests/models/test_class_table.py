"""Class tables in files, and the heads that start from them."""

import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from edm_files import Reduced
from safetensors.torch import save_file
from tiny_run import tiny_config, tiny_task, write_inputs
from torch import nn

from gdd_fast.errors import ConfigError, UnsafePickleError, WeightsError
from gdd_fast.models.files.class_table import read_class_table


def _load_type(name):
    return {"set": set}[name]


_load_type.__module__ = "dill._dill"


def write_pickle(path, content):
    """As the public file is: protocol 3, the table as an Embedding, an empty set by way of dill."""
    module = types.ModuleType("dill._dill")
    module._load_type = _load_type
    sys.modules |= {"dill": types.ModuleType("dill"), "dill._dill": module}
    try:
        path.write_bytes(pickle.dumps(content, protocol=3))
    finally:
        del sys.modules["dill"], sys.modules["dill._dill"]


class _Called:
    """Pickles as `_load_type("set")([])`: a call of what a call returns."""

    def __reduce__(self):
        return _Caller(), ([],)


class _Caller(Reduced):
    def __init__(self):
        super().__init__(_load_type, "set")

    def __call__(self, *arguments):
        raise AssertionError("only pickled")


@pytest.fixture
def table():
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(0))


def embedding(table):
    layer = nn.Embedding.from_pretrained(table)
    layer.__dict__["_non_persistent_buffers_set"] = _Called()
    return layer


def test_every_form_of_file_holds_the_same_table(table, tmp_path):
    write_pickle(tmp_path / "t.pkl", {"embed": embedding(table)})
    np.save(tmp_path / "t.npy", table.numpy())
    save_file({"embed": table}, tmp_path / "t.safetensors")
    for name in ("t.pkl", "t.npy", "t.safetensors"):
        assert torch.equal(read_class_table(tmp_path / name), table), name


def test_nothing_in_a_pickle_runs(table, tmp_path, canary):
    for number, hidden in enumerate((Reduced(os.mkdir, str(canary)), Reduced(_load_type, "type"))):
        write_pickle(tmp_path / f"{number}.pkl", {"embed": embedding(table), "more": hidden})
        with pytest.raises(UnsafePickleError, match=f"{number}.pkl"):
            read_class_table(tmp_path / f"{number}.pkl")


def test_files_without_a_table(table, tmp_path):
    np.save(tmp_path / "two.npy", np.zeros((2, 3, 4), np.float32))
    save_file({"a": table, "b": table.clone()}, tmp_path / "two.safetensors")
    np.save(tmp_path / "nan.npy", np.full((2, 3), np.nan, np.float32))
    (tmp_path / "text.npy").write_text("no array")
    cases = {"two.npy": "0 float", "two.safetensors": "2 float", "nan.npy": "NaN", "text.npy": "not a readable"}
    for name, message in {**cases, "none.pkl": "no such file"}.items():
        with pytest.raises(WeightsError, match=message):
            read_class_table(tmp_path / name)


@pytest.mark.usefixtures("plain")
def test_each_head_starts_from_the_file_and_trains_its_own(tmp_path):
    write_inputs(tmp_path, label_dim=3)
    table = torch.randn(10, 320, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "t.npy", table.numpy())
    task = tiny_task(tiny_config(tmp_path, cond=True, class_embedding=str(tmp_path / "t.npy")))
    tables = [head.embedding.weight for heads in task.heads.heads for head in heads]
    assert len(tables) == 4 and all(torch.equal(own, table[:3]) for own in tables)
    task.iteration(0)
    assert all(not torch.equal(own, table[:3]) for own in tables)
    assert not torch.equal(tables[0], tables[1])
    np.save(tmp_path / "t.npy", table[:2].numpy())
    with pytest.raises(ConfigError, match=r"3 classes.*\(2, 320\)"):
        tiny_task(tiny_config(tmp_path, cond=True, class_embedding=str(tmp_path / "t.npy")))
    with pytest.raises(ConfigError, match="--class-embedding must be one of imagenet"):
        tiny_config(tmp_path, class_embedding="imagnet").validate()
