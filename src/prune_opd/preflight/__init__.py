"""What is asked before a run: does it fit, does it work."""
