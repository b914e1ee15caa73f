"""What the library takes and what its peers take; not installed with the package."""
