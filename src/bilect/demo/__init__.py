"""The demo: its text, its settings, its run."""
