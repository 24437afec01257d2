"""Weights of a folder, packed while they are read."""
