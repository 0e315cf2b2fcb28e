"""Numeric kernels behind one small interface, each with a plain torch reference. Knows nothing of models."""
