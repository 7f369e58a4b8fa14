"""The words and the one value that everything else is about: schemes, quantized tensors, packing, statistics.

Nothing here reads or writes a file, knows a model, or imports another folder of this package."""
