"""What each freeze level freezes: the paper's fractions, its rule by name, and that gradients obey."""

import pytest
import torch
from edm_reference import FULL, SIZE, SMALL, fill, inputs
from torch import nn

from gdd_fast.distill.freeze import freeze
from gdd_fast.errors import ConfigError
from gdd_fast.models.files.load import as_generator
from gdd_fast.models.precond import EDMPrecond

# Percent of all parameters, by network and level, as measured on the published code.
PUBLISHED = {
    "cifar10-uncond": (0.0, 84.40, 86.50, 90.46),
    "cifar10-cond": (0.0, 84.40, 86.50, 90.46),
    "ffhq-afhqv2": (0.0, 83.84, 85.72, 89.70),
    "imagenet": (0.0, 78.77, 86.96, 90.17),
}
WORDS = ((), ("conv", "proj"), ("conv", "proj", "qkv"), ("conv", "proj", "qkv", "skip"))


def frozen_by_name(name: str, level: int) -> bool:
    """The published rule. It goes by names where the library goes by what a layer is."""
    return any(w in name for w in ("block", "up", "down", "in")) and any(w in name for w in WORDS[level])


def network(name: str) -> EDMPrecond:
    resolution, config = FULL[name] if name in FULL else (SIZE, SMALL[name])
    with torch.device("meta"):
        return EDMPrecond(resolution, 3, **config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_fractions(name: str) -> None:
    net = network(name)
    reports = [freeze(net, level) for level in range(4)]
    assert tuple(round(100 * report.frozen / report.total, 2) for report in reports) == PUBLISHED[name]


@pytest.mark.parametrize("name", [*FULL, *SMALL])
@pytest.mark.parametrize("level", range(4))
def test_equals_the_published_rule_by_name(name: str, level: int) -> None:
    net = network(name)
    report = freeze(net, level)
    frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in net.named_parameters() if frozen_by_name(n, level)}
    assert report.frozen == sum(p.numel() for p in net.parameters() if not p.requires_grad)
    assert report.total == sum(p.numel() for p in net.parameters())


def test_levels_are_set_not_added() -> None:
    net = network("ncsnpp")
    freeze(net, 3)
    assert freeze(net, 1) == freeze(network("ncsnpp"), 1)
    freeze(net, 0)
    assert all(p.requires_grad for p in net.parameters())


def test_gradients_reach_exactly_what_is_trained() -> None:
    net = fill(as_generator(fill(EDMPrecond(SIZE, 3, **SMALL["adm_cond"]))))
    freeze(net, 1)
    call = inputs(SMALL["adm_cond"]) | {"augment_labels": None}
    net(**call).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == frozen_by_name(name, 1), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


def test_the_report_prints_as_a_table() -> None:
    report = freeze(network("cifar10-uncond"), 1)
    lines = str(report).splitlines()
    assert lines[0].split() == ["layers", "parameters", "frozen", "%"]
    rows = {line.split()[0]: line.split()[-3:] for line in lines[1:]}
    assert rows["all"] == [f"{report.total:,}", f"{report.frozen:,}", "84.40"]
    assert rows["conv0"][2] == "100.00" and rows["qkv"][1:] == ["0", "0.00"]
    assert sum(kind.total for kind in report.kinds) == report.total


@pytest.mark.parametrize("level", [-1, 4, "1", None])
def test_levels_that_do_not_exist(level: object) -> None:
    with pytest.raises(ConfigError, match="freeze level must be 0 to 3"):
        freeze(network("ncsnpp"), level)


def test_a_network_without_blocks() -> None:
    with pytest.raises(ConfigError, match="Linear has no U-Net blocks"):
        freeze(nn.Linear(2, 2), 1)
