"""From seeds to images on disk: latents, samplers, writers, grids."""
