"""A folder with a model in it that a stranger may have written: its files, its tensors, its quantized layers.

Nothing here knows transformers; whatever is read is checked first."""
