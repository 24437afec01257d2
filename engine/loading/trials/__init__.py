"""Trials at load: of attention alone, of whole runs, of a template. Each is believed only when it was tried."""
