"""Get a reply with its receipt over HTTP, check it with the model here, then change one token: the check finds it.

Run a server (`make serve`), then: python examples/prove_a_reply.py [FOLDER]
FOLDER holds the checkpoint that is served; without it, the model is one of our own, `demo` or `noise`.
"""

import os
import struct
import sys
from dataclasses import replace
from hashlib import sha256

from openai import OpenAI

from engine import LLM, ModelConfig, check_receipt, read_document

client = OpenAI(base_url=os.environ.get("VERBATIM_URL", "http://127.0.0.1:8000/v1"), api_key="none")
model = os.environ.get("VERBATIM_MODEL") or client.models.list().data[0].id
reply = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Hello"}], seed=205, max_tokens=12, extra_body={"receipt": True}
)
receipt = read_document(reply.receipt)  # this JSON object is all that has to be kept
print("reply:", repr(reply.choices[0].message.content))
print("receipt of", receipt.id, "by", receipt.environment.fingerprint)

own = len(sys.argv) == 1
llm = LLM.from_config(ModelConfig(id=model, builtin=model)) if own else LLM(sys.argv[1])
honest = check_receipt(llm, receipt)
print(f"as it is: {honest.verdict}: {honest.sentence}")

[choice] = receipt.choices
ids = list(choice.token_ids)
ids[len(ids) // 2] ^= 1
changed = replace(choice, token_ids=tuple(ids), sha256=sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest())
forged = check_receipt(llm, replace(receipt, choices=(changed,)))
print(f"with another token: {forged.verdict}: {forged.sentence}")
assert (honest.verdict, forged.verdict) == ("identical", "refuted")
