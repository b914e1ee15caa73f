"""One-step image generators from pretrained diffusion models (GDD / GDD-I), with fused kernels."""

__version__ = "0.1.0"
