"""`answer`: what may be asked of an engine beside the requests that it runs. The same on a thread and in a process."""

from __future__ import annotations

from typing import Any

from engine.engine import Engine
from engine.serving.transport import Verb

__all__ = ["answer"]


def answer(engine: Engine, verb: Verb, argument: Any) -> Any:
    """Call the function of that name. From any thread.

    Raises: what the function raises.
    """
    match verb:
        case "prepare":
            return engine.prepare(argument)
        case "tokenize":
            return engine.preparer.tokenize(argument)
        case "detokenize":
            return engine.preparer.detokenize(argument)
        case "tokenizer_info":
            return engine.preparer.tokenizer_info()
        case "token_text":
            return engine.model.vocabulary.token_text(argument)
