"""The engine's operators a forward: at most a quarter of EDM's own, on a GPU and on a CPU."""

import pytest

from benchmarks.dispatched import EDM, of_engine
from gdd_fast.backend import has_extension


@pytest.mark.parametrize("name", EDM)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_at_most_a_quarter(name: str, device: str) -> None:
    if device == "cpu" and not has_extension():
        pytest.skip("without the extension, a CPU runs the definitions")
    count = of_engine(name, device)
    assert 4 * count.total <= EDM[name][0], count.operators
    assert not any("cat" in operator for operator in count.operators), "a concatenation was built"
