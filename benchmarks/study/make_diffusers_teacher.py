"""A small unconditional diffusion model made with diffusers alone, as anybody's would be: a teacher to distil.

    python -m benchmarks.study.make_diffusers_teacher --out ddpm-epsilon
    python -m benchmarks.study.make_diffusers_teacher --prediction v_prediction --schedule squaredcos_cap_v2 \\
        --out ddpm-v

`UNet2DModel`, `DDPMScheduler`, the mean squared error of what the network predicts at random times (Ho et al., arXiv
2006.11239; Salimans & Ho, arXiv 2202.00512, for v), Adam and diffusers' own `EMAModel`. The folder is written by
`DDPMPipeline.save_pretrained`, anew every few thousand images, so that a run can be stopped when it is good enough.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from gdd_fast.data import load_data


def make(
    data: str, prediction: str, schedule: str, out: Path, *, kimg: float, batch: int, lr: float, seed: int, save: int
) -> None:
    """Train on `data` for `kimg` thousand images and write the averaged network with its scheduler to `out`."""
    torch.manual_seed(seed)
    dataset = load_data(data)
    images = torch.from_numpy(np.concatenate(list(dataset.chunks()))).float() / 127.5 - 1
    net = UNet2DModel(
        sample_size=dataset.resolution,
        in_channels=dataset.channels,
        out_channels=dataset.channels,
        layers_per_block=1,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=schedule, prediction_type=prediction)
    average = EMAModel(net.parameters(), decay=0.998, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    steps = int(kimg * 1000 / batch)
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 200) * 0.5 * (1 + np.cos(np.pi * step / steps))
        real = images[torch.randint(len(images), (batch,))]
        noise = torch.randn_like(real)
        times = torch.randint(scheduler.config.num_train_timesteps, (batch,))
        noisy = scheduler.add_noise(real, noise, times)
        target = noise if prediction == "epsilon" else scheduler.get_velocity(real, noise, times)
        loss = F.mse_loss(net(noisy, times).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.step(net.parameters())
        losses.append(loss.item())
        if step % save == 0 or step == steps:
            average.store(net.parameters())
            average.copy_to(net.parameters())
            DDPMPipeline(net, scheduler).save_pretrained(out)
            average.restore(net.parameters())
            mean, losses = sum(losses) / len(losses), []
            seconds = time.monotonic() - started
            print(f"{step * batch / 1000:.0f} kimg, loss {mean:.4f}, {seconds:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo", help="`demo`, or an EDM-style zip, folder or npz of images")
    parser.add_argument("--prediction", choices=("epsilon", "v_prediction"), default="epsilon")
    parser.add_argument("--schedule", choices=("linear", "squaredcos_cap_v2"), default="linear")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--kimg", type=float, default=80.0)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=int, default=250, help="steps between writings of the folder")
    options = vars(parser.parse_args())
    make(**options)


if __name__ == "__main__":
    main()
