"""A page of a small conditional network, as visitors get it but for its runtime, which lies beside it."""

import shutil
import sys
from pathlib import Path

import pytest
from edm_reference import SIZE, SMALL, fill

from gdd_fast.models.precond import GDDPrecond
from gdd_fast.webpage.static_site import ONNXRUNTIME_WEB

RUNTIME = Path(sys.prefix) / f"onnxruntime-web-{ONNXRUNTIME_WEB}.tgz"
"""Where `make test` puts the npm package."""


@pytest.fixture(scope="session")
def net():
    return fill(GDDPrecond(SIZE, 3, **SMALL["ncsnpp_cond"])).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def site(net, tmp_path_factory):
    """(folder, how far its file is from the network)."""
    pytest.importorskip("onnxscript", reason="pip install gdd_fast[export]")
    pytest.importorskip("onnxruntime", reason="pip install gdd_fast[export]")
    from gdd_fast.webpage.static_site import Page, write_site

    folder = tmp_path_factory.mktemp("pages") / "page"
    runtime = RUNTIME if RUNTIME.is_file() else None
    names = tuple(f"kind {i}" for i in range(10))
    page = Page(title="A <small> network", class_names=names, grid=3, runtime=runtime)
    yield folder, write_site(net, folder, page, images=17)
    shutil.rmtree(folder)
