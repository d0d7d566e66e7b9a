"""Plain training of language models, its learning curve, and evaluation."""
