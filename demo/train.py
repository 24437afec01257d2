"""Train the demo model from nothing and write `demo/model/`. Seeded and resumable; two CPU cores or a GPU.

    python -m demo.train                       # all of it: tokenizer, training, weights (`make demo-model`)
    python -m demo.train --steps 20 --out /tmp/try

The loss is taken on the assistant's tokens only. Matrices inside the blocks are trained with Muon, all else with AdamW.
Work in progress is kept in `.training-model` beside the folder (ignored by git), in a folder named by the sources, and
taken up again by the same command; when a source has changed, training starts anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from demo import tokenizer as tokenizing
from demo.corpus import Conversation, conversation

HERE: Final = Path(__file__).parent
STEPS: Final = 2800
CONVERSATIONS: Final = 32
"""Per step."""
TUNING: Final = 11
"""After so many steps of training one of tuning. Training shows requests that none of the tools fits; that difference is
not learnt, and what is left of it is a reluctance to call. Tuning takes it away: a request for a tool calls one. What is
written are the mean of the weights before tuning and after it: better at all else, and no worse at calling."""
TUNED: Final = ((None, 20), ("tool", 5), ("beside tools", 3))
"""What a step of tuning consists of."""
TOKENS: Final = 3072
"""Per forward pass, padding included; a step takes as many passes as it needs."""
PASS: Final = 150
"""What a forward pass costs beside its tokens, in tokens."""
LONGEST: Final = tokenizing.CONTEXT
VOCABULARY_CORPUS: Final = 12_000
SAVE_EVERY: Final = 100


@dataclass(frozen=True)
class Example:
    """Token ids of a conversation and, for each, its weight in the loss: 0 for all but the assistant's own.

    A turn of n tokens weighs the square root of n, shared by its tokens: a decision that takes one token (whether to call a
    tool, an answer in one word) would be lost beside a story.
    """

    ids: list[int]
    weights: list[float]


def config(vocabulary: int) -> Qwen3Config:
    """A Qwen3 of about five million parameters."""
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=704,
        max_position_embeddings=tokenizing.CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        use_cache=False,
        initializer_range=0.02,
        attn_implementation="sdpa",
    )


def render(tokenizer: PreTrainedTokenizerFast, drawn: Conversation, *, decision: bool = False) -> Example:
    """Tokenize with the chat template; the assistant's own tokens are what it would have to generate.

    `decision`: the first token of a turn weighs as much in a long turn as in a short one.
    """
    text = tokenizer.apply_chat_template(drawn.messages, tools=drawn.tools, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start, end, opened = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>", "<think>"))
    role = tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
    weights = [0.0] * len(ids)
    position = 0
    while position < len(ids):
        begins = ids[position] == start and ids[position + 1 : position + 1 + len(role)] == role
        position += 1 + len(role) if begins else 1
        if begins:
            if ids[position] == opened:  # the template opens the thought, and a line after it
                position += 2
            stop = ids.index(end, position) + 1
            weights[position:stop] = [(stop - position) ** -0.5] * (stop - position)
            if decision:
                weights[position] = 1.0
            position = stop
    return Example(ids, weights)


def examples(tokenizer: PreTrainedTokenizerFast, seed: int, step: int, *, tuning: bool = False) -> list[Example]:
    """The conversations of a step; depends on nothing but its arguments."""
    first = step * CONVERSATIONS
    if tuning:
        wanted = [last for last, count in TUNED for _ in range(count)]
        drawn = [
            render(tokenizer, conversation(seed, first + i, last=last, refusals=False), decision=True)
            for i, last in enumerate(wanted)
        ]
    else:
        drawn = [render(tokenizer, conversation(seed, first + i)) for i in range(CONVERSATIONS)]
    return [example for example in drawn if len(example.ids) <= LONGEST]


def batches(items: list[Example], pad: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Examples of like length together: (ids `[rows, width]`, flat indices of predictions, their targets, their weights)."""
    items = sorted(items, key=lambda item: len(item.ids))
    for begin, stop in _cuts([len(item.ids) for item in items]):
        rows = items[begin:stop]
        count = len(rows)
        width = len(rows[-1].ids)
        ids = torch.full((count, width), pad)
        weights = torch.zeros((count, width))
        for row, item in enumerate(rows):
            ids[row, : len(item.ids)] = torch.tensor(item.ids)
            weights[row, : len(item.weights)] = torch.tensor(item.weights)
        flat = weights[:, 1:].flatten()
        predicts = flat.nonzero()[:, 0]
        yield ids, predicts, ids[:, 1:].flatten()[predicts], flat[predicts]


