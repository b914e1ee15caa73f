"""Read EDM's network pickles without executing anything: the public name of `gdd_fast.models.files.pickle_reader`."""

from gdd_fast.models.files.pickle_reader import PickledNetwork, load

__all__ = ["PickledNetwork", "load"]
