"""Configurations as plain JSON, and which settings may differ when a run is resumed."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON types."""
    return {
        f.name: to_dict(value) if is_dataclass(value) else list(value) if isinstance(value, tuple) else _plain(value)
        for f in fields(config)
        for value in [getattr(config, f.name)]
    }


def default_settings(config: Any) -> dict[str, Any]:
    """The defaults of a configuration's class, as `to_dict` gives them."""
    return to_dict(type(config)())


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


# What a resumed run may change; everything else is part of the recipe and has to stay. For data and teacher only the
# path may change: their contents are compared (gdd_fast.data.fingerprint).
RESUMABLE = frozenset(
    {"preset", "run_dir", "duration_mimg", "batch_gpu", "device", "backend", "engine", "tick_kimg", "checkpoint_ticks"}
    | {"max_skipped_steps", "evaluate_images", "evaluate_data", "workers", "data_memory_gib", "backbone_weights"}
    | {"evaluate_ticks", "evaluate_metrics", "evaluate_at_start", "evaluate_ref", "feature_weights", "log"}
    | {"data", "teacher", "fsdp", "keep_checkpoints", "max_hours", "async_checkpoints", "debug_finite"}
)
# What may also change while a run is unfinished, as one that diverges needs other values. The change is recorded.
ADJUSTABLE = frozenset(
    {"batch", "g_lr", "d_lr", "lr", "lr_decay_kimg", "g_precision", "d_precision", "r1_precision", "precision"}
)


def differences(
    old: dict[str, Any],
    new: dict[str, Any],
    ignore: frozenset[str] = RESUMABLE,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    prefix: str = "",
) -> list[str]:
    """Settings in which two `to_dict` configurations differ, except those in `ignore`: `section.name: old -> new`.

    A setting that `old` lacks, because the version that wrote it did not have that setting, is taken from `defaults`: a
    default is what the program did before there was a choice.
    """
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name, defaults.get(name)), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, ignore, defaults.get(name) or {}, f"{prefix}{name}.")
        elif a != b and name not in ignore:
            found.append(f"{prefix}{name}: {a!s:.80} -> {b!s:.80}")  # clipped: may be a section of another command
    return found
