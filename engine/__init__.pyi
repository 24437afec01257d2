"""The public face of the engine: what `server` and scripts may import. `__init__.py` reads this list."""

from engine.checkpoints.noise_checkpoint import ensure_noise_checkpoint as ensure_noise_checkpoint
from engine.config import (
    ModelConfig as ModelConfig,
)
from engine.config import (
    entry_of as entry_of,
)
from engine.config import (
    parse_models as parse_models,
)
from engine.config import (
    read_yaml as read_yaml,
)
from engine.config import (
    validate as validate,
)
from engine.engine import Engine as Engine
from engine.errors import (
    ConfigError as ConfigError,
)
from engine.errors import (
    ContextLengthExceeded as ContextLengthExceeded,
)
from engine.errors import (
    EngineDead as EngineDead,
)
from engine.errors import (
    InvalidFormat as InvalidFormat,
)
from engine.errors import (
    InvalidParameter as InvalidParameter,
)
from engine.errors import (
    LoadError as LoadError,
)
from engine.errors import (
    ModelLoading as ModelLoading,
)
from engine.errors import (
    ModelNotFound as ModelNotFound,
)
from engine.errors import (
    NotEnoughMemory as NotEnoughMemory,
)
from engine.errors import (
    NumericalFault as NumericalFault,
)
from engine.errors import (
    OutOfMemory as OutOfMemory,
)
from engine.errors import (
    QueueFull as QueueFull,
)
from engine.errors import (
    QueueTimeout as QueueTimeout,
)
from engine.errors import (
    ReplyFault as ReplyFault,
)
from engine.errors import (
    RequestError as RequestError,
)
from engine.errors import (
    TemplateRefused as TemplateRefused,
)
from engine.errors import (
    Unavailable as Unavailable,
)
from engine.errors import (
    Unsupported as Unsupported,
)
from engine.errors import (
    VerbatimError as VerbatimError,
)
from engine.host_memory import address_space as address_space
from engine.llm import (
    LLM as LLM,
)
from engine.llm import (
    Completion as Completion,
)
from engine.serving.async_engine import AsyncEngine as AsyncEngine
from engine.serving.fair_lock import FairLock as FairLock
from engine.serving.protocol import EngineProtocol as EngineProtocol
from engine.serving.registry import (
    ModelStatus as ModelStatus,
)
from engine.serving.registry import (
    Registry as Registry,
)
from engine.serving.request_stream import RequestStream as RequestStream
from engine.types.messages import (
    ChatMessage as ChatMessage,
)
from engine.types.messages import (
    ToolCall as ToolCall,
)
from engine.types.model_info import (
    EngineStats as EngineStats,
)
from engine.types.model_info import (
    ModelInfo as ModelInfo,
)
from engine.types.model_info import (
    ReproducibilityReport as ReproducibilityReport,
)
from engine.types.outputs import (
    ChoiceDelta as ChoiceDelta,
)
from engine.types.outputs import (
    FinishReason as FinishReason,
)
from engine.types.outputs import (
    RequestOutput as RequestOutput,
)
from engine.types.outputs import (
    TokenLogprob as TokenLogprob,
)
from engine.types.outputs import (
    TopLogprob as TopLogprob,
)
from engine.types.outputs import (
    Usage as Usage,
)
from engine.types.outputs import (
    clean_logprob as clean_logprob,
)
from engine.types.reply_format import ReplyFormat as ReplyFormat
from engine.types.requests import (
    Constraint as Constraint,
)
from engine.types.requests import (
    GenerationRequest as GenerationRequest,
)
from engine.types.requests import (
    PreparedRequest as PreparedRequest,
)
from engine.types.sampling_fields import SamplingField as SamplingField
from engine.types.sampling_params import (
    SAMPLING_FIELDS as SAMPLING_FIELDS,
)
from engine.types.sampling_params import (
    SamplingParams as SamplingParams,
)
from engine.types.tools import (
    Tool as Tool,
)
from engine.types.tools import (
    ToolChoice as ToolChoice,
)
