"""Exchanging networks with other projects: EDM's pickles, diffusers and the Hugging Face Hub."""
