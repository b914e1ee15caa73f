"""The exported ONNX file and the web page around it, in onnxruntime and in a real browser."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_reference import SIZE, SMALL, fill

from gdd_fast.engine.one_step import OneStepGenerator
from gdd_fast.errors import ConfigError
from gdd_fast.models.precond import GDDPrecond
from gdd_fast.webpage import static_site
from gdd_fast.webpage.static_site import CDN, ONNXRUNTIME_WEB, RUNTIME_FILES, Page, check_site, write_site

HARNESS = Path(__file__).with_name("harness.html")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RUNTIME = Path(sys.prefix) / f"onnxruntime-web-{ONNXRUNTIME_WEB}.tgz"
"""Where `make test` puts the npm package."""


@pytest.fixture(scope="module")
def net() -> GDDPrecond:
    return fill(GDDPrecond(SIZE, 3, **SMALL["ncsnpp_cond"])).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def site(net, tmp_path_factory):
    """(folder, how far its file is from the network): as visitors get it, but for the runtime, which lies beside it."""
    pytest.importorskip("onnxscript", reason="pip install gdd_fast[export]")
    pytest.importorskip("onnxruntime", reason="pip install gdd_fast[export]")
    folder = tmp_path_factory.mktemp("pages") / "page"
    runtime = RUNTIME if RUNTIME.is_file() else None
    names = tuple(f"kind {i}" for i in range(10))
    page = Page(title="A <small> network", class_names=names, grid=3, runtime=runtime)
    yield folder, write_site(net, folder, page, images=17)
    shutil.rmtree(folder)


def test_file_is_the_network_in_standard_operators(site):
    import onnx

    folder, difference = site
    assert difference.images == 17 and difference.worst < 1e-4
    model = onnx.load(folder / "generator.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    assert [opset.domain for opset in model.opset_import] == [""]
    shapes = {
        value.name: [axis.dim_value or axis.dim_param for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert [shapes[name][1:] for name in ("latents", "classes", "images")] == [[3, 16, 16], [], [3, 16, 16]]
    assert all(isinstance(shape[0], str) for shape in shapes.values())  # any number of images


def test_a_page_is_there_whole_or_not_at_all(site, net, tmp_path, monkeypatch):
    """Half of one would be taken for a folder of somebody else's by the same command."""

    def stopped(source, destination):
        assert Path(destination).parent.joinpath("generator.onnx").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(static_site.shutil, "copyfile", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_site(net, tmp_path / "page", Page(), images=1)
    assert not list(tmp_path.iterdir())


def test_file_runs_without_gdd_fast(site, net, tmp_path):
    folder, _ = site
    generator = OneStepGenerator.from_network(net, device="cpu")
    latents, classes = generator.draw(5, seeds=range(5))
    np.savez(tmp_path / "in.npz", latents=latents.numpy(), classes=classes.numpy())
    code = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "numpy.save('out.npy', session.run(['images'], dict(numpy.load('in.npz')))[0])\n"
        "assert not {'torch', 'gdd_fast'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, str(folder / "generator.onnx")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(
        torch.from_numpy(np.load(tmp_path / "out.npy")), generator.run(latents, classes), rtol=0, atol=1e-4
    )


class Handler(http.server.SimpleHTTPRequestHandler):
    """The page, the harness beside it, and what the harness reports."""

    extensions_map = {  # noqa: RUF012 (the base class's)
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/harness.html":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(HARNESS.read_bytes())

    def do_POST(self) -> None:
        self.server.report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.reported.set()


def browse(folder: Path, profile: Path) -> tuple[dict, list[str]]:
    """What the harness saw of the page in a browser, and what stands in the browser's console."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    server.reported = threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += [f"--user-data-dir={profile}", "--enable-logging=stderr"]
    log = profile.with_suffix(".log")
    try:
        with log.open("w") as stderr:
            address = f"http://127.0.0.1:{server.server_port}/harness.html"
            browser = subprocess.Popen([CHROMIUM, *options, address], stdout=subprocess.DEVNULL, stderr=stderr)
            try:
                answered = server.reported.wait(120)
            finally:
                browser.terminate()
                browser.wait(30)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    text = log.read_text()
    assert answered, f"the page did not answer\n{text[-2000:]}"
    return server.report, [line for line in text.splitlines() if "CONSOLE" in line]


def pixels(entry: dict, channels: int = 3) -> torch.Tensor:
    size = entry["size"]
    return torch.tensor(entry["data"]).reshape(size, size, 4)[:, :, :channels]


def worst(entries: list[dict], expected: torch.Tensor) -> int:
    return int((torch.stack([pixels(entry) for entry in entries]) - expected.int()).abs().max())


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: install it to test the web page")
@pytest.mark.skipif(not RUNTIME.is_file(), reason=f"{RUNTIME.name} is not here: `make test` gets it with npm")
def test_page_in_a_browser_makes_the_images_that_python_makes(site, net, tmp_path):
    shown, console = browse(site[0], tmp_path / "profile")
    assert "error" not in shown, shown["error"]
    assert not console

    generator = OneStepGenerator.from_network(net, device="cpu")
    latents, classes = generator.draw(3, seeds=range(3))
    assert [entry["name"] for entry in shown["grid"]] == [f"{i} · kind {c}" for i, c in enumerate(classes.tolist())]
    assert worst(shown["grid"], generator(3, seeds=range(3))) <= 2
    assert worst(shown["ofClass"], generator(3, labels=3, seeds=range(3))) <= 2
    last = generator(1, seeds=[2**32 - 1], labels=3)
    assert [entry["seed"] for entry in shown["last"]] == [2**32 - 1] and worst(shown["last"], last) <= 2

    # along the great circle from seed 2 to seed 1, where the class is still that of seed 2
    a, b, t = latents[2].double(), latents[1].double(), 0.3
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    z = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    to_bytes = lambda x: (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert worst([shown["walk"]], to_bytes(generator.run(z.float()[None], classes[2:3]))) <= 2
    assert worst([shown["end"]], generator(1, seeds=[2])) <= 2
    assert shown["walk"] != shown["end"]

    # numbers that are no multiple of 16, and what is drawn after them
    random = torch.Generator().manual_seed(5)
    expected = [*torch.randn(75, generator=random).tolist(), int(torch.randint(1000, (), generator=random))]
    np.testing.assert_allclose(shown["noise"], expected, atol=1e-5)
    assert float(shown["speed"]) > 0


def test_page_describes_its_network(site):
    folder, _ = site
    model = json.loads((folder / "model.json").read_text())
    assert model["title"] == "A <small> network" and model["classes"] == 10
    assert model["bytes"] == (folder / "generator.onnx").stat().st_size
    for device, files in RUNTIME_FILES.items():
        for kind, name in files.items():
            expected = f"runtime/{name}" if RUNTIME.is_file() else f"{CDN}/{name}"
            assert model["runtime"][device][kind] == expected
            assert (folder / "runtime" / name).is_file() == RUNTIME.is_file()


def test_what_cannot_be_a_page_is_refused_before_anything_is_written(net, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        check_site(tmp_path / "other", Page())
    for page, reason in (
        (Page(grid=0), "1 to 400"),
        (Page(class_names=("one", "two")), "needs 10 names, not 2"),
        (Page(runtime=tmp_path / "none.tgz"), "npm pack"),
        (Page(runtime=tmp_path / "other"), "has no ort"),
        (Page(runtime=tmp_path / "other" / "thesis.txt"), "not an npm package"),
    ):
        with pytest.raises(ConfigError, match=reason):
            write_site(net, tmp_path / "page", page)
    assert not (tmp_path / "page").exists()
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
