"""Score texts: how likely the model finds each ending of a sentence, with /v1/completions. Nothing is generated.

Run a server (`make serve`), then: python examples/score_texts.py
"""

import os

from openai import OpenAI

client = OpenAI(base_url=os.environ.get("VERBATIM_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = os.environ.get("VERBATIM_MODEL") or client.models.list().data[0].id

CONTEXT = "Once there was a shy fox named"
ENDINGS = [" Mary", " Tom", " table"]


def scores(texts):
    """The log-probability of each text's tokens, and where each token begins."""
    reply = client.completions.create(model=model, prompt=texts, max_tokens=0, echo=True, logprobs=0)
    return [(choice.logprobs.token_logprobs, choice.logprobs.text_offset) for choice in reply.choices]


def likelihood(logprobs, offsets):
    """The sum over the tokens behind the context. The first token of all has no probability: nothing precedes it."""
    return sum(value for value, start in zip(logprobs, offsets, strict=True) if start >= len(CONTEXT))


texts = [CONTEXT + ending for ending in ENDINGS]
together = scores(texts)
for ending, (logprobs, offsets) in zip(ENDINGS, together, strict=True):
    print(f"{ending!r:10} {likelihood(logprobs, offsets):9.4f}")

alone = [scores([text])[0] for text in texts]
print("each alone has the same bits:", "yes" if alone == together else "no")
assert alone == together
