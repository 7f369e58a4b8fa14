"""What a command does, callable from Python: quantize, convert, verify, search for a mixture of widths.

Nothing here parses arguments or prints; that is in `cli`."""
