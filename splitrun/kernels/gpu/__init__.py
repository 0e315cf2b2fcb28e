"""Kernels for GPUs, written in Triton: imported only where Triton is and a GPU can run it (`library.usable`)."""
