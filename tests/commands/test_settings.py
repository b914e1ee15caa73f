"""Configurations take what is meant without doubt, and refuse the rest in one line that names the flag."""

from pathlib import Path

import numpy as np
import pytest

from gdd_fast.config import override, preset
from gdd_fast.convert import ConvertConfig
from gdd_fast.data.transform import Transform
from gdd_fast.distill.pretraining import PretrainConfig
from gdd_fast.errors import ConfigError
from gdd_fast.evaluate import EvaluateConfig
from gdd_fast.prepare import PrepareConfig
from gdd_fast.sample import SampleConfig


def test_paths_may_be_strings_in_every_configuration():
    assert override(preset("demo"), run_dir="runs/short").run_dir == Path("runs/short")
    assert SampleConfig(net=Path("demo"), out="x.zip", grid="x.png").out == Path("x.zip")
    assert SampleConfig(net=Path("demo")).net == "demo"
    assert EvaluateConfig(samples="x.zip", ref=["x.npz"]).samples == Path("x.zip")
    assert PrepareConfig(source="a", dest="b.zip").dest == Path("b.zip")
    assert ConvertConfig(source="a", destination="b").source == Path("a")
    assert PretrainConfig(run_dir="runs/t", channel_mult=[1, 2]).channel_mult == (1, 2)


def test_numbers_of_other_libraries_become_pythons():
    config = override(preset("demo"), batch=4.0, seed=np.int64(3), g_lr=np.float32(0.5), x_flip=np.True_)
    values = (config.run.batch, config.run.seed, config.generator.g_lr, config.data.x_flip)
    assert values == (4, 3, 0.5, True) and [type(value) for value in values] == [int, int, float, bool]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"g_lr": "1e-4"}, "--g-lr must be a number, not '1e-4'"),
        ({"batch": 4.5}, "--batch must be a whole number, not 4.5"),
        ({"batch": True}, "--batch must be a whole number, not True"),
        ({"cond": 1}, "--cond must be True or False, not 1"),
        ({"backbones": "vgg16"}, "--backbones takes several values: give a list, not 'vgg16'"),
        ({"run_dir": 3}, "--run-dir must be a path, not 3"),
        ({"data": 3}, "--data must be text, not 3"),
    ],
)
def test_what_cannot_be_meant_names_the_flag(settings, message):
    with pytest.raises(ConfigError) as error:
        override(preset("demo"), **settings)
    assert message in str(error.value)


def test_a_transform_too():
    with pytest.raises(ConfigError, match="--resolution must be a whole number"):
        Transform(resolution="32")
