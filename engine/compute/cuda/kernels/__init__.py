"""Triton kernels. Nothing is imported here: only a CUDA build of torch brings triton."""
