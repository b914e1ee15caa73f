"""Images of a pipeline by diffusers' own DDIM sampler, as an .npz that `gdd_fast.evaluate --samples` reads.

python -m benchmarks.study.sample_with_diffusers ddpm-epsilon --images 2000 --out ddpm-epsilon.npz
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMPipeline


def sample(folder: str, images: int, steps: int, batch: int) -> np.ndarray:
    """uint8 (images, H, W, C)."""
    pipe = DDIMPipeline.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    parts = [
        pipe(min(batch, images - done), generator, num_inference_steps=steps, output_type="np").images
        for done in range(0, images, batch)
    ]
    return (np.concatenate(parts) * 255).round().astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a pipeline that diffusers wrote")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    images = sample(options.folder, options.images, options.steps, options.batch)
    np.savez(options.out, images=images)


if __name__ == "__main__":
    main()
