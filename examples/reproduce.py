"""Ask without a seed, then replay the reply with the seed that came back, while others keep the server busy.

Run a server (`make serve`), then: python examples/reproduce.py
"""

import os
from concurrent.futures import ThreadPoolExecutor

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("VERBATIM_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = os.environ.get("VERBATIM_MODEL") or client.models.list().data[0].id


def ask(text, **fields):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=model, messages=messages, max_tokens=32, logprobs=True, **fields)


def bits(reply):
    return [(entry.token, entry.logprob) for entry in reply.choices[0].logprobs.content]


first = ask("Tell me a story")
print(f"keep these: seed {first.seed}, fingerprint {first.system_fingerprint}")

with ThreadPoolExecutor(12) as pool:
    neighbours = [pool.submit(ask, "something else " * i, temperature=1.5) for i in range(1, 9)]
    replays = [pool.submit(ask, "Tell me a story", seed=first.seed) for _ in range(4)]
    same = [bits(replay.result()) == bits(first) for replay in replays]
    for neighbour in neighbours:
        neighbour.result()

print(f"{sum(same)} of {len(same)} replays have the same tokens and the same log-probabilities, to the last bit")
assert all(same)
