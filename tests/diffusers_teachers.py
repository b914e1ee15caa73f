"""Small U-Nets of diffusers' with random weights, one of each architecture that people have."""

from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, ScoreSdeVeScheduler, UNet2DModel
from tiny_run import write_inputs

SIZE = 8
CLASSES = 4

_BASE = {
    "sample_size": SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
UNETS = {
    "plain": {},
    "ddpm-cifar10": {"flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None, "downsample_padding": 0},
    "classes": {"num_class_embeds": CLASSES, "in_channels": 1, "out_channels": 1},
    "adm": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "out_channels": 6,
        "num_class_embeds": CLASSES,
    },
    "score": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "time_embedding_type": "fourier",
        "block_out_channels": (32, 32),
        "norm_num_groups": None,
        "mid_block_scale_factor": 2**0.5,
    },
    "centered": {"center_input_sample": True, "act_fn": "gelu", "in_channels": 4, "out_channels": 4},
    "learned-times": {
        "time_embedding_type": "learned",
        "num_train_timesteps": 1000,
        "class_embed_type": "timestep",
        "num_class_embeds": CLASSES,
        "sample_size": 12,
    },
    "k-blocks": {
        "down_block_types": ("KDownBlock2D", "KDownBlock2D"),
        "up_block_types": ("KUpBlock2D", "KUpBlock2D"),
        "mid_block_type": None,
        "block_out_channels": (32, 32),
        "layers_per_block": 2,
        "norm_num_groups": 4,
    },
}


def random_unet(name: str) -> UNet2DModel:
    """The U-Net of UNETS by this name, in evaluation mode, without gradients; no weight of it is zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(**{**_BASE, **UNETS[name]})
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
    return unet.eval().requires_grad_(False)


def scheduler_of(name: str) -> DDPMScheduler | ScoreSdeVeScheduler:
    """One that the U-Net of UNETS by this name can be trained with: a Fourier embedding has no time 0."""
    return ScoreSdeVeScheduler() if name == "score" else DDPMScheduler(prediction_type="v_prediction")


def write_ddpm(folder: Path) -> Path:
    """`folder` with ddpm/, a pipeline that predicts noise, and data.zip, whose images are 1 x 16^2, as its are."""
    write_inputs(folder)
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    unet = UNet2DModel(**_BASE | blocks | {"sample_size": 16, "in_channels": 1, "out_channels": 1})
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "ddpm")
    return folder
