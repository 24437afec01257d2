"""Receipts at the endpoints: recorded beside a reply, found again, and checked."""
