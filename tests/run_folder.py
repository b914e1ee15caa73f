"""A run folder as training leaves it, made by hand: small, at once, and with numbers that a test knows."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from tiny_run import tiny_network

from gdd_fast.config import override, preset, to_dict
from gdd_fast.distill.freeze import freeze
from gdd_fast.report import unet_picture
from gdd_fast.report.layer_analysis import analyze
from gdd_fast.sampling.grid import save_grid


def write_run(
    folder: Path, ticks: int = 4, fid: float = 2.0, recall: float = 0.6, layers: bool = False, **settings: Any
) -> Path:
    """A run of `ticks` ticks of a thousand images, a quarter of its length; `settings` by the names of flags."""
    config = override(preset("cifar10-uncond-gdd-i"), run_dir="run", duration_mimg=4e-3 * ticks, **settings)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    lines = []
    for tick in range(1, ticks + 1):
        line = {"images": 1000 * tick, "minutes": tick / 2, "images_per_second": 100.0 + tick, "peak_host_gib": 1.5}
        line |= {
            "loss_g": 1 / tick if tick != 3 else None,
            "loss_d": 2.0,
            "logit_real": 0.5,
            "logit_fake": -0.25 / tick,
        }
        line |= {"sign_accuracy_real": 0.7, "sign_accuracy_fake": 0.6, "grad_norm_g": 3.0, "skipped_g": 0.0}
        if tick % 2 == 0:
            line |= {"fid": fid + math.exp(-tick) * (tick < ticks), "recall": recall}
        lines.append(line)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for tick in range(ticks + 1):
        shade = torch.full((4, 1, 8, 8), 2 * tick / ticks - 1)
        save_grid(shade, folder / "samples" / f"{1000 * tick:09d}.png", zoom=2)
    save_grid(torch.zeros(4, 1, 8, 8), folder / "samples" / "teacher.png", zoom=2)
    net = tiny_network()
    freeze(net, 1)
    (folder / "unet.json").write_text(json.dumps(unet_picture.record(net)))
    if layers:
        found = analyze(net.eval(), levels=3, seeds=range(1))
        (folder / "layer_analysis.json").write_text(json.dumps(found))
    return folder