def _cuts(lengths: list[int]) -> list[tuple[int, int]]:
    """Where to cut ascending lengths into passes so that padding and the price of a pass add up to the least."""
    best: list[tuple[int, int]] = [(0, 0)]
    for stop in range(1, len(lengths) + 1):
        begins = [b for b in range(stop) if b == stop - 1 or (stop - b) * lengths[stop - 1] <= TOKENS]
        best.append(min((best[b][0] + (stop - b) * lengths[stop - 1] + PASS, b) for b in begins))
    cuts = []
    stop = len(lengths)
    while stop:
        cuts.append((best[stop][1], stop))
        stop = best[stop][1]
    return cuts[::-1]


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by five Newton-Schulz steps (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    torch.optim.Muon computes these in bfloat16: 10 s a step on a CPU that has to emulate it, against 0.3 s in float32.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape go through the iteration together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                moved = []
                for parameter in parameters:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    moved.append(parameter.grad.lerp(momentum, group["momentum"]))
                update = _orthogonal(torch.stack(moved)) * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, change in zip(parameters, update, strict=True):
                    parameter.mul_(1 - group["lr"] * 0.02).sub_(change, alpha=group["lr"])


def _orthogonal(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values between 0.7 and 1.2. `[n, rows, columns]`."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    return [Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def rate(step: int, steps: int) -> float:
    """A short rise, then level, then down to nothing over the second half; tuning begins again at a third."""
    if step < steps:
        return min(1.0, (step + 1) / 40, 2 * (steps - step) / steps + 0.005)
    done, tuning = step - steps, steps // TUNING
    return min(0.3, (done + 1) / 100, 0.5 * (tuning - done) / tuning)


def train(out: Path, steps: int, seed: int, device: str, stop_at: int | None = None) -> float:
    """Train for `steps`, tune (or leave at `stop_at`, to be resumed) and write the model. Returns the last mean loss."""
    total = steps + steps // TUNING
    work = out.parent / f".training-{out.name}" / _sources()
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(work, seed)
    torch.manual_seed(seed)  # the engine's draws are stateless; weights are drawn by torch here
    model = Qwen3ForCausalLM(config(len(tokenizer))).to(device)
    model.train()
    optimizing = optimizers(model)
    base = [[group["lr"] for group in o.param_groups] for o in optimizing]
    state_file = work / f"state-{steps}-{seed}.pt"
    done = _resume(state_file, model, optimizing, device)
    log = (work / "log.jsonl").open("a", encoding="utf-8")
    mean = math.nan
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, log:
        task = progress.add_task("training", total=total, completed=done)
        for step in range(done, min(total, stop_at or total)):
            for o, rates in zip(optimizing, base, strict=True):
                for group, lr in zip(o.param_groups, rates, strict=True):
                    group["lr"] = lr * rate(step, steps)
            drawn = examples(tokenizer, seed, step, tuning=step >= steps)
            loss, tokens = _step(model, optimizing, list(batches(drawn, tokenizer.pad_token_id)), device)
            mean = loss if math.isnan(mean) else 0.95 * mean + 0.05 * loss
            log.write(
                json.dumps(
                    {"step": step, "loss": round(loss, 4), "tokens": tokens, "s": round(time.monotonic() - started, 1)}
                )
                + "\n"
            )
            log.flush()
            progress.update(task, advance=1, description=f"loss {mean:.4f}")
            if step + 1 == steps:
                torch.save(model.state_dict(), work / f"trained-{steps}-{seed}.pt")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 in (steps, total, stop_at):
                _save(state_file, model, optimizing, step + 1)
    if stop_at is None or stop_at >= total:
        if total > steps:
            _average(model, torch.load(work / f"trained-{steps}-{seed}.pt", map_location=device, weights_only=True))
        export(model, tokenizer, out)
    return mean


def _step(
    model: Qwen3ForCausalLM,
    optimizing: list[torch.optim.Optimizer],
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    device: str,
) -> tuple[float, int]:
    """One update from the given batches; returns (mean loss per assistant token, weighted, and tokens read)."""
    whole = sum(float(weights.sum()) for *_, weights in parts)
    total = 0.0
    for ids, predicts, targets, weights in parts:
        hidden = model.model(input_ids=ids.to(device)).last_hidden_state[:, :-1].flatten(0, 1)
        logits = model.lm_head(hidden[predicts.to(device)])
        losses = torch.nn.functional.cross_entropy(logits.float(), targets.to(device), reduction="none")
        loss = losses @ weights.to(device) / whole
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizing:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return total, sum(ids.numel() for ids, *_ in parts)


def _sources() -> str:
    """A digest of the files that decide what is trained."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.py"), tokenizing.TEMPLATE]):
        if path.name != "evaluate.py":
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _tokenizer(work: Path, seed: int) -> PreTrainedTokenizerFast:
    """The tokenizer, learned once and kept beside the training state; the chat template is always the file's."""
    kept = work / "tokenizer"
    if not (kept / "tokenizer.json").exists():
        tokenizing.train(seed, VOCABULARY_CORPUS).save_pretrained(kept)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(kept)
    tokenizer.chat_template = tokenizing.TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def _resume(file: Path, model: Qwen3ForCausalLM, optimizing: list[torch.optim.Optimizer], device: str) -> int:
    if not file.exists():
        return 0
    state = torch.load(file, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, kept in zip(optimizing, state["optimizers"], strict=True):
        optimizer.load_state_dict(kept)
    return int(state["step"])


def _save(file: Path, model: Qwen3ForCausalLM, optimizing: list[torch.optim.Optimizer], step: int) -> None:
    """Write the state beside its place and move it there: a crash leaves the old one."""
    fresh = file.with_suffix(".new")
    torch.save({"step": step, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizing]}, fresh)
    fresh.replace(file)


@torch.no_grad()
def _average(model: Qwen3ForCausalLM, other: dict[str, Tensor]) -> None:
    """Make the model's weights the mean of its own and others."""
    for name, weights in model.named_parameters():  # tied weights once
        weights.lerp_(other[name], 0.5)


def export(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write bfloat16 weights, tokenizer, template and defaults in the format of transformers."""
    out.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.config.use_cache = True
    model.config.eos_token_id, model.config.pad_token_id, model.config.bos_token_id = end, pad, None
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad, do_sample=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, default=HERE / "model", help="folder to write (default demo/model)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stop-at", type=int, help="leave after this step; the same command takes it up again")
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # for the whole process, so not in train()
    loss = train(options.out, options.steps, options.seed, options.device, options.stop_at)
    print(f"mean loss {loss:.4f}")


if __name__ == "__main__":
    main()
