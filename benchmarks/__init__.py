"""Measurements of what the library makes; not part of it."""
