"""Read an answer while it is written; joined, it is the answer of the same request without `stream`.

Run a server (`make serve`), then: python examples/stream.py
"""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("VERBATIM_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = os.environ.get("VERBATIM_MODEL") or client.models.list().data[0].id
request = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "seed": 7, "max_tokens": 24}

pieces = []
for chunk in client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
    for choice in chunk.choices:
        pieces.append(choice.delta.content or "")
        print(pieces[-1], end="", flush=True)
    if chunk.usage:
        print(f"\n{chunk.usage.completion_tokens} tokens in {len(pieces)} chunks")

whole = client.chat.completions.create(**request)
assert "".join(pieces) == whole.choices[0].message.content
print("the same as without stream: yes")
