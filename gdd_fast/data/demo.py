"""The bundled data set: Fashion-MNIST at 16x16, see assets/README.md for origin and licence."""

from pathlib import Path
from typing import Literal

from gdd_fast.data.dataset import ImageDataset, open_dataset

_ASSETS = Path(__file__).parent / "assets"


def demo_dataset(
    split: Literal["train", "test"] = "train", *, use_labels: bool = False, max_images: int | None = None
) -> ImageDataset:
    """Fashion-MNIST, gray, 16x16, ten classes: 35,000 training or 5,000 held-out images; as `open_dataset`."""
    return open_dataset(demo_path(split), use_labels=use_labels, max_images=max_images)


def demo_path(split: Literal["train", "test"] = "train") -> Path:
    """The file of one split of the bundled set."""
    return _ASSETS / f"fashion-mnist-16x16-{split}.npz"


DEMO_SPLITS = {"demo": "train", "demo-test": "test"}


def load_data(name: str, *, use_labels: bool = False) -> ImageDataset:
    """`demo` (the bundled set), `demo-test` (its held-out part), or anything that `open_dataset` reads."""
    if name in DEMO_SPLITS:
        return demo_dataset(DEMO_SPLITS[name], use_labels=use_labels)
    return open_dataset(name, use_labels=use_labels)
