"""The layers of the networks over the operators of gdd_fast.ops.

Parameters are float32 and stay so; a layer computes in the dtype of the activations it is given. Parameter and buffer
names equal EDM's (Karras et al., arXiv 2206.00364), so that its weights load unchanged.
"""
