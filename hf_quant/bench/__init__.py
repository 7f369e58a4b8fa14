"""Measures memory, time to load, prefill and decode speed, and time to the first token."""
