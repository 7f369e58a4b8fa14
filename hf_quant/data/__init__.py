"""Texts for calibration and measurement: documents, conversations, windows of tokens.

Nothing here knows a model or a scheme."""
