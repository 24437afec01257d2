"""Our own kernels for CPUs, and the modules that run on them."""
