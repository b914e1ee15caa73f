"""`python -m gdd_fast.prepare`: every source, every transform, and what it refuses; and the writer below it."""

import gzip
import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from cifar_archive import whole_archive
from PIL import Image

from gdd_fast.data import demo_dataset, open_dataset, write_edm_zip
from gdd_fast.data.demo import demo_path
from gdd_fast.data.idx import read_idx
from gdd_fast.errors import DataError
from gdd_fast.prepare import main


def noise(count=6, size=32, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), np.uint8)


def prepare(source, dest, *options):
    main(["--source", str(source), "--dest", str(dest), *options])


def fails(capsys, source, dest, *options):
    """The one line on stderr of a run that must fail with status 2, leaving nothing behind."""
    before = sorted(dest.parent.iterdir())
    with pytest.raises(SystemExit) as exit_:
        prepare(source, dest, *options)
    assert exit_.value.code == 2 and sorted(dest.parent.iterdir()) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def image_folder(folder, images, modes=None):
    for index, pixels in enumerate(images):
        path = folder / ["cat", "dog"][index % 2] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        image.convert(modes[index] if modes else "RGB").save(path)
    return folder


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def everything(path, **options):
    dataset = open_dataset(path, **options)
    return np.concatenate(list(dataset.chunks())), dataset.labels


