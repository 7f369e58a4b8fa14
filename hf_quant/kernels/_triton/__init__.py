"""Functions compiled by Triton, and the layouts and tile sizes that they read; no kernel of its own."""
