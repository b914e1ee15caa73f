"""Data sets by path or by the name of a bundled one."""

from gdd_fast.data.dataset import ImageDataset, open_dataset
from gdd_fast.data.demo import demo_dataset

DEMO_SPLITS = {"demo": "train", "demo-test": "test"}


def load_data(name: str, *, use_labels: bool = False) -> ImageDataset:
    """`demo` (the bundled set), `demo-test` (its held-out part), or anything that `open_dataset` reads."""
    if name in DEMO_SPLITS:
        return demo_dataset(DEMO_SPLITS[name], use_labels=use_labels)
    return open_dataset(name, use_labels=use_labels)
