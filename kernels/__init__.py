"""Triton kernels, installed as `dino_fast.kernels`: one file an operation."""
