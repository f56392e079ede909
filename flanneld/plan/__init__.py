"""Decisions as pure functions: what should be, what differs, in which order to change it."""
