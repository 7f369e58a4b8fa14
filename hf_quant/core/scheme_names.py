"""What other programs call schemes, and the scheme here that is meant: for messages, never to guess."""

from __future__ import annotations

import difflib
import re

from hf_quant.core.k_quants import K_QUANTS

GGUF = {  # of llama.cpp: bits, and whether its blocks have zero points
    "q8_0": "W8A16-g32", "q5": "W8A16-g128", "q4_0": "W4A16-g32", "iq4": "W4A16-g32", "q4": "W4A16-g32-asym",
    "q3": "W3A16-g32-asym", "iq3": "W3A16-g32-asym", "q2": "W2A16-g32-asym", "iq2": "W2A16-g32-asym",
    "iq1": "W2A16-g32-asym", "tq": "W2A16-g32-asym",
}  # fmt: skip
MIX = re.compile(r"(q[2-6]_k)_(?:xs|s|m|l|xl)")
LEVELS = ("nf4", "fp4", "mxfp4", "nvfp4")
FLOATS = re.compile(r"fp8.*|.*e4m3.*|.*e5m2.*|float8.*|w8a8-fp8.*")
WIDTH = re.compile(r"(?:load[-_]?in[-_]?)?(?:int|uint|w|u|i|q|b)?(\d+)[-_]?(?:bits?)?(?:[-_]?(?:wo|weight[-_]?only))?")
LIKE = re.compile(r"(?:w|int)?(\d+)[-_]?(?:a(\d+))?(?:[-_]?g(-1)|[-_]?g?[-_]?(\d+))?[-_]?(sym|asym)?")
LONGEST = 40  # characters of a name that somebody may have meant
SIZES = ("-1", "16", "32", "64", "128", "256", "512", "1024")
KNOWN = [f"W{bits}A16-g{size}{zero}" for bits in (8, 4, 3, 2) for size in (128, 64, 32) for zero in ("", "-asym")]
KNOWN += ["W8A8", "W4A8-g128", "W8A8-static", "W8A8-threshold", *K_QUANTS]


def equivalent(name: str) -> str:
    """A sentence on what to write in place of ``name``, which is not a scheme; empty if nothing is like it."""
    word = name.strip().lower()
    if len(word) > LONGEST:
        return ""
    if (match := MIX.fullmatch(word)) is not None:
        return (
            f"that is a mix of types of llama.cpp's GGUF files; most of its layers are {match[1].upper()}, which is a scheme, "
            "and --override gives others their own"
        )
    if (kind := next((kind for kind in GGUF if word.startswith(kind) and "_" in word), None)) is not None:
        return f"that is a type of llama.cpp's GGUF files; the nearest scheme is {GGUF[kind]}"
    if word in LEVELS:
        return "four-bit floats are read where a checkpoint has them, not made: use W4A16-g64, which is no larger than NF4"
    if FLOATS.fullmatch(word):
        return "8-bit floats are read to floating point, not made: use W8A16-g128, or W8A8 for INT8 activations too"
    match = WIDTH.fullmatch(word) or LIKE.fullmatch(word)
    if match is not None:
        bits, activations, row, group, zero = (*match.groups(), None, None, None, None)[:5]
        return _of_parts(bits, activations, row or group, zero)
    close = difflib.get_close_matches(word.replace("_", "-").upper(), [slug.upper() for slug in KNOWN], 1, 0.7)
    return f"did you mean {next(slug for slug in KNOWN if slug.upper() == close[0])}?" if close else ""


def _of_parts(bits: str | None, activations: str | None, group: str | None, zero: str | None) -> str:
    if bits not in ("2", "3", "4", "8"):
        nearest = "W8A16-g128" if int(bits or 0) > 4 else "W2A16-g128"
        return f"weights have 8, 4, 3 or 2 bits; the nearest scheme is {nearest}"
    asym = "-asym" if zero == "asym" else ""
    if activations in (None, "16", "32"):
        return f"did you mean W{bits}A16-g{group if group in SIZES else 128}{asym}?"
    if activations == "8" and bits in ("8", "4"):
        return "did you mean W8A8?" if bits == "8" else "did you mean W4A8-g128?"
    return f"activations have 16 bits, or 8 in W8A8 and W4A8-g128; did you mean W{bits}A16-g128?"
