"""How models load, shown on a terminal or in a log file."""
