"""Types for a decoder's input and its skip, whose concatenation is never built."""

from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""(x, skip): stands for the concatenation of their channels."""


Statistics = Tensor | tuple[Tensor | None, Tensor | None] | None
"""Statistics of a map, or of both maps of a pair, as `residual` returned them; None if there are none."""
