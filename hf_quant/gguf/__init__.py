"""GGUF, the files of llama.cpp: block types as data, a reader for files of strangers, and names of tensors.

The layout of a file is in ``docs/gguf.md`` of ggml, that of the blocks in ``ggml-common.h`` and ``gguf/quants.py`` of llama.cpp.
"""
