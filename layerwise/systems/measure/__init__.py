"""Systems that measure what layers do."""
