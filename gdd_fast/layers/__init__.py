"""The layers of the networks, built on the operators of gdd_fast.ops.

Parameters are and stay float32; a layer computes in the dtype of its input. Parameter and buffer names are EDM's
(Karras et al., arXiv 2206.00364), so that its weights load unchanged.
"""
