"""Three choices with log-probabilities. The bytes of all entries of a choice, joined, are its text.

Run a server (`make serve`), then: python examples/choices_and_logprobs.py
"""

import math
import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("VERBATIM_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = os.environ.get("VERBATIM_MODEL") or client.models.list().data[0].id

reply = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Hello"}],
    seed=7,
    n=3,
    max_tokens=12,
    logprobs=True,
    top_logprobs=2,
)

for choice in reply.choices:
    entries = choice.logprobs.content
    joined = b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace")
    assert joined == choice.message.content
    total = sum(entry.logprob for entry in entries)
    print(f"choice {choice.index}: {choice.message.content!r}")
    print(f"  {len(entries)} tokens, log-probability {total:.2f}; the bytes join to the text")
    first = entries[0]
    rivals = ", ".join(f"{rival.token!r} {math.exp(rival.logprob):.1%}" for rival in first.top_logprobs)
    print(f"  first token {first.token!r} {math.exp(first.logprob):.1%}; the likeliest were {rivals}")
