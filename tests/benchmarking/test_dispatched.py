"""The engine's operators per forward: at most a quarter of EDM's own and a third of diffusers', on a GPU and a CPU."""

import pytest

from benchmarks.counts.dispatched import DIFFUSERS, EDM, of_engine, of_plain
from gdd_fast.backend import has_extension


@pytest.mark.parametrize("name", EDM)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_at_most_a_quarter(name: str, device: str) -> None:
    if device == "cpu" and not has_extension():
        pytest.skip("without the extension, a CPU runs the definitions")
    count = of_engine(name, device)
    assert 4 * count.total <= EDM[name][0], count.operators
    assert not any("cat" in operator for operator in count.operators), "a concatenation was built"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_at_most_a_third_of_diffusers_own(device: str) -> None:
    """The architecture of google/ddpm-cifar10-32, narrower."""
    pytest.importorskip("vision_libraries", reason="diffusers imports torchvision", exc_type=ImportError)
    pytest.importorskip("diffusers")
    if device == "cpu" and not has_extension():
        pytest.skip("without the extension, a CPU runs the definitions")
    stock, folded = of_plain(DIFFUSERS), of_engine(DIFFUSERS, device)
    assert stock.total > 600, "diffusers' forward is counted whole"
    assert 3 * folded.total <= stock.total, folded.operators
