"""Functions of ours on untrusted input, in a child process with limits."""
