"""Numbers on their way out: metrics, the console, trackers."""
