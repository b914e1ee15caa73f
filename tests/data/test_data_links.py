"""What lies in a folder of images beside images: links, pipes, folders that may not be read."""

import os

import numpy as np
import pytest
from PIL import Image

from gdd_fast.data import open_dataset
from gdd_fast.errors import DataError


def make_folder(folder, count=2):
    """Images 0.png, 1.png, ..."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (count, 8, 8), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")


@pytest.mark.parametrize("links", [["inside"], ["a", "b"]])
def test_a_link_to_a_folder_that_was_read_is_refused(tmp_path, links):
    """One link back duplicates every image up to the system's limit of links; with two the walk has no end."""
    make_folder(tmp_path / "set")
    for name in links:
        (tmp_path / "set" / name).symlink_to(tmp_path / "set")
    with pytest.raises(DataError, match=r"is a link to .*/set, whose images would count twice: remove the link"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize(("link", "target"), [("again", "class"), ("a.png", "class/0.png"), ("z.png", "class/0.png")])
def test_a_link_to_what_is_there_is_named_and_not_what_it_leads_to(tmp_path, link, target):
    folder = tmp_path / "set"
    make_folder(folder / "class")
    (folder / link).symlink_to(folder / target)
    with pytest.raises(DataError, match=f"{folder / link} is a link to {folder / target}, whose images"):
        open_dataset(folder)


def test_links_to_files_elsewhere_are_images_and_one_to_nothing_is_named(tmp_path):
    make_folder(tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    for path in (tmp_path / "elsewhere").rglob("*.png"):
        (tmp_path / "set" / path.name).symlink_to(path)
    assert len(open_dataset(tmp_path / "set")) == 2
    (tmp_path / "set" / "loop").symlink_to("loop")
    (tmp_path / "set" / "zz.png").symlink_to("nothing")
    with pytest.raises(DataError, match=r"zz\.png cannot be read"):
        open_dataset(tmp_path / "set").validate()


def test_a_pipe_is_not_waited_for(tmp_path):
    make_folder(tmp_path / "set")
    os.mkfifo(tmp_path / "set" / "zz.png")
    with pytest.raises(DataError, match=r"zz\.png is not a file"):
        open_dataset(tmp_path / "set").validate()
    with pytest.raises(DataError, match=r"zz\.png: neither a file nor a folder"):
        open_dataset(tmp_path / "set" / "zz.png")


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    """Its images would be left out, and nobody told."""
    make_folder(tmp_path / "set")
    (tmp_path / "set" / "secret").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="secret cannot be read: Permission denied"):
        open_dataset(tmp_path / "set")


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path):
    make_folder(tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    assert len(open_dataset(tmp_path / "set")) == 2
