"""Networks on disk: folders, run folders, EDM's pickles."""
