"""The messages that cross between engine and caller: frozen, picklable, free of torch and of HTTP."""
