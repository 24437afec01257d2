"""The public face of the engine: what `server` and scripts may import. `__init__.py` reads this list."""

from engine.checkpoints.noise_checkpoint import ensure_noise_checkpoint as ensure_noise_checkpoint
from engine.config import (
    ModelConfig as ModelConfig,
    entry_of as entry_of,
    parse_models as parse_models,
    read_yaml as read_yaml,
    validate as validate,
)
from engine.engine import Engine as Engine
from engine.errors import (
    ConfigError as ConfigError,
    ContextLengthExceeded as ContextLengthExceeded,
    EngineDead as EngineDead,
    InvalidFormat as InvalidFormat,
    InvalidParameter as InvalidParameter,
    LoadError as LoadError,
    ModelLoading as ModelLoading,
    ModelNotFound as ModelNotFound,
    NotEnoughMemory as NotEnoughMemory,
    NumericalFault as NumericalFault,
    OutOfMemory as OutOfMemory,
    QueueFull as QueueFull,
    QueueTimeout as QueueTimeout,
    ReplyFault as ReplyFault,
    RequestError as RequestError,
    TemplateRefused as TemplateRefused,
    Unavailable as Unavailable,
    Unsupported as Unsupported,
    VerbatimError as VerbatimError,
)
from engine.host_memory import address_space as address_space
from engine.llm import (
    LLM as LLM,
    Completion as Completion,
)
from engine.serving.async_engine import AsyncEngine as AsyncEngine
from engine.serving.fair_lock import FairLock as FairLock
from engine.serving.protocol import EngineProtocol as EngineProtocol
from engine.serving.registry import (
    ModelStatus as ModelStatus,
    Registry as Registry,
)
from engine.serving.request_stream import (
    JoinedStreams as JoinedStreams,
    RequestStream as RequestStream,
)
from engine.types.fingerprint_parts import (
    Parts as Parts,
    fingerprint_of as fingerprint_of,
    part_differences as part_differences,
)
from engine.types.messages import (
    ChatMessage as ChatMessage,
    ToolCall as ToolCall,
)
from engine.types.model_info import (
    EngineStats as EngineStats,
    ModelInfo as ModelInfo,
    ReproducibilityReport as ReproducibilityReport,
    TokenizerInfo as TokenizerInfo,
)
from engine.types.model_manifest import ModelManifest as ModelManifest
from engine.types.outputs import (
    ChoiceDelta as ChoiceDelta,
    FinishReason as FinishReason,
    RequestOutput as RequestOutput,
    TokenCheck as TokenCheck,
    TokenLogprob as TokenLogprob,
    TopLogprob as TopLogprob,
    Usage as Usage,
    clean_logprob as clean_logprob,
)
from engine.types.reply_format import ReplyFormat as ReplyFormat
from engine.types.requests import (
    Constraint as Constraint,
    EchoedPrompt as EchoedPrompt,
    GenerationRequest as GenerationRequest,
    PreparedRequest as PreparedRequest,
    TokenizedPrompt as TokenizedPrompt,
)
from engine.types.sampling_fields import SamplingField as SamplingField
from engine.types.sampling_params import (
    SAMPLING_FIELDS as SAMPLING_FIELDS,
    SamplingParams as SamplingParams,
)
from engine.types.tools import (
    Tool as Tool,
    ToolChoice as ToolChoice,
)
