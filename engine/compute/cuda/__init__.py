"""Computation on NVIDIA GPUs: a plan of each step in tables, kernels that treat every row by itself, and graphs."""