# Sources.


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("suffix", [".zip", ".npz"])
def test_the_cifar_archive(tmp_path, capsys, split, suffix):
    source, batches = whole_archive(tmp_path / "cifar-10-python.tar.gz")
    dest = tmp_path / f"cifar10{suffix}"
    prepare(source, dest, "--split", split)
    images, labels = everything(dest, use_labels=True)
    names = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    np.testing.assert_array_equal(images.reshape(-1, 3072), np.concatenate([batches[name][0] for name in names]))
    assert labels.tolist() == [label for name in names for label in batches[name][1]]
    assert f"{len(images)} images 32x32, RGB" in capsys.readouterr().out


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("labels", ["folders", "auto", "none"])
def test_image_folders_and_zips(tmp_path, capsys, zipped, labels):
    source = image_folder(tmp_path / "pets", noise())
    if zipped:
        source = tmp_path / "pets.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for file in (tmp_path / "pets").rglob("*.png"):
                archive.write(file, file.relative_to(tmp_path / "pets"))
    prepare(source, tmp_path / "out.zip", "--labels", labels)
    images, classes = everything(tmp_path / "out.zip", use_labels=labels == "folders")
    np.testing.assert_array_equal(images, noise()[[0, 2, 4, 1, 3, 5]])
    assert classes is None or classes.tolist() == [0, 0, 0, 1, 1, 1]
    assert ("2 classes" if labels == "folders" else "no labels") in capsys.readouterr().out


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files(tmp_path, compressed):
    images, labels = noise(5, 28, 1)[:, 0], np.array([3, 1, 4, 1, 5], np.uint8)
    pack, suffix = (gzip.compress, ".gz") if compressed else (bytes, "")
    (tmp_path / f"t10k-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
    (tmp_path / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
    prepare(tmp_path, tmp_path / "mnist.zip", "--split", "test", "--pad-to", "32")
    got, classes = everything(tmp_path / "mnist.zip", use_labels=True)
    np.testing.assert_array_equal(got[:, 0], np.pad(images, [(0, 0), (2, 2), (2, 2)]))
    assert classes.tolist() == [3, 1, 4, 1, 5]


def test_the_bundled_test_set_is_what_its_readme_says_of_its_source(tmp_path):
    """The same options on 28x28 images give the rounded mean of 2x2 blocks, zero-padded; the asset was made so."""
    images = noise(4, 28, 1)
    np.savez(tmp_path / "raw.npz", images=images[:, 0])
    prepare(tmp_path / "raw.npz", tmp_path / "out.npz", "--pad-to", "32", "--resolution", "16", "--filter", "box")
    padded = np.pad(images.astype(int), [(0, 0), (0, 0), (2, 2), (2, 2)])
    blocks = padded.reshape(4, 1, 16, 2, 16, 2).sum((3, 5))
    np.testing.assert_array_equal(everything(tmp_path / "out.npz")[0], (blocks + 2) // 4)


def test_converting_a_set_to_itself_changes_nothing(tmp_path):
    prepare(demo_path("test"), tmp_path / "demo.zip", "--max-images", "500")
    images, labels = everything(tmp_path / "demo.zip", use_labels=True)
    demo = demo_dataset("test", use_labels=True)
    np.testing.assert_array_equal(images, demo.images(range(500)))
    np.testing.assert_array_equal(labels, demo.labels[:500])
    prepare(tmp_path / "demo.zip", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "demo.zip").read_bytes()


# Transforms.


def test_center_crop_and_resize(tmp_path):
    (tmp_path / "in").mkdir()
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8))
    wide.save(tmp_path / "in/a.png")
    prepare(tmp_path / "in", tmp_path / "out.zip", "--crop", "center", "--resolution", "16")
    expected = wide.crop((10, 0, 50, 40)).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(everything(tmp_path / "out.zip")[0][0].transpose(1, 2, 0), np.asarray(expected))


def test_photographs_are_turned_upright(tmp_path):
    (tmp_path / "in").mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the stored picture
    image.save(tmp_path / "in/a.png", exif=exif)
    prepare(tmp_path / "in", tmp_path / "out.zip")
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(everything(tmp_path / "out.zip")[0][0].transpose(1, 2, 0), upright)


@pytest.mark.parametrize(("color", "channels"), [("gray", 1), ("rgb", 3)])
def test_every_kind_of_image_becomes_the_colour_asked_for(tmp_path, color, channels):
    modes = ["L", "RGB", "RGBA", "P", "LA", "1"]
    source = image_folder(tmp_path / "in", noise(), modes)
    prepare(source, tmp_path / "out.zip", "--color", color)
    images, _ = everything(tmp_path / "out.zip")
    assert images.shape == (6, channels, 32, 32)


def test_transparent_pixels_become_white_whatever_colour_lies_below(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "in/a.png")
    prepare(tmp_path / "in", tmp_path / "out.zip")
    assert (everything(tmp_path / "out.zip")[0] == 255).all()


# Refusals: one line, status 2, nothing written.


def test_mixed_sizes_and_colours_name_the_file(tmp_path, capsys):
    source = image_folder(tmp_path / "in", noise(), ["RGB"] * 5 + ["L"])
    message = fails(capsys, source, tmp_path / "out.zip")
    assert "dog/005.png" in message and "--color" in message
    Image.new("RGB", (9, 9)).save(source / "dog/003.png")
    message = fails(capsys, source, tmp_path / "out.zip")
    assert "dog/003.png" in message and "(3, 9, 9)" in message and "--resolution" in message


def test_a_corrupt_image_is_named_and_an_existing_set_survives(tmp_path, capsys):
    source = image_folder(tmp_path / "in", noise())
    prepare(source, tmp_path / "out.zip")
    before = (tmp_path / "out.zip").read_bytes()
    (source / "dog/003.png").write_bytes((source / "dog/003.png").read_bytes()[:100])
    assert "dog/003.png is not a readable image" in fails(capsys, source, tmp_path / "out.zip", "--overwrite")
    assert (tmp_path / "out.zip").read_bytes() == before


def test_an_existing_set_is_replaced_only_when_asked(tmp_path, capsys):
    source = image_folder(tmp_path / "in", noise())
    prepare(source, tmp_path / "out.zip", "--max-images", "2")
    assert "--overwrite replaces it" in fails(capsys, source, tmp_path / "out.zip")
    prepare(source, tmp_path / "out.zip", "--overwrite")
    assert len(open_dataset(tmp_path / "out.zip")) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolution", "0"], "--resolution must be from 1 to 16384"),
        (["--resolution", "100000000"], "--resolution must be from 1 to 16384"),
        (["--max-images", "0"], "--max-images must be at least 1"),
        (["--pad-to", "16"], "larger than --pad-to 16"),
        (["--resolution", "20", "--filter", "box"], "not a whole factor"),
    ],
)
def test_options_that_cannot_work(tmp_path, capsys, options, message):
    source = image_folder(tmp_path / "in", noise())
    assert message in fails(capsys, source, tmp_path / "out.zip", *options)


def test_sources_that_cannot_be_used(tmp_path, capsys):
    dest = tmp_path / "out.zip"
    assert "no such file" in fails(capsys, tmp_path / "nowhere", dest)
    (tmp_path / "notes.txt").write_text("hello")
    assert "neither a folder nor a zip" in fails(capsys, tmp_path / "notes.txt", dest)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/a.png")
    assert "a.png is not in a folder" in fails(capsys, tmp_path / "flat", dest, "--labels", "folders")
    assert "all images are in flat" in fails(capsys, tmp_path, dest, "--labels", "folders")
    np.savez(tmp_path / "set.npz", images=noise()[:, 0])
    assert "is for image files" in fails(capsys, tmp_path / "set.npz", dest, "--labels", "folders")
    assert "must end in .zip or .npz" in fails(capsys, tmp_path / "flat", tmp_path / "out.tar")
    Image.new("RGB", (8, 6)).save(tmp_path / "flat/a.png")
    assert "8x6, not square: --crop center" in fails(capsys, tmp_path / "flat", dest)
    Image.new("F", (8, 8)).save(tmp_path / "flat/a.tif")
    (tmp_path / "flat/a.png").unlink()
    assert "Pillow mode F, which has no plain conversion" in fails(capsys, tmp_path / "flat", dest)


