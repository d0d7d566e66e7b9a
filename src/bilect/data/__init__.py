"""Documents in, tokens out."""
