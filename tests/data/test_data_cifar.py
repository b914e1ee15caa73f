"""The CIFAR-10 archive: read exactly, and nothing in it is ever executed."""

import os
import pickle
import random
import struct

import numpy as np
import pytest
from cifar_archive import archive, pixels, python2_batch, whole_archive

from gdd_fast.data.cifar import parse_batch, read_cifar10
from gdd_fast.errors import DataError


def test_the_hand_made_pickle_is_what_python_reads_as_a_batch():
    batch = pickle.loads(python2_batch(pixels(3), [1, 2, 3]), encoding="latin1")
    np.testing.assert_array_equal(batch["data"], pixels(3))
    assert batch["labels"] == [1, 2, 3]


def test_both_splits_in_order(tmp_path):
    path, batches = whole_archive(tmp_path / "cifar-10-python.tar.gz")
    images, labels = read_cifar10(path, "train")
    assert images.shape == (20, 3, 32, 32) and images.dtype == np.uint8 and labels.dtype == np.int64
    expected = [batches[f"data_batch_{k}"] for k in range(1, 6)]
    np.testing.assert_array_equal(images.reshape(20, 3072), np.concatenate([data for data, _ in expected]))
    assert labels.tolist() == [label for _, labels in expected for label in labels]
    np.testing.assert_array_equal(read_cifar10(path, "test")[0].reshape(4, 3072), batches["test_batch"][0])


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_batches_that_were_pickled_anew(protocol, as_bytes):
    batch = {"data": pixels(3), "labels": [1, 2, 3], "batch_label": "x"}
    if as_bytes:
        batch = {key.encode(): value for key, value in batch.items()}
    images, labels = parse_batch(pickle.dumps(batch, protocol=protocol), "here")
    np.testing.assert_array_equal(images.reshape(3, 3072), pixels(3))
    assert labels.tolist() == [1, 2, 3]


class Attack:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "named"),
    [
        (os.system, "system"),
        (os.mkdir, "mkdir"),
        (eval, "eval"),
        (exec, "exec"),
        (__import__, "__import__"),
        (getattr, "getattr"),
        (np.load, "load"),
        (np.memmap, "memmap"),
    ],
)
def test_calls_are_refused_by_name_and_not_made(tmp_path, monkeypatch, function, named, protocol):
    monkeypatch.chdir(tmp_path)
    argument = "mkdir owned" if function is os.system else "owned" if function is os.mkdir else "open('owned', 'w')"
    attack = pickle.dumps({"data": pixels(1), "labels": [Attack(function, argument)]}, protocol=protocol)
    if protocol == 5:  # an array in protocol 5 asks for another name, which is refused before the attack is reached
        attack = pickle.dumps({"labels": [Attack(function, argument)]}, protocol=protocol)
    path = archive(tmp_path / "cifar-10-python.tar.gz", {"test_batch": attack})
    with pytest.raises(DataError, match=rf"test_batch: refused: it asks for \S+\.{named}\b"):
        read_cifar10(path, "test")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cnumpy\nndarray\nN}U\x0b__setstate__cnumpy\ndtype\ns\x86b.",  # sets attributes on what it is given
        b"\x80\x02cnumpy\ndtype\n}U\x04codecnumpy\ndtype\nsb.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R}b.",
        b"\x80\x02Ppersistent\n.",
        b"\x80\x02\x82\x01.",  # the extension registry
        b"\x80\x04\x8c\x05numpy\x8c\x07dtype.x\x93.",  # a dotted name
        b"\x80\x02c__builtin__\nobject\n)\x81.",
    ],
)
def test_pickles_that_play_with_the_stand_ins(content):
    with pytest.raises(DataError, match="here: "):
        parse_batch(content, "here")
    images, _ = parse_batch(python2_batch(pixels(2), [0, 1]), "here")  # and nothing of it stays behind
    np.testing.assert_array_equal(images.reshape(2, 3072), pixels(2))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".", "memo index"),  # would take 32 GiB
        (b"\x80\x02Np2000000000\n.", "memo index"),
        (b"\x80\x02})" + b"\x85" * 3_000_000 + b"Ns.", "tuples"),  # would overflow the stack
    ],
)
def test_what_would_exhaust_the_unpickler_is_refused(content, named):
    with pytest.raises(DataError, match=f"here: refused: .*{named}"):
        parse_batch(content, "here")


def test_mutated_batches_give_one_error_or_a_batch_of_the_right_form():
    good = python2_batch(pixels(2), [0, 1])
    head = good.index(pixels(2).tobytes())
    draw = random.Random(0)
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            # The tail and the head hold the structure; flips inside the pixels only change pixels.
            place = draw.choice([draw.randrange(head), draw.randrange(head + 6144, len(bad))])
            bad[place] = draw.randrange(256)
        try:
            images, labels = parse_batch(bytes(bad), "here")
        except DataError:
            continue
        assert images.shape == (2, 3, 32, 32) and images.dtype == np.uint8 and labels.shape == (2,)
    for length in (0, 1, 2, 10, head, len(good) // 2, len(good) - 1):
        with pytest.raises(DataError, match="here: "):
            parse_batch(good[:length], "here")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "lacks an array"),
        ({"data": pixels(2)}, "lacks an array"),
        ({"data": "x", "labels": [1]}, "lacks an array"),
        ({"data": pixels(2), "labels": [1]}, "not a plain array"),
        ({"data": pixels(2), "labels": [1, 10]}, "not all from 0 to 9"),
        ({"data": pixels(2), "labels": [1, 1.0]}, "not all from 0 to 9"),
        ({"data": pixels(2)[:, :100].copy(), "labels": [1, 1]}, "not a plain array"),
        ({"data": pixels(2).astype(np.int64), "labels": [1, 1]}, "not a plain array of unsigned bytes"),
        ({"data": np.asfortranarray(pixels(2)), "labels": [1, 1]}, "not a plain array of unsigned bytes"),
        ({"data": np.array([{}, []], dtype=object), "labels": [1, 1]}, "not a plain array of unsigned bytes"),
    ],
)
def test_batches_of_another_form(batch, message):
    with pytest.raises(DataError, match=f"here: .*{message}"):
        parse_batch(pickle.dumps(batch, protocol=2), "here")


def test_archives_that_are_something_else(tmp_path):
    other = archive(tmp_path / "other.tar.gz", {"readme.html": b"hello"})
    with pytest.raises(DataError, match=r"not a CIFAR-10 python archive: it has no data_batch_1"):
        read_cifar10(other, "train")
    path, _ = whole_archive(tmp_path / "cifar-10-python.tar.gz")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="not a readable tar archive"):
        read_cifar10(path, "train")
    path.write_bytes(b"hello")
    with pytest.raises(DataError, match="not a readable tar archive"):
        read_cifar10(path, "train")


def test_an_oversized_member_is_not_read(tmp_path, monkeypatch):
    path, _ = whole_archive(tmp_path / "cifar-10-python.tar.gz")
    monkeypatch.setattr("gdd_fast.data.cifar._MAX_BYTES", 100)
    with pytest.raises(DataError, match="far more than a CIFAR-10 batch"):
        read_cifar10(path, "train")
