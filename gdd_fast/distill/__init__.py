"""Distillation of a diffusion teacher into a one-step generator with a GAN loss alone (GDD, GDD-I)."""
