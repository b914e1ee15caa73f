"""Distillation of a diffusion teacher into a one-step generator with nothing but a GAN loss (GDD, GDD-I)."""
