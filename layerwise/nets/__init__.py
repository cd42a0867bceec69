"""Modules a row can name: norms, attention, feed-forward networks, packed matrices, and the decoder they make."""
