"""timm and torchvision for comparison; the library itself needs neither.

torchvision from PyPI does not import beside a CPU build of torch, for want of two operators that no network here uses;
there they are declared first. Beside a CUDA build it brings them along, and a second declaration ends the process.
"""

import torch

if torch.version.cuda is None:
    _declarations = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, _name):  # the benchmarks declare them too
            _declarations.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm
import torchvision

__all__ = ["timm", "torchvision"]
