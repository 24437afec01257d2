"""Turns messages into token ids, and keeps their content from becoming control tokens. No torch."""
