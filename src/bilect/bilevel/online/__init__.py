"""BLADE (arXiv 2606.18650): tokens chosen inside every training step."""
