"""Weights as whole numbers: rounded here, or by others."""
