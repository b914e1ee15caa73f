"""A package, so that `tests.offline` is this folder whatever else installs a package of that name."""
