"""Receipts: the record of one reply, complete enough to compute it again. Pure: no torch, no clock, no engine."""