def sixteen_bits(channels):
    """A PNG of one gray or RGB pixel row with 16 bits per channel, which Pillow cannot write in colour."""
    rows = b"".join(b"\0" + bytes(range(4 * 2 * channels)) for _ in range(4))

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 4, 4, 16, 0 if channels == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_the_upper_eight_and_only_here(tmp_path, channels):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(sixteen_bits(channels))
    with pytest.raises(DataError, match=r"16 bits per channel.*gdd_fast\.prepare"):
        open_dataset(tmp_path / "in")
    main(["--source", str(tmp_path / "in"), "--dest", str(tmp_path / "out.zip")])
    expected = np.arange(0, 8 * channels, 2, np.uint8).reshape(4, channels)
    np.testing.assert_array_equal(open_dataset(tmp_path / "out.zip").image(0), np.stack([expected.T] * 4, 1))


def test_a_zip_of_one_folder_has_the_classes_below_it(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "in/photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in/photos" / name / "a.png")
    main(["--source", str(tmp_path / "in"), "--dest", str(tmp_path / "out.ZIP"), "--labels", "folders"])
    assert open_dataset(tmp_path / "out.ZIP", use_labels=True).labels.tolist() == [0, 1]


def test_what_is_left_out_and_which_classes_there_are_is_said(tmp_path, capsys):
    image_folder(tmp_path / "in", noise(count=2))
    names = sorted(path.relative_to(tmp_path / "in").as_posix() for path in (tmp_path / "in").rglob("*.png"))
    (tmp_path / "in/dataset.json").write_text(json.dumps({"labels": [[name, 7 * k] for k, name in enumerate(names)]}))
    (tmp_path / "in/more.heic").write_bytes(b"?")
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / "photo.jpg")
    (tmp_path / "in" / "photo.jpg").rename(tmp_path / "in" / "photo.JFIF")
    pairs = [*([name, 7 * k] for k, name in enumerate(names)), ["photo.JFIF", 0]]
    (tmp_path / "in/dataset.json").write_text(json.dumps({"labels": pairs}))
    main(["--source", str(tmp_path / "in"), "--dest", str(tmp_path / "out.zip")])
    said = capsys.readouterr().out
    assert "3 images" in said and "8 classes (2 of them with images)" in said
    assert "left out, not recognised as images: 1 .heic" in said


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\1abcd", b"\0\0\x08\x01\0\0\0\5abcd", b"hello"]
)
def test_damaged_idx_files(tmp_path, content):
    path = tmp_path / "t10k-labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte: "):
        read_idx(path)
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.gz: "):
        read_idx(tmp_path / "x.gz")


def test_it_runs_as_a_module(tmp_path):
    image_folder(tmp_path / "in", noise())
    command = [sys.executable, "-m", "gdd_fast.prepare", "--source", tmp_path / "in", "--dest", tmp_path / "out.zip"]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout.startswith("6 images 32x32, RGB")


# The writer.


def test_the_zip_is_in_edms_format(tmp_path):
    images, labels = noise(1002, 4), np.arange(1002) % 3
    write_edm_zip(tmp_path / "set.zip", images, labels)
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        names = archive.namelist()
        assert names[0] == "00000/img00000000.png" and names[1001] == "00001/img00001001.png"
        assert names[1002:] == ["dataset.json"]
        assert json.loads(archive.read("dataset.json"))["labels"][5] == ["00000/img00000005.png", 2]
        png = Image.open(io.BytesIO(archive.read("00001/img00001001.png")))
        assert png.format == "PNG" and png.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(png).transpose(2, 0, 1), images[1001])
    write_edm_zip(tmp_path / "plain.zip", iter(images[:3]))
    with zipfile.ZipFile(tmp_path / "plain.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (noise(3), [1, 2], "3 images and 2 labels"),
        (noise(0), None, "no image to write"),
        (noise(2).astype(np.float32), None, "must be uint8"),
        (noise(2, channels=4), None, "must be uint8"),
        ([noise(1)[0], noise(1, 16)[0]], None, "image 1 has shape"),
        (noise(2), [1, None], "image 1 has no label"),
        (noise(2), [1, 10**30], "image 1 has label 10{30}"),
        (noise(2), [1, -1], "image 1 has label -1"),
    ],
)
def test_what_the_writer_refuses_leaves_no_file(tmp_path, images, labels, message):
    with pytest.raises(DataError, match=message):
        write_edm_zip(tmp_path / "set.zip", images, labels)
    assert list(tmp_path.iterdir()) == []
