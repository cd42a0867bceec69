"""Systems that serve: schedules, orders and caches of an engine."""
