"""timm and torchvision for comparison; the library itself needs neither.

torchvision from PyPI does not import beside a CPU build of torch, for want of two operators that no network here uses;
they are declared first.
"""

import torch

_declarations = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        _declarations.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
import torchvision  # noqa: E402

__all__ = ["timm", "torchvision"]
