"""Decoder layers and their parts by compiled kernels."""
