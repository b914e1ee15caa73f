"""Reading networks that other projects wrote."""
