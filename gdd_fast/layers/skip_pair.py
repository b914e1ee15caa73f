"""A decoder's input and its skip, whose concatenation is not built."""

from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""(x, skip): the concatenation of their channels, not built."""


Statistics = Tensor | tuple[Tensor | None, Tensor | None] | None
"""Of a map, or of each of a pair: what `residual` returned with it, None where nothing did."""
