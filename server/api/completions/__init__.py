"""`POST /completions`: text that is continued, without a chat template."""
