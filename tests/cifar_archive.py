"""CIFAR-10's archive, made by hand as Python 2 wrote the original."""

import io
import struct
import tarfile

import numpy as np


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


def python2_batch(data, labels):
    """The pickle that Python 2 wrote for the original archive, opcode by opcode (protocol 2, strings of bytes)."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def integer(value):
        return b"J" + struct.pack("<i", value)

    raw = data.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b") + b"\x87R"
    )
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    shape = integer(data.shape[0]) + integer(data.shape[1]) + b"\x86"
    state = b"(" + integer(1) + shape + dtype + b"\x89" + b"T" + struct.pack("<i", len(raw)) + raw + b"t"
    listed = b"](" + b"".join(integer(label) for label in labels) + b"e"
    label_text, names = text(b"training batch 1 of 5"), b"](" + text(b"a.png") + b"e"
    pairs = [(b"data", array + state + b"b"), (b"labels", listed), (b"batch_label", label_text), (b"filenames", names)]
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in pairs) + b"u."


def archive(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def whole_archive(path, count=4):
    batches = {f"data_batch_{k}": (pixels(count, k), [(k + j) % 10 for j in range(count)]) for k in range(1, 6)}
    batches["test_batch"] = (pixels(count, 9), [9] * count)
    return archive(
        path, {"readme.html": b"hi"} | {name: python2_batch(*batch) for name, batch in batches.items()}
    ), batches
