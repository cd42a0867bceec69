"""Recorded full-size results, one file a system."""
