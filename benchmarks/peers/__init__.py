"""Other tools as baselines, on the same models and texts."""
