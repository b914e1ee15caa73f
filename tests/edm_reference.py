"""Small networks with weights from a rule, so that EDM's own code and ours can be run on the same ones.

`tests/data/make_edm_reference.py` stores what EDM's code returns for them; the tests compare.
"""

import hashlib
import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from gdd_fast.models.edm import adm, ddpmpp, ncsnpp

SIZE = 16
AUGMENT_DIM = 9
TINY = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.0}

# The constructor's arguments of complete networks: every encoder, decoder and embedding, one and several heads, with
# and without classes and augmentation.
SMALL: dict[str, dict[str, Any]] = {
    "ncsnpp": {**ncsnpp(**TINY), "augment_dim": AUGMENT_DIM},
    "ncsnpp_cond": {**ncsnpp(**TINY), "label_dim": 10, "channel_mult": [1, 2, 2]},
    "ddpmpp": ddpmpp(**TINY),
    "ddpmpp_cond": {**ddpmpp(**TINY), "label_dim": 10, "augment_dim": AUGMENT_DIM, "attn_resolutions": [16, 8]},
    "skip": {**ncsnpp(**TINY), "encoder_type": "skip", "decoder_type": "skip", "channel_mult": [1, 2, 2]},
    "adm": adm(**TINY) | {"model_channels": 64},
    "adm_cond": adm(**TINY) | {"model_channels": 64, "label_dim": 10, "augment_dim": AUGMENT_DIM},
}

# The paper's networks, by the name of the data set: (resolution, arguments). The teachers' augmentation layer, which a
# generator does not have, is left out.
FULL: dict[str, tuple[int, dict[str, Any]]] = {
    "cifar10-uncond": (32, ncsnpp()),
    "cifar10-cond": (32, {**ncsnpp(), "label_dim": 10}),
    "cifar10-ddpmpp": (32, ddpmpp()),
    "ffhq-afhqv2": (64, ncsnpp(channel_mult=[1, 2, 2, 2])),
    "imagenet": (64, {**adm(), "label_dim": 1000}),
}


def uniform(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Float32 numbers in [-1, 1) that depend on `name` and the index alone: an integer hash, exact on any machine."""
    x = torch.arange(math.prod(shape), dtype=torch.int64) + zlib.crc32(name.encode())
    for _ in range(2):
        x = ((x & 0xFFFFFFFF) ^ ((x & 0xFFFFFFFF) >> 16)) * 0x45D9F3B
    x = (x & 0xFFFFFFFF) ^ ((x & 0xFFFFFFFF) >> 16)
    return ((x >> 8).to(torch.float32) / 2**23 - 1).reshape(shape)


def fill(net: nn.Module) -> nn.Module:
    """Give every parameter, and the Fourier frequencies, a value that matters: EDM starts many at or near zero."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            values = uniform(name, tensor.shape)
            if name.endswith("resample_filter"):
                continue
            if name.endswith("freqs"):
                values = values * 16
            elif tensor.ndim > 1:
                values = values * math.sqrt(3 / tensor[0].numel())
            elif "norm" in name and name.endswith("weight"):
                values = 1 + values / 2
            else:
                values = values / 4
            tensor.copy_(values)
    return net.eval()


def inputs(config: dict[str, Any], size: int = SIZE, batch: int = 2) -> dict[str, Tensor | None]:
    """x, sigma, class_labels and augment_labels for a network of `config`."""
    sigma = torch.tensor([0.5, 80.0])[:batch]
    label_dim, augment_dim = config.get("label_dim", 0), config.get("augment_dim", 0)
    return {
        "x": uniform("x", (batch, 3, size, size)) * sigma[:, None, None, None] * 1.5,
        "sigma": sigma,
        "class_labels": torch.eye(label_dim)[torch.arange(batch) * 3 % label_dim] if label_dim else None,
        "augment_labels": uniform("augment", (batch, augment_dim)) if augment_dim else None,
    }


def digest(net: nn.Module) -> str:
    """Digest of the names and shapes of all parameters and buffers, in no order."""
    lines = sorted(f"{name} {tuple(tensor.shape)}\n" for name, tensor in net.state_dict().items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
