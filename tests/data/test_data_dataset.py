"""Opening image sets: the three forms agree, and each thing that can be wrong with one is named."""

import io
import json
import multiprocessing
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from gdd_fast.data import demo_dataset, open_dataset, write_edm_zip
from gdd_fast.errors import DataError


def noise(count=7, channels=3, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, channels, size, size), np.uint8)


def encoded(pixels, form="PNG"):
    """One (C, H, W) image as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, form)
    return file.getvalue()


def make_folder(folder, images, labels="absent"):
    """Files 0/img3.png and so on, in two sub-folders, with dataset.json unless `labels` is "absent"."""
    names = [f"{index % 2}/img{index}.png" for index in range(len(images))]
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(image))
    if labels != "absent":
        pairs = None if labels is None else [[name, label] for name, label in zip(names, labels, strict=True)]
        (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return names


def zipped(folder, compression=zipfile.ZIP_STORED):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def everything(dataset):
    return np.concatenate(list(dataset.chunks()))


def test_a_zip_with_a_name_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for image in noise(2):
            archive.writestr("a.png", encoded(image))
    with pytest.raises(DataError, match=r"a\.png more than once"):
        open_dataset(tmp_path / "set.zip")


def test_images_are_turned_as_their_exif_data_says(tmp_path):
    """A folder of photographs is then the same set as what gdd_fast.prepare makes of it."""
    image = Image.new("L", (8, 8))
    image.paste(255, (0, 0, 4, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    (tmp_path / "set").mkdir()
    image.save(tmp_path / "set/a.jpg", exif=exif, quality=95)
    pixels = open_dataset(tmp_path / "set").image(0)[0]
    assert pixels[:4].mean() > 250 and pixels[4:].mean() < 5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("form", ["folder", "stored zip", "deflated zip", "npz"])
def test_every_form_gives_the_same_pixels_and_labels_in_order_of_names(tmp_path, form, channels):
    images, labels = noise(channels=channels), [3, 0, 1, 1, 2, 0, 3]
    names = make_folder(tmp_path / "set", images, labels)
    order = sorted(range(len(names)), key=names.__getitem__)
    path = tmp_path / "set"
    if form == "npz":
        path = tmp_path / "set.npz"
        shaped = images[:, 0] if channels == 1 else images.transpose(0, 2, 3, 1)
        np.savez(path, images=shaped[order], labels=np.array(labels)[order])
    elif form != "folder":
        path = zipped(path, zipfile.ZIP_STORED if form == "stored zip" else zipfile.ZIP_DEFLATED)

    dataset = open_dataset(path, use_labels=True)

    assert (len(dataset), dataset.resolution, dataset.channels, dataset.label_dim) == (7, 8, channels, 4)
    assert dataset.name == "set"
    assert [dataset.label(i) for i in range(7)] == [labels[i] for i in order]
    np.testing.assert_array_equal(np.stack([dataset.image(i) for i in range(7)]), images[order])
    np.testing.assert_array_equal(everything(dataset), images[order])
    assert dataset.image(0).dtype == np.uint8


def test_labels_are_ignored_unless_asked_for(tmp_path):
    write_edm_zip(tmp_path / "set.zip", noise(), [0, 1, 2, 3, 4, 5, 6])
    dataset = open_dataset(tmp_path / "set.zip")
    assert dataset.label_dim == 0 and dataset.labels is None
    with pytest.raises(DataError, match="without labels"):
        dataset.label(0)


def test_max_images_takes_a_spread_subset_and_keeps_the_number_of_classes(tmp_path):
    images, labels = noise(100, 1, 4), np.repeat(np.arange(10), 10)
    np.savez(tmp_path / "set.npz", images=images[:, 0], labels=labels)
    whole = open_dataset(tmp_path / "set.npz", use_labels=True)
    part = open_dataset(tmp_path / "set.npz", use_labels=True, max_images=20)
    again = open_dataset(tmp_path / "set.npz", use_labels=True, max_images=20)

    assert len(part) == 20 and part.label_dim == whole.label_dim == 10
    assert len(set(part.labels.tolist())) >= 5, "sorted by class, the first 20 would be of 2 classes"
    np.testing.assert_array_equal(everything(part), everything(again))
    # EDM's choice for `max_size=20`, by its formula: RandomState(0) shuffles the indices, the first 20 are sorted.
    indices = np.arange(100)
    np.random.RandomState(0).shuffle(indices)
    np.testing.assert_array_equal(everything(part), images[np.sort(indices[:20])])
    assert len(open_dataset(tmp_path / "set.npz", max_images=1000)) == 100
    with pytest.raises(DataError, match="at least 1"):
        open_dataset(tmp_path / "set.npz", max_images=0)


def test_a_set_of_samples_as_gdd_fast_sample_writes_it_opens(tmp_path):
    images = noise().transpose(0, 2, 3, 1)
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=np.arange(7))
    dataset = open_dataset(tmp_path / "samples.npz", use_labels=True)
    np.testing.assert_array_equal(dataset.image(2), images[2].transpose(2, 0, 1))
    assert dataset.label(2) == 2


def test_hidden_files_and_shadow_copies_are_no_images(tmp_path):
    make_folder(tmp_path / "set", noise(2))
    for junk in ("__MACOSX/0/._img0.png", "0/._img0.png", ".cache/x.png", "0/notes.txt"):
        (tmp_path / "set" / junk).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / junk).write_bytes(b"junk")
    for path in (tmp_path / "set", zipped(tmp_path / "set")):
        dataset = open_dataset(path)
        dataset.validate()
        assert len(dataset) == 2


def _images_in_child(dataset, indices, queue):
    queue.put([dataset.image(i).sum() for i in indices])


def test_one_open_zip_is_read_by_threads_and_forked_processes_at_once(tmp_path):
    images = noise(200)
    write_edm_zip(tmp_path / "set.zip", images)
    dataset = open_dataset(tmp_path / "set.zip")
    expected = images.sum((1, 2, 3)).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_images_in_child, args=(dataset, range(200), queue)) for _ in range(2)]
    for child in children:
        child.start()
    with ThreadPoolExecutor(4) as pool:
        for sums in pool.map(lambda _: [dataset.image(i).sum() for i in range(200)], range(4)):
            assert sums == expected
    for child in children:
        assert queue.get(timeout=60) == expected
        child.join()


def test_a_pickled_dataset_reads_the_same_as_spawned_processes_need(tmp_path):
    write_edm_zip(tmp_path / "set.zip", noise())
    dataset = open_dataset(tmp_path / "set.zip")
    np.testing.assert_array_equal(everything(pickle.loads(pickle.dumps(dataset))), everything(dataset))


def test_progress_counts_every_image_up_to_all(tmp_path):
    calls = []
    np.savez(tmp_path / "set.npz", images=noise(600, 1, 4)[:, 0])
    open_dataset(tmp_path / "set.npz").validate(progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (600, 600) and calls == sorted(calls) and len(calls) > 1


# What can be wrong. Each error names the set or the file, and says what is wrong with it.


def test_a_missing_path(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.zip: no such file"):
        open_dataset(tmp_path / "nowhere.zip")


def test_something_that_is_no_image_set(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt: neither a folder nor a zip"):
        open_dataset(tmp_path / "notes.txt")
    (tmp_path / "set.npz").write_text("hello")
    with pytest.raises(DataError, match=r"set\.npz is not a readable \.npz"):
        open_dataset(tmp_path / "set.npz")


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_an_empty_set(tmp_path, form):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(DataError, match="holds no image"):
        open_dataset(folder if form == "folder" else zipped(folder))


def test_an_empty_npz_and_one_with_other_arrays(tmp_path):
    np.savez(tmp_path / "empty.npz", images=np.zeros((0, 4, 4), np.uint8))
    with pytest.raises(DataError, match="holds no image"):
        open_dataset(tmp_path / "empty.npz")
    np.savez(tmp_path / "other.npz", train_x=noise(), train_y=np.arange(7))
    with pytest.raises(DataError, match=r"no array `images` \(it has: train_x, train_y\)"):
        open_dataset(tmp_path / "other.npz")


def test_an_npz_that_would_need_unpickling_is_refused(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"not a readable \.npz of plain arrays"):
        open_dataset(tmp_path / "set.npz")


@pytest.mark.parametrize(
    "images", [noise().astype(np.float32), noise()[0, 0], noise(), noise(channels=4).transpose(0, 2, 3, 1)]
)
def test_an_npz_of_the_wrong_type_or_shape(tmp_path, images):
    np.savez(tmp_path / "set.npz", images=images)  # the third is NCHW, which would be read as 8 channels
    with pytest.raises(DataError, match=r"images must be uint8 \(N, H, W\)"):
        open_dataset(tmp_path / "set.npz")


@pytest.mark.parametrize("labels", [np.arange(6), np.arange(7.0), np.eye(7, dtype=np.int64), np.arange(7) > 3])
def test_an_npz_with_unusable_labels(tmp_path, labels):
    np.savez(tmp_path / "set.npz", images=noise()[:, 0], labels=labels)
    with pytest.raises(DataError, match="labels must be 7 integers from 0"):
        open_dataset(tmp_path / "set.npz", use_labels=True)
    assert len(open_dataset(tmp_path / "set.npz")) == 7


@pytest.mark.parametrize("label", [-1, 100_000, 10**9, 2**62, 2**63 + 5])
def test_an_npz_with_labels_that_are_no_class_numbers(tmp_path, label):
    labels = np.zeros(7, np.uint64 if label > 2**63 else np.int64)
    labels[4] = label
    np.savez(tmp_path / "set.npz", images=noise()[:, 0], labels=labels)
    with pytest.raises(DataError, match=f"label of image 4 is {label}; labels must be integers from 0 to 99999"):
        open_dataset(tmp_path / "set.npz", use_labels=True)


def test_images_that_are_not_square(tmp_path):
    write_edm_zip(tmp_path / "set.zip", noise()[:, :, :5])
    with pytest.raises(DataError, match="8x5, not square"):
        open_dataset(tmp_path / "set.zip")


@pytest.mark.parametrize("other", [noise(1, 3, 9)[0], noise(1, 1, 8)[0], noise(1, 3, 9)[0, :, :8]])
@pytest.mark.parametrize("form", ["folder", "zip"])
def test_mixed_sizes_and_channels_name_the_first_offender_and_both_shapes(tmp_path, form, other):
    folder = tmp_path / "set"
    make_folder(folder, noise(600))
    for name in ("1/img301.png", "1/img599.png"):
        (folder / name).write_bytes(encoded(other))
    dataset = open_dataset(folder if form == "folder" else zipped(folder))
    with pytest.raises(DataError) as error:
        dataset.validate()
    assert all(part in str(error.value) for part in ("1/img301.png", str(other.shape), "(3, 8, 8)"))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not an image", "empty"])
def test_a_corrupt_image_is_named(tmp_path, damage):
    folder = tmp_path / "set"
    make_folder(folder, noise(20, size=32))
    content = (folder / "1/img7.png").read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    bad = {"truncated": content[: len(content) // 2], "flipped": bytes(flipped), "not an image": b"hello", "empty": b""}
    (folder / "1/img7.png").write_bytes(bad[damage])
    for path in (folder, zipped(folder)):
        with pytest.raises(DataError, match=r"1/img7\.png is not a readable image"):
            open_dataset(path).validate()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_names_the_entry(tmp_path, compression):
    make_folder(tmp_path / "set", noise(20, size=32))
    path = zipped(tmp_path / "set", compression)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("0/img4.png")
    content = bytearray(path.read_bytes())
    content[info.header_offset + 200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"0/img4\.png cannot be read"):
        open_dataset(path).validate()


def test_a_cut_off_archive(tmp_path):
    write_edm_zip(tmp_path / "set.zip", noise())
    content = (tmp_path / "set.zip").read_bytes()
    (tmp_path / "set.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"set\.zip"):
        open_dataset(tmp_path / "set.zip")


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "I;16", "CMYK", "1"])
def test_other_kinds_of_images_are_refused_with_the_way_out(tmp_path, mode):
    (tmp_path / "set").mkdir()
    Image.new(mode, (8, 8)).save(tmp_path / "set" / ("a.tif" if mode == "CMYK" else "a.png"))
    with pytest.raises(DataError, match=r"a\.(png|tif) .*gdd_fast\.prepare"):
        open_dataset(tmp_path / "set")


@pytest.mark.parametrize("labels", ["absent", None])
def test_labels_asked_for_but_not_there(tmp_path, labels):
    make_folder(tmp_path / "set", noise(), labels)
    for path in (tmp_path / "set", zipped(tmp_path / "set")):
        with pytest.raises(DataError, match=r"dataset\.json is missing or says null.*--labels folders"):
            open_dataset(path, use_labels=True)
    np.savez(tmp_path / "set.npz", images=noise()[:, 0])
    with pytest.raises(DataError, match="no array `labels`"):
        open_dataset(tmp_path / "set.npz", use_labels=True)


@pytest.mark.parametrize("label", [1.5, "cat", None, True, -1, [0, 1], 100_000, 10**9, 10**30])
def test_labels_that_are_not_classes_are_named(tmp_path, label):
    make_folder(tmp_path / "set", noise(4), [0, 1, label, 1])
    with pytest.raises(DataError, match=r"the label of 0/img2\.png is .*integers from 0"):
        open_dataset(tmp_path / "set", use_labels=True)


def test_a_label_missing_for_an_image_is_named(tmp_path):
    make_folder(tmp_path / "set", noise(4), [0, 1, 0, 1])
    (tmp_path / "set/1/img9.png").write_bytes(encoded(noise(1)[0]))
    with pytest.raises(DataError, match=r"no label for 1/img9\.png"):
        open_dataset(tmp_path / "set", use_labels=True)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"classes": []}',
        '{"labels": [1, 2]}',
        '{"labels": 3}',
        "\xff",
        pytest.param("[" * 200_000, id="deep"),
    ],
)
def test_a_malformed_dataset_json(tmp_path, content):
    make_folder(tmp_path / "set", noise(4))
    (tmp_path / "set/dataset.json").write_bytes(content.encode("latin1"))
    with pytest.raises(DataError, match=r"dataset\.json is not of the form"):
        open_dataset(tmp_path / "set", use_labels=True)


# The bundled set.


@pytest.mark.parametrize(("split", "count"), [("train", 35_000), ("test", 5_000)])
def test_the_bundled_set(split, count):
    dataset = demo_dataset(split, use_labels=True)
    assert (len(dataset), dataset.resolution, dataset.channels, dataset.label_dim) == (count, 16, 1, 10)
    counts = np.bincount(dataset.labels)
    assert counts.min() > 0.9 * count / 10 and counts.max() < 1.1 * count / 10
    pixels = everything(dataset)
    assert pixels.min() == 0 and pixels.max() == 255
    assert len(np.unique(pixels.reshape(count, -1), axis=0)) > 0.99 * count


def test_the_bundled_splits_share_almost_no_image():
    train, test = ({image.tobytes() for image in everything(demo_dataset(split))} for split in ("train", "test"))
    assert len(train & test) < 0.002 * len(test)
