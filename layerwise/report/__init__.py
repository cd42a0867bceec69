"""Verification, run folders, and reports for people: tables, charts, one self-contained page."""
