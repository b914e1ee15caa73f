"""Damage to files, drawn at random: changes of bytes, of JSON, and of what archives and headers say of themselves."""

import contextlib
import json
import os
import random
import struct
import zipfile
import zlib
from pathlib import Path

import edm_files
import pytest

# Mutations of bytes


def damage(content: bytes, draw: random.Random) -> bytes:
    """One to four small changes, most of them of a few bytes."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        length = draw.choice((1, 1, 2, 4, 8, 64))
        match draw.randrange(7):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                data[at : at + length] = draw.randbytes(length)
            case 2:
                data[at:at] = draw.randbytes(length)
            case 3:
                del data[at : at + length]
            case 4:
                del data[at:]
            case 5:
                other = draw.randrange(len(data) + 1)
                data[at : at + length] = data[other : other + length]
            case _:
                width = draw.choice((1, 2, 4, 8))
                number = draw.choice((0, 1, (1 << 8 * width) - 1, 1 << (8 * width - 1), 1 << (8 * width - 2)))
                data[at : at + width] = number.to_bytes(width, draw.choice(("little", "big")))
    return bytes(data)


# Mutations of JSON

VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    0.5,
    1e308,
    10**9,
    10**18,
    -(10**30),
    "",
    "x" * 1000,
    "../../etc/passwd",
    "\ud800",
    [],
)
VALUES += ({}, [[]], {"a": 1}, [1, 2], "nan", "float32", "os.system", "<script>", float("nan"), float("inf"))


def change_json(value, draw: random.Random):
    """One value somewhere is another, is gone, or comes twice."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        copy = value.copy()
        match draw.randrange(8):
            case 0:
                del copy[key]
            case 1 if isinstance(copy, list):
                copy.insert(key, copy[key])
            case 1:
                copy[f"{key}x"] = copy[key]
            case _:
                copy[key] = change_json(value[key], draw)
        return copy
    return draw.choice(VALUES)


def damage_json(text: bytes, draw: random.Random) -> bytes:
    match draw.randrange(12):
        case 0:
            return damage(text, draw)
        case 1:
            return b"[" * 100_000 + text
        case _:
            return json.dumps(change_json(json.loads(text), draw)).encode(errors="replace")


def damage_json_file(path: Path, draw: random.Random) -> None:
    path.write_bytes(damage_json(path.read_bytes(), draw))


def damage_file(path: Path, draw: random.Random) -> None:
    path.write_bytes(damage(path.read_bytes(), draw))


# Mutations of archives


def png_of(width: int, height: int, depth: int = 8, colour: int = 0, rows: bytes = b"\0" * 100) -> bytes:
    """A PNG that says to be so large, whatever it holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def zeros_deflated(mebibytes: int) -> bytes:
    """A deflate stream of so many MiB of zeros, made at once."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return block * mebibytes + packer.flush()


def with_bomb(path: Path, name: str, mebibytes: int) -> None:
    """Add a member that unpacks to so many MiB, as it says."""
    content, size = zeros_deflated(mebibytes), mebibytes << 20
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(name, content)
        info = archive.getinfo(name)
        info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, size
        archive.fp.seek(info.header_offset)
        archive.fp.write(info.FileHeader(zip64=False))
        archive.fp.seek(archive.start_dir)


def repack(path: Path, members: list[tuple[str, bytes]], attributes: int = 0) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = attributes
            archive.writestr(info, content)


def damage_zip(path: Path, draw: random.Random) -> None:
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = draw.randrange(len(members))
    name, content = members[at]
    sizes = ((31_623, 31_623), (10**9, 1), (1, 10**9), (2**31 - 1, 2**31 - 1), (0, 0), (9_000, 9_000), (16, 17))
    bad_names = ("../../evil.png", "/etc/evil.png", "a\\..\\b.png", "x" * 5000 + ".png", "\n.png", "", ".hidden.png")
    match draw.randrange(10):
        case 0:
            members[at] = (draw.choice(bad_names), content)
        case 1:
            members.append((name, content))
        case 2:
            png = png_of(*draw.choice(sizes), draw.choice((1, 8, 16)), draw.choice((0, 2, 3, 4, 6)))
            members[at] = (name if name.endswith("png") else "a.png", png)
        case 3:
            members[at] = (name, damage(content, draw))
        case 4:
            labels = next(i for i, member in enumerate(members) if member[0] == "dataset.json")
            members[labels] = ("dataset.json", damage_json(members[labels][1], draw))
        case 5:
            return with_bomb(path, draw.choice(("bomb.png", "00000/bomb.jpg")), draw.choice((1, 64, 3000)))
        case 6:
            del members[at]
        case 7:
            return repack(path, members, draw.choice((0o120777 << 16, 0o040755 << 16, 0xFFFFFFFF)))
        case _:
            return damage_file(path, draw)
    with pytest.warns(UserWarning) if len({n for n, _ in members}) < len(members) else contextlib.nullcontext():
        repack(path, members)
    return None


def damage_npz(path: Path, draw: random.Random) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(list(members))
    match draw.randrange(7):
        case 0:
            shape = draw.choice(((10**9,), (10**6, 10**6), (-1, 4), (2**62, 4), (0, 16, 16), (6, 0, 0), ()))
            members[name] = _npy(draw.choice(("|u1", "<f8", "<i8")), shape, b"\0" * 64)
        case 1:
            members[name] = _npy("|O", (1,), edm_files.dumps(edm_files.Reduced(os.system, "true")))
        case 2:
            members[name] = _npy(draw.choice(("<f4", "<c16", "|S8", "<U9", "<M8[s]", "|b1")), (4, 4), bytes(4096))
        case 3:
            members[name] = damage(members[name][:128], draw) + members[name][128:]
        case 4:
            members[draw.choice(("../x.npy", "images.npy.npy", "labels", "sigma.npy"))] = members[name]
        case 5:
            del members[name]
        case _:
            return damage_file(path, draw)
    repack(path, list(members.items()))
    if draw.random() < 0.1:
        with_bomb(path, "more.npy", 3000)
    return None


def _npy(kind: str, shape: tuple[int, ...], content: bytes) -> bytes:
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def damage_safetensors(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if draw.random() < 0.4:
        return damage_file(path, draw)
    header = damage_json(content[8 : 8 + length], draw)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    return None


def damage_floats(path: Path, draw: random.Random) -> None:
    """Numbers that are none, in their place."""
    content = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    at = draw.randrange(length, len(content) - 4)
    content[at : at + 4] = struct.pack("<f", draw.choice((float("nan"), float("inf"), 1e38)))
    path.write_bytes(content)
