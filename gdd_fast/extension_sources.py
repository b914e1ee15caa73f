"""The sources of the extension: setup.py stores their digest in a build, and gdd_fast.backend compares it."""

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def digest(folder: Path) -> str:
    """A digest of the names and contents of the C++ and CUDA files under `folder`, in 16 hexadecimal digits."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
        content = path.read_bytes()
        total.update(f"{path.relative_to(folder).as_posix()} {len(content)} ".encode() + content)
    return total.hexdigest()[:16]
