"""The module compiled from C++, and weights in its layout; no kernel of its own."""
