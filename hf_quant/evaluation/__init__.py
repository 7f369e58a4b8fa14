"""What quantization cost: a model is measured beside its base, on the same held-out text.

Nothing here quantizes or publishes."""
