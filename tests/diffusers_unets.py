"""Small U-Nets of diffusers', of every kind of block that accelerate knows."""

import math

import torch
from torch import nn

# google/ddpm-cifar10-32, of which `narrow` is an eighth as wide
DDPM_CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "act_fn": "silu",
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
}
CONFIGS = {
    "ddpm": DDPM_CIFAR10 | {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8, "sample_size": 16},
    "filters": {
        "sample_size": 16,
        "time_embedding_type": "fourier",
        "flip_sin_to_cos": True,
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "block_out_channels": (32, 32),
        "layers_per_block": 1,
        "mid_block_scale_factor": math.sqrt(2),
    },
    "scale_shift": {
        "sample_size": 16,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": 16,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "norm_num_groups": 16,
    },
}


def unet(diffusers, config: dict) -> nn.Module:
    """A UNet2DModel of the module `diffusers`, in eval mode, with no weight at zero."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) / 30)
    return net
