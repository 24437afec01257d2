"""An experiment that can be checked: a file of requests, answers with receipts, and the verdict on each receipt.

No server is needed. Run: python examples/experiment.py [FOLDER]
FOLDER holds a checkpoint; without it, the model is the tiny random one (its text is noise).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from engine import ensure_noise_checkpoint

model = sys.argv[1] if len(sys.argv) > 1 else str(ensure_noise_checkpoint())
verbatim = [str(Path(sys.executable).with_name("verbatim"))]
folder = Path(tempfile.mkdtemp(prefix="experiment-"))
questions, answers = str(folder / "questions.jsonl"), str(folder / "answers.jsonl")

with open(questions, "w") as file:
    for seed in (1, 2, 3):
        for temperature in (0.5, 1.0):
            body = {"model": "m", "messages": [{"role": "user", "content": "Describe a harbour."}], "max_tokens": 12}
            body |= {"seed": seed, "temperature": temperature, "margins": True}
            line = {"custom_id": f"seed {seed}, temperature {temperature}", "url": "/v1/chat/completions", "body": body}
            print(json.dumps({**line, "method": "POST"}), file=file)

subprocess.run([*verbatim, "batch", questions, answers, "--model", model, "--name", "m", "--receipts"], check=True)
done = subprocess.run([*verbatim, "verify", answers, "--model", model, "--json"], stdout=subprocess.PIPE, check=True)

verdicts = [json.loads(line)["verdict"] for line in done.stdout.splitlines()]
for text, verdict in zip(Path(answers).read_text().splitlines(), verdicts, strict=True):
    answer = json.loads(text)
    [choice] = answer["response"]["body"]["receipt"]["choices"]
    print(f"{answer['custom_id']:24} {verdict:10} smallest margin {choice['stability']['smallest']:.4f}")
print(f"{verdicts.count('identical')} of {len(verdicts)} identical; to hand over: {folder}")
