"""Hostile files, made at random from good ones: nothing but an `HfQuantError` may come out, or a model with finite logits.
And operations given wrong arguments: they are refused, or the result is right.

``python -m tests.fuzz FIRST LAST`` runs the cases of that range for hours, if wanted; `test_fuzz.py` runs the first ones in CI.
A case is a function of its number alone.
"""
