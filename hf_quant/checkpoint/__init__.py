"""A folder with a model from an untrusted source: its files, its tensors, its quantized layers.

Nothing here knows transformers; everything is checked before it is used."""
