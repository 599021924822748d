"""Plug-ins for trainers that others operate; each needs its extra installed."""
