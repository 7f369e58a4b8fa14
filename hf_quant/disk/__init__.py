"""Durable files, checked input, and the memory of this machine.

Nothing here knows what a file is about: no scheme, no model, no format."""
