"""BLISS (arXiv 2510.06048): a score model fitted before the training; and the twins of the penalty gradient."""
