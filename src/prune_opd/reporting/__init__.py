"""Numbers on their way out: metrics, console, logs, trackers, the report, the model card."""
