"""A model that is loaded and ready to serve, as one value. Knows its parts; computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.compute.model_runner import Runner
from engine.config import ModelConfig
from engine.devices.gpu import DeviceStream
from engine.grammar.compiler import GrammarCompiler
from engine.replies.chat_format import ChatFormat
from engine.scheduling.scheduler import Scheduler
from engine.templates.chat_template import ChatTemplate
from engine.text.vocabulary import Vocabulary
from engine.types.model_info import ModelInfo


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Everything a model needs to serve, each part made once at load.

    Attributes:
        closing_ids: the tokens that end the model's thoughts when they grow too long.
        stream: where its work is queued, on the device where logits arrive.
        step_bytes: the most memory that a step takes beside weights and cache, by the name of each GPU.
    """

    config: ModelConfig
    info: ModelInfo
    tokenizer: Any
    vocabulary: Vocabulary
    template: ChatTemplate
    end_ids: tuple[int, ...]
    grammars: GrammarCompiler
    chat_format: ChatFormat
    closing_ids: tuple[int, ...]
    runner: Runner
    scheduler: Scheduler
    stream: DeviceStream
    step_bytes: Mapping[str, int] = field(default_factory=dict)
