"""End before a text, and push single tokens up or out.

Run a server (`make serve`), then: python examples/stop_and_bias.py
"""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("VERBATIM_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = os.environ.get("VERBATIM_MODEL") or client.models.list().data[0].id


def ask(**fields):
    messages = [{"role": "user", "content": "Hello"}]
    extra = {"return_token_ids": True}
    reply = client.chat.completions.create(
        model=model, messages=messages, seed=205, max_tokens=12, extra_body=extra, **fields
    )
    return reply.choices[0]


free = ask()
print("free:   ", repr(free.message.content))

middle = len(free.message.content) // 2
stop = free.message.content[middle:][:3]
stopped = ask(stop=[stop])
print(f"stopped: {stopped.message.content!r} before {stop!r} ({stopped.finish_reason})")
assert stopped.message.content == free.message.content.split(stop)[0]

token = free.token_ids[0]
banned = ask(logit_bias={str(token): -100})
print("banned: ", repr(banned.message.content))
assert token not in banned.token_ids

forced = ask(logit_bias={str(token): 100})
print("forced: ", repr(forced.message.content))
