"""The daemon's smaller long-lived duties, one class each; ``daemon.py`` starts them in its task group."""
