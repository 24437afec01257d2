"""What a step is on a GPU: tables of its work, the buffers that carry them, graphs of it, and one launched ahead."""
