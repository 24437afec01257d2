"""`POST /messages` and `POST /messages/count_tokens`: Anthropic's Messages API over the same requests and replies."""
