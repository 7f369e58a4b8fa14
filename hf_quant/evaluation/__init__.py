"""What quantization costs: a model is measured against its base on the same held-out text.

Nothing here quantizes or publishes."""
