"""Triton kernels for CUDA; imported by `normswap.functional.backend` alone, where they serve."""
