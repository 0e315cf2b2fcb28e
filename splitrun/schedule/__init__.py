"""Decide what runs next, in integers only: requests, sequences, blocks, steps. Knows no tensors."""
