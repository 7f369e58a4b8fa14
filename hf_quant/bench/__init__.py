"""What a user feels: memory, time to load, prefill and decode speed, time to the first token."""
