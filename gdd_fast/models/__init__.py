"""Networks: EDM's U-Nets, their preconditioning and their files; the discriminator and its frozen backbones."""
