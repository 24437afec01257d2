"""Two ways to run one checkpoint, behind one face: this engine, and plain transformers. Timed from inside.

Each lives in a process of its own (worker.py), so that neither sees the other's memory or kernel settings: the engine
sets `MKL_CBWR` for its law, which must not slow its peer down. torch and transformers are imported when one is made.
"""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from benchmarks.common import rss_bytes

Answer = dict[str, Any]


class Contestant(Protocol):
    """What can be asked of either. Times are seconds of `time.perf_counter`."""

    def load(self) -> Answer:
        """Read the checkpoint until it could serve: `seconds`; `imports_rss`: resident bytes before."""

    def prefill(self, prompt: list[int]) -> Answer:
        """A prompt up to its first token: `seconds`, `ids` (that token)."""

    def decode(self, prompts: list[list[int]], steps: int, sampling: dict[str, Any]) -> Answer:
        """Decode all prompts together: `seconds` of `steps` steps after everyone's first token, `ids` of each."""


class Ours:
    """This engine: `Engine`, driven step by step in this thread, with the settings that a server would use."""

    def __init__(self, model: Path, threads: int, device: str = "cpu") -> None:
        import engine.engine  # noqa: F401  with torch and transformers

        self._path, self._threads, self._device = model, threads, device
        self._numbers = itertools.count()

    def load_idle(self, quantization: str | None = None) -> Answer:
        """Load another copy in a thread of its own, as a server does; it answers one prompt, then does nothing."""
        done = threading.Event()

        def live() -> None:
            other = Ours(self._path, self._threads, self._device)
            other.load(quantization)
            other.prefill([1, 2, 3])
            done.set()
            threading.Event().wait()

        threading.Thread(target=live, daemon=True).start()
        if not done.wait(300):
            raise RuntimeError("the idle model was not loaded within 300 seconds")
        return {}

    def load(self, quantization: str | None = None) -> Answer:
        from engine.config import ModelConfig
        from engine.engine import Engine
        from engine.loading.loader import load

        start, rss = time.perf_counter(), rss_bytes()
        trained = _trained_length(self._path)
        config = ModelConfig(
            id=self._path.name,
            path=self._path,
            device=self._device,
            threads=self._threads,
            context_length=min(trained, 4096),
            quantization=quantization,
        )
        model = load(config)
        self._engine = Engine(model)
        info = model.info
        return {
            "seconds": time.perf_counter() - start,
            "imports_rss": rss,
            "runner": info.runner,
            "law_holds": info.law.holds,
            "gpu": info.gpu.describe() if info.gpu else "",
            "fingerprint": info.system_fingerprint,
        }

    def prefill(self, prompt: list[int]) -> Answer:
        start = time.perf_counter()
        name = self._add(prompt, 1, {"temperature": 0.0})
        ids = self._until_finished(name)
        return {"seconds": time.perf_counter() - start, "ids": ids}

    def decode(self, prompts: list[list[int]], steps: int, sampling: dict[str, Any]) -> Answer:
        # Long prompts take several steps, in which the first sequences decode already: room for those tokens, too.
        room = steps + 1 + sum(map(len, prompts))
        ids: dict[str, list[int]] = {self._add(p, room, {"temperature": 0.0, **sampling}): [] for p in prompts}
        while not all(ids.values()):
            self._step(ids)
        start = time.perf_counter()
        for _ in range(steps):
            self._step(ids)
        seconds = time.perf_counter() - start
        for name in ids:
            self._engine.abort(name)
        return {"seconds": seconds, "ids": [tokens[: steps + 1] for tokens in ids.values()]}

    def _add(self, prompt: list[int], max_tokens: int, sampling: dict[str, Any]) -> str:
        from engine.types.requests import PreparedRequest
        from engine.types.sampling_params import SamplingParams

        name = f"bench-{next(self._numbers)}"
        params = SamplingParams(**{"seed": 1, "ignore_eos": True, **sampling, "max_tokens": max_tokens})
        self._engine.add(PreparedRequest(request_id=name, prompt_token_ids=tuple(prompt), params=params))
        return name

    def _step(self, ids: dict[str, list[int]]) -> None:
        for output in self._engine.step():
            if output.error:
                raise output.error
            for delta in output.deltas:
                ids[output.request_id] += delta.token_ids

    def _until_finished(self, name: str) -> list[int]:
        ids: dict[str, list[int]] = {name: []}
        while self._engine.has_work:
            self._step(ids)
        return ids[name]


def _trained_length(path: Path) -> int:
    """Return the longest context that a checkpoint names; 4096 if it names none."""
    from engine.checkpoints import checkpoint, gguf_file

    if path.is_dir():
        return int(checkpoint.inspect(path, path.name).config.get("max_position_embeddings") or 4096)
    header = gguf_file.open_file(path, path.name)
    return int(header.metadata.get(f"{header.architecture}.context_length") or 4096)


class Transformers:
    """Plain transformers: `from_pretrained`, its own cache, its own `generate`.

    On a CPU in float32 with eager attention; on a GPU in the checkpoint's dtype, with the attention it picks itself.
    """

    def __init__(self, model: Path, threads: int, device: str = "cpu") -> None:
        import torch
        import transformers  # noqa: F401

        torch.set_num_threads(threads)
        self._path, self._device = model, device

    def load(self) -> Answer:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        start, rss = time.perf_counter(), rss_bytes()
        how = {"dtype": torch.float32, "attn_implementation": "eager"} if self._device == "cpu" else {"dtype": "auto"}
        model: Any = AutoModelForCausalLM.from_pretrained(
            self._path, use_safetensors=True, local_files_only=True, **how
        )
        model.eval().requires_grad_(False).to(self._device)
        # No end token: every run decodes exactly as many tokens as it was asked for.
        model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
        self._model = model
        return {
            "seconds": time.perf_counter() - start,
            "imports_rss": rss,
        }

    def prefill(self, prompt: list[int]) -> Answer:
        """The forward pass that `generate` begins with: cache kept, logits of the last row only."""
        import torch

        tokens = torch.tensor([prompt], device=self._device)
        start = time.perf_counter()
        with torch.inference_mode():
            output = self._model(tokens, use_cache=True, logits_to_keep=1)
            first = int(output.logits[0, -1].argmax())
        return {"seconds": time.perf_counter() - start, "ids": [first]}

    def decode(self, prompts: list[list[int]], steps: int, sampling: dict[str, Any]) -> Answer:
        """`generate`; prompts of equal length, so that nothing is padded. The clock runs from token to token."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        stamps: list[float] = []

        class Clock(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                if input_ids.is_cuda:
                    torch.cuda.synchronize()
                stamps.append(time.perf_counter())  # called once after every token
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        tokens = torch.tensor(prompts, device=self._device)
        with torch.inference_mode():
            output = self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=steps + 1,
                stopping_criteria=StoppingCriteriaList([Clock()]),
                **sampling,
            )
        assert len(stamps) == steps + 1, "generate ended early"
        return {"seconds": stamps[-1] - stamps[0], "ids": output[:, tokens.shape[1] :].tolist()}


CONTESTANTS = {"verbatim": Ours, "transformers": Transformers}
