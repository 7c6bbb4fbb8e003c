"""Kernels in C++ for CPUs, compiled on first use for the processor they run on."""
