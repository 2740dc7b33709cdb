"""Kernels of the sparse FFN in hard mode, and the plain PyTorch that they are tested against."""
