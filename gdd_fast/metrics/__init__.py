"""How far generated images are from real ones: features, their statistics, and metrics of them."""
