"""The engine in a script, without a server. Run: python examples/script.py [FOLDER]

FOLDER holds a checkpoint with safetensors; without it, the tiny random model (its text is noise).
"""

import sys

from engine import LLM, ChatMessage, ensure_noise_checkpoint

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else ensure_noise_checkpoint(), max_sequences=8)
print("the law holds here:", llm.info.law.holds, f"({llm.info.law.reason})")

[answer] = llm.generate([ChatMessage("user", "Hello")], seed=205, max_tokens=12)
print("chat:     ", repr(answer.text), answer.finish_reason)

[again] = llm.generate([ChatMessage("user", "Hello")], seed=205, max_tokens=12)
assert again.token_ids == answer.token_ids
print("again:    ", repr(again.text))

prompts = ["the bits of a reply", "every parameter is", "a seed chooses"]
for prompt, [completion] in zip(prompts, llm.generate_many(prompts, seed=1, max_tokens=8), strict=True):
    print("continued:", repr(prompt), "→", repr(completion.text))

for output in llm.stream("a seed chooses", seed=1, max_tokens=8):
    print("".join(delta.text for delta in output.deltas), end="", flush=True)
print()
