"""One-step inference: the network folded at its one noise level, and the engines that run it."""
