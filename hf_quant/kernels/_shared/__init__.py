"""What several kernels use; no kernel of its own."""
