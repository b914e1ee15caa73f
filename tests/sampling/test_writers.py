"""What lands on disk: names, pixels, labels, and nothing half written."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from gdd_fast.data.dataset import open_dataset
from gdd_fast.errors import ConfigError
from gdd_fast.sampling.grid import save_grid, save_panel
from gdd_fast.sampling.resume import reserve

SEEDS = [0, 7, 1234, 56789]


def random_images(channels: int = 3, n: int = len(SEEDS), size: int = 8) -> torch.Tensor:
    shape = (n, size, size, channels)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def write(path, images, classes=None, **options):
    with reserve(path) as output, output.writer(SEEDS, {}, **options) as writer:
        for i in range(0, len(images), 3):
            writer.put(SEEDS[i : i + 3], images[i : i + 3], None if classes is None else classes[i : i + 3])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_zip_is_an_edm_data_set_named_by_seed(tmp_path, channels):
    images, classes = random_images(channels), torch.tensor([3, 0, 9, 3])
    write(tmp_path / "out.zip", images, classes)
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        names = ["000000/000000.png", "000000/000007.png", "001000/001234.png", "056000/056789.png"]
        assert archive.namelist() == [*names, "dataset.json"]
        assert json.loads(archive.read("dataset.json")) == {
            "labels": [[name, int(label)] for name, label in zip(names, classes, strict=True)]
        }
    dataset = open_dataset(tmp_path / "out.zip", use_labels=True)
    for i in range(len(SEEDS)):
        assert np.array_equal(dataset.image(i), images[i].permute(2, 0, 1))
        assert dataset.label(i) == classes[i]


def test_a_zip_without_labels_has_no_label_file(tmp_path):
    write(tmp_path / "out.zip", random_images())
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert "dataset.json" not in archive.namelist()


def test_the_same_images_make_the_same_bytes_on_any_number_of_threads(tmp_path):
    for name, workers in (("a.zip", 1), ("b.zip", 5)):
        write(tmp_path / name, random_images(), torch.arange(4), workers=workers)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


@pytest.mark.parametrize(("subdirs", "name"), [(False, "001234.png"), (True, "001000/001234.png")])
def test_a_folder(tmp_path, subdirs, name):
    images = random_images()
    write(tmp_path / "out", images, torch.arange(4), subdirs=subdirs)
    assert np.array_equal(Image.open(tmp_path / "out" / name), images[2])
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == len(SEEDS) + 1, "the images, dataset.json and nothing temporary"
    assert open_dataset(tmp_path / "out", use_labels=True).label_dim == 4


def test_an_npz_has_the_arrays_that_adms_evaluation_reads(tmp_path):
    images = random_images()
    write(tmp_path / "out.npz", images, torch.tensor([3, 0, 9, 3]))
    with np.load(tmp_path / "out.npz") as file:
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], images)
        assert file["arr_1"].tolist() == [3, 0, 9, 3]
    write(tmp_path / "unlabelled.npz", images)
    with np.load(tmp_path / "unlabelled.npz") as file:
        assert file.files == ["arr_0"]


def test_a_failure_of_the_encoder_reaches_the_caller(tmp_path, monkeypatch):
    def fail(image):
        raise OSError("disk full")

    monkeypatch.setattr("gdd_fast.sampling.writers.encode_png", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "out.zip", random_images())
    assert [path.name for path in tmp_path.iterdir()] == [".out.zip.part"]


def test_paths_that_cannot_be_written_are_refused_first(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.png").touch()
    (tmp_path / "file").touch()
    (tmp_path / "folder.zip").mkdir()
    for name in ("full", "file", "folder.zip", "images.png", "images.tar"):
        with pytest.raises(ConfigError, match="--out"), reserve(tmp_path / name):
            pass


@pytest.mark.parametrize("images", [torch.zeros(4, 8, 8, 3), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)])
def test_images_of_another_form_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match="uint8"):
        write(tmp_path / "out.zip", images)


def test_a_grid_shows_every_image_in_reading_order(tmp_path):
    images = random_images(n=5)
    save_grid(images, tmp_path / "grid.png", cols=3, zoom=2, padding=1)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 * 17 + 1, 3 * 17 + 1, 3)
    for i in range(5):
        top, left = 1 + i // 3 * 17, 1 + i % 3 * 17
        assert np.array_equal(sheet[top : top + 16 : 2, left : left + 16 : 2], images[i])
    assert (sheet[18:, 35:] == 255).all(), "an unfilled place stays white"


def test_a_grid_takes_every_form_of_image(tmp_path):
    nhwc = random_images(1)
    floats = (nhwc.permute(0, 3, 1, 2).double() - 128) / 127.5
    for i, images in enumerate((nhwc, nhwc.permute(0, 3, 1, 2), floats, floats.requires_grad_())):
        save_grid(images, tmp_path / f"{i}.png")
    sheets = [(tmp_path / f"{i}.png").read_bytes() for i in range(4)]
    assert sheets.count(sheets[0]) == 4
    assert Image.open(tmp_path / "0.png").size == (2 * 66 + 2, 2 * 66 + 2), "small images are brought to 64 pixels"


@pytest.mark.parametrize("images", [torch.zeros(0, 3, 8, 8), torch.zeros(3, 8, 8), torch.zeros(2, 5, 8, 8)])
def test_a_grid_of_something_else(tmp_path, images):
    with pytest.raises(ValueError, match=r"image|channels"):
        save_grid(images, tmp_path / "grid.png")


def test_a_panel_holds_its_rows_below_their_titles(tmp_path):
    dark, light = torch.full((4, 1, 8, 8), -1.0), torch.full((4, 1, 8, 8), 0.5)
    save_panel([("a very long title that is wider than its images", dark), ("b", light)], tmp_path / "panel.png")
    panel = np.asarray(Image.open(tmp_path / "panel.png")).astype(int)
    rows = [row for row in range(len(panel)) if (panel[row] == 0).all(-1).sum() >= 4 * 64]
    assert len(rows) == 64, "four black images of 64 pixels, side by side"
    grey = [row for row in range(len(panel)) if (panel[row] == 191).all(-1).sum() >= 4 * 64]
    assert len(grey) == 64
    assert min(grey) > max(rows)
    title = panel[: min(rows)].min(axis=(0, 2))
    assert title.min() < 128, "the title is there"
    assert title[-5:].min() == 255, "and not cut off"


def test_a_panel_compares_like_with_like(tmp_path):
    with pytest.raises(ValueError, match="differ"):
        save_panel([("a", torch.zeros(4, 3, 8, 8)), ("b", torch.zeros(2, 3, 8, 8))], tmp_path / "panel.png")
    with pytest.raises(ValueError, match="at least one"):
        save_panel([], tmp_path / "panel.png")
