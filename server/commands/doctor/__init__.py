"""`verbatim doctor`: what of this machine and this configuration is well, what is not, and the cure."""
