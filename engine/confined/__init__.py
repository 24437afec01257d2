"""Run our own functions on untrusted input in a child process with limits."""
