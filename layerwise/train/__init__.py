"""Training that knows layers: the loop, and short healing after a transform."""
