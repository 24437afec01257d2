"""Ask once, with the official client. Run a server (`make serve`), then: python examples/chat.py"""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("VERBATIM_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = os.environ.get("VERBATIM_MODEL") or client.models.list().data[0].id

reply = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Hello"}],
    seed=205,
    max_tokens=12,
)

print("text:", repr(reply.choices[0].message.content))
print("ended by:", reply.choices[0].finish_reason)
print("tokens:", reply.usage.prompt_tokens, "+", reply.usage.completion_tokens)
print("fingerprint:", reply.system_fingerprint)
