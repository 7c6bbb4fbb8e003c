"""Decoding on the compiled kernels of alignment.native."""
