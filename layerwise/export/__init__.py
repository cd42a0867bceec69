"""Exports: the model as other tools read it."""
