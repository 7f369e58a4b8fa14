"""What models are shown, to calibrate them and to measure them: texts, conversations, windows of tokens.

Nothing here knows a model or a scheme."""
