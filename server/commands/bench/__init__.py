"""`verbatim bench`: one table of what a model does on this machine, and what to expect of others."""
