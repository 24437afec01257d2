"""`verbatim chat`: a conversation in a terminal, with a model in this process or on a server."""
