"""Receipts: the record of one reply, complete enough to compute it again. No torch, no clock, no engine."""
