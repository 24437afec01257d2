"""From messages to token ids, with content kept apart from control tokens. No torch."""
