"""Models: any Hugging Face causal LM, the presets, and the score model."""
