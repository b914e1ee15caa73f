"""A decoder's input and its skip, whose concatenation is not built."""

from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""(x, skip): the concatenation of their channels, not built."""


Statistics = Tensor | tuple[Tensor | None, Tensor | None] | None
"""Statistics of a map, or of both maps of a pair, as `residual` returned them; None where nothing did."""
