"""verbatim's engine: tokens in, tokens out, every bit of them reproducible. Knows nothing of HTTP, keys or money.

This module is the public face. Names are imported when they are first used, so that `import engine` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine, RequestStream
    from engine.checkpoint import address_space
    from engine.config import ModelConfig, entry_of, parse_models, read_yaml, validate
    from engine.errors import (
        ConfigError,
        ContextLengthExceeded,
        EngineDead,
        InvalidFormat,
        InvalidParameter,
        LoadError,
        ModelLoading,
        ModelNotFound,
        NotEnoughMemory,
        NumericalFault,
        OutOfMemory,
        QueueFull,
        QueueTimeout,
        ReplyFault,
        RequestError,
        TemplateRefused,
        Unavailable,
        Unsupported,
        VerbatimError,
    )
    from engine.llm import LLM, Completion
    from engine.registry import ModelStatus, Registry
    from engine.standin import ensure_standin
    from engine.turns import Turns
    from engine.types import (
        ChatMessage,
        ChoiceDelta,
        Constraint,
        EngineStats,
        FinishReason,
        GenerationRequest,
        LawReport,
        ModelInfo,
        PreparedRequest,
        RequestOutput,
        SamplingParams,
        TokenLogprob,
        ToolCall,
        TopLogprob,
        Usage,
        clean_logprob,
    )

__all__ = [
    "LLM",
    "AsyncEngine",
    "ChatMessage",
    "ChoiceDelta",
    "Completion",
    "ConfigError",
    "Constraint",
    "ContextLengthExceeded",
    "EngineDead",
    "EngineStats",
    "FinishReason",
    "GenerationRequest",
    "InvalidFormat",
    "InvalidParameter",
    "LawReport",
    "LoadError",
    "ModelConfig",
    "ModelInfo",
    "ModelLoading",
    "ModelNotFound",
    "ModelStatus",
    "NotEnoughMemory",
    "NumericalFault",
    "OutOfMemory",
    "PreparedRequest",
    "QueueFull",
    "QueueTimeout",
    "Registry",
    "ReplyFault",
    "RequestError",
    "RequestOutput",
    "RequestStream",
    "SamplingParams",
    "TemplateRefused",
    "TokenLogprob",
    "ToolCall",
    "TopLogprob",
    "Turns",
    "Unavailable",
    "Unsupported",
    "Usage",
    "VerbatimError",
    "address_space",
    "clean_logprob",
    "ensure_standin",
    "entry_of",
    "parse_models",
    "read_yaml",
    "validate",
]

_HOME = {
    "engine.async_engine": ("AsyncEngine", "RequestStream"),
    "engine.checkpoint": ("address_space",),
    "engine.config": ("ModelConfig", "entry_of", "parse_models", "read_yaml", "validate"),
    "engine.errors": (
        "ConfigError",
        "ContextLengthExceeded",
        "EngineDead",
        "InvalidFormat",
        "InvalidParameter",
        "LoadError",
        "ModelLoading",
        "ModelNotFound",
        "NotEnoughMemory",
        "NumericalFault",
        "ReplyFault",
        "OutOfMemory",
        "QueueFull",
        "QueueTimeout",
        "RequestError",
        "TemplateRefused",
        "Unavailable",
        "Unsupported",
        "VerbatimError",
    ),
    "engine.llm": ("LLM", "Completion"),
    "engine.registry": ("ModelStatus", "Registry"),
    "engine.standin": ("ensure_standin",),
    "engine.turns": ("Turns",),
    "engine.types": (
        "ChatMessage",
        "ChoiceDelta",
        "Constraint",
        "EngineStats",
        "FinishReason",
        "GenerationRequest",
        "LawReport",
        "ModelInfo",
        "PreparedRequest",
        "RequestOutput",
        "SamplingParams",
        "TokenLogprob",
        "ToolCall",
        "TopLogprob",
        "Usage",
        "clean_logprob",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
