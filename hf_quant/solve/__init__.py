"""Calibrated quantization of one block at a time: the choice of steps, the inputs of its layers, and their codes.

Blocks are modules from layers above; nothing here knows transformers or reads a checkpoint."""
