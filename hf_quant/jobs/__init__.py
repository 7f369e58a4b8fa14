"""What a command does, callable from Python: quantize, evaluate, ladder, convert, verify, push and plan.

The file of that name holds the function, which `hf_quant` makes public, and its result. Nothing here parses a command line,
prints or exits; that is in `cli`. Options are checked before anything heavy is imported, which is why functions import.
"""
