"""Build the text side of a model: tokenizer, templates, chat format, end ids, grammars. Knows no weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from engine.checkpoints.checkpoint import Checkpoint
from engine.checkpoints.gguf_file import GGUFFile
from engine.checkpoints.json_files import read_json
from engine.checkpoints.reading import load_tokenizer
from engine.config import ModelConfig
from engine.errors import LoadError
from engine.grammar.compiler import GrammarCompiler
from engine.loading.trials import template_trial
from engine.replies import expression_trial
from engine.replies.chat_format import ChatFormat, find_chat_format
from engine.templates.chat_template import ChatTemplate
from engine.text.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class TextFiles:
    """A model's tokenizer and templates as they were read, before any template is rendered here.

    Attributes:
        template: the source of the chat template that the entry names, if it names one.
        given, shipped: the response template that the entry names, and the one that came with the tokenizer.
    """

    tokenizer: Any
    template: str | None
    given: dict[str, Any] | None
    shipped: dict[str, Any] | None

    @classmethod
    def read(cls, config: ModelConfig, folder: Path, file: GGUFFile | None) -> TextFiles:
        """Read what an entry names and what its checkpoint holds. Raises LoadError."""
        template = _read_template(config) if config.chat_template else None
        tokenizer = load_tokenizer(config, folder, file)
        given = read_json(config.response_template, config.id) if config.response_template is not None else None
        shipped = getattr(tokenizer, "response_template", None)
        return cls(tokenizer, template, given, shipped if isinstance(shipped, dict) else None)

    def start_trials(self, pool: Executor) -> list[Future[None]]:
        """Start trials of the templates in child processes; the results raise LoadError for one that fails."""
        sources = ChatTemplate.sources(self.tokenizer, self.template)
        expressions = self.given if self.given is not None else self.shipped
        return [
            pool.submit(template_trial.check, *sources, self.tokenizer.special_tokens_map),
            pool.submit(expression_trial.check, expressions),
        ]


@dataclass(frozen=True, slots=True)
class TextSide:
    """Everything that turns messages into tokens and tokens into replies, for one model.

    Attributes:
        end_ids: the tokens that end an answer.
        closing_ids: the tokens that end the model's thoughts when they grow too long.
    """

    tokenizer: Any
    vocabulary: Vocabulary
    template: ChatTemplate
    chat_format: ChatFormat
    end_ids: tuple[int, ...]
    closing_ids: tuple[int, ...]
    grammars: GrammarCompiler

    @classmethod
    def of(
        cls, config: ModelConfig, files: TextFiles, found: Checkpoint, model: nn.Module, vocab_size: int
    ) -> TextSide:
        """Build it from files whose trials have passed. Raises LoadError."""
        tokenizer, clock = files.tokenizer, config.template_clock
        vocabulary = Vocabulary.from_tokenizer(tokenizer)
        fixed = (lambda: clock) if clock else None
        template = ChatTemplate.from_tokenizer(tokenizer, source=files.template, clock=fixed)
        end_ids = _end_ids(found, model, tokenizer, vocab_size)
        chat_format = _find_chat_format(config, template, files)
        grammars = GrammarCompiler(vocabulary, vocab_size, end_ids, plain_encoder(tokenizer))
        closing = chat_format.reasoning.closing if chat_format.reasoning else None
        closing_ids = grammars.spell(closing) if closing is not None else []
        if closing_ids is None:
            closing_ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
        return cls(
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            template=template,
            chat_format=chat_format,
            end_ids=end_ids,
            closing_ids=tuple(closing_ids),
            grammars=grammars,
        )


def _read_template(config: ModelConfig) -> str:
    assert config.chat_template is not None
    try:
        return config.chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{config.id}: cannot read the chat template {config.chat_template}: {error}") from None


def _find_chat_format(config: ModelConfig, template: ChatTemplate, files: TextFiles) -> ChatFormat:
    try:
        return find_chat_format(template, given=files.given, shipped=files.shipped)
    except ValueError as error:
        raise LoadError(f"{config.id}: {config.response_template} is no response template: {error}") from None


def _end_ids(found: Checkpoint, model: nn.Module, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Collect the tokens that end an answer: of generation config, model config, tokenizer and GGUF file."""
    settings: Any = model.config
    sources = (
        getattr(getattr(model, "generation_config", None), "eos_token_id", None),
        getattr(settings, "eos_token_id", None),
        getattr(settings.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
        found.end_ids,
    )
    ids: set[int] = set()
    for source in sources:
        ids.update(source if isinstance(source, list | tuple) else [] if source is None else [source])
    odd = [i for i in ids if not isinstance(i, int)]
    if odd:
        raise LoadError(f"{found.folder}: eos_token_id must be a token's id or a list of them, not {odd[0]!r}.")
    return tuple(sorted(i for i in ids if 0 <= i < vocab_size))


def plain_encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Return a function from text to ids that reads the names of special tokens as ordinary text."""
    plain = copy.deepcopy(tokenizer.backend_tokenizer)  # a copy, because prompts need the switch off
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()

    def encode(text: str) -> list[int]:
        ids: list[int] = plain.encode(text, add_special_tokens=False).ids
        return ids

    return encode
