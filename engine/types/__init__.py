"""The data that crosses between engine and caller: frozen, picklable, free of torch and of HTTP."""
