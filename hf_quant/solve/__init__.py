"""Calibrated quantization of one block at a time: the choice of steps, what a block is given, and its codes.

Blocks are modules that come from above; nothing here knows transformers or reads a checkpoint."""
