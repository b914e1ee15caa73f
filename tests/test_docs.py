"""The documentation builds without a warning: every link leads somewhere, every name in the API pages exists."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_site_builds(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    front = (site / "index.html").read_text()
    assert 'src="images/cifar16.png"' in front and 'href="accelerate/"' in front, "the README is the first page"
    api = (site / "api" / "sampling" / "index.html").read_text()
    assert "Standard normal" in api or "latents" in api, "docstrings are on the API pages"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if page not in navigation]


def test_where_things_happen_is_where_they_happen():
    section = (ROOT / "docs" / "design.md").read_text().partition("## Where things happen")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for what, files, names in rows:
        trees = [ast.parse((ROOT / file).read_text()) for file in re.findall("`(.+?)`", files)]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in nodes:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        assert set(re.findall("`(.+?)`", names)) <= defined, what


@pytest.mark.parametrize("page", ["docs/reliability.md", "docs/accelerate.md", "SECURITY.md", "CONTRIBUTING.md"])
def test_the_tests_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text()
    assert not [path for path in re.findall(r"tests/[\w/]+\.py", text) if not (ROOT / path).is_file()]
    for path, words in re.findall(r"`pytest[^`]*?(tests/[\w/]+\.py) -k (\w+)`", text):
        assert words in (ROOT / path).read_text(), path


def test_each_promise_names_its_tests():
    promises = (ROOT / "docs" / "reliability.md").read_text().partition("| --- | --- |\n")[2].partition("\n\n")[0]
    assert promises.count("\n") > 15 and all("`tests/" in line for line in promises.splitlines())
