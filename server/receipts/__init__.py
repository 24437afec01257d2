"""Receipts for people and programs: the commands that check and compare them."""
