"""The public face of the engine: what `server` and scripts may import. `__init__.py` reads this list."""

from engine.checkpoints.contents import (
    CheckpointFiles as CheckpointFiles,
    checkpoint_files as checkpoint_files,
)
from engine.checkpoints.noise_checkpoint import ensure_noise_checkpoint as ensure_noise_checkpoint
from engine.compute.processor import processor_name as processor_name
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
    LoadInterrupted as LoadInterrupted,
    ModelInUse as ModelInUse,
    ModelLoading as ModelLoading,
    ModelNotFound as ModelNotFound,
    NoRoom as NoRoom,
    NotEnoughMemory as NotEnoughMemory,
    NumericalFault as NumericalFault,
    OutOfMemory as OutOfMemory,
    QueueFull as QueueFull,
    QueueTimeout as QueueTimeout,
    ReceiptError as ReceiptError,
    ReplyFault as ReplyFault,
    RequestError as RequestError,
    TemplateRefused as TemplateRefused,
    Unavailable as Unavailable,
    Unsupported as Unsupported,
    VerbatimError as VerbatimError,
    trace_lines as trace_lines,
)
from engine.host_memory import (
    address_space as address_space,
    format_bytes as format_bytes,
    free_memory as free_memory,
    total_memory as total_memory,
)
from engine.llm import (
    LLM as LLM,
    Completion as Completion,
)
from engine.loading.gpu.probe import (
    Probed as Probed,
    keep_verdict as keep_verdict,
    probe_gpu as probe_gpu,
)
from engine.loading.kernel_state import (
    cpu_kernels as cpu_kernels,
    kernel_folder as kernel_folder,
)
from engine.loading.versions import (
    tried as tried,
    untried as untried,
)
from engine.receipts.check import ReceiptCheck as ReceiptCheck
from engine.receipts.difference import (
    Difference as Difference,
    pair_receipts as pair_receipts,
    receipt_differences as receipt_differences,
)
from engine.receipts.reading import (
    MOST_RECEIPT_BYTES as MOST_RECEIPT_BYTES,
    document_of as document_of,
    documents_of as documents_of,
    read_document as read_document,
    read_receipt as read_receipt,
)
from engine.receipts.receipt import (
    Receipt as Receipt,
    ServerRecord as ServerRecord,
)
from engine.receipts.recorder import (
    Recorder as Recorder,
    recorded as recorded,
    timed as timed,
)
from engine.receipts.reply import reply_difference as reply_difference
from engine.receipts.signing import (
    generate_key as generate_key,
    load_private_key as load_private_key,
    load_public_key as load_public_key,
    public_pem as public_pem,
    sign_receipt as sign_receipt,
    verify_envelope as verify_envelope,
)
from engine.receipts.verdict import (
    EXPECTED_SCORE as EXPECTED_SCORE,
    MOST_TOLERANCE as MOST_TOLERANCE,
    TOLERANCE as TOLERANCE,
    CheckReport as CheckReport,
    ChoiceReport as ChoiceReport,
    Mode as Mode,
    Verdict as Verdict,
)
from engine.serving.async_engine import AsyncEngine as AsyncEngine
from engine.serving.models.changes import Changes as Changes
from engine.serving.models.outline import (
    MemoryView as MemoryView,
    Outline as Outline,
)
from engine.serving.models.room import told_to as told_to
from engine.serving.models.status import (
    Lease as Lease,
    ModelStatus as ModelStatus,
)
from engine.serving.opening import open_engine as open_engine
from engine.serving.protocol import EngineProtocol as EngineProtocol
from engine.serving.registry import Registry as Registry
from engine.serving.request_stream import (
    JoinedStreams as JoinedStreams,
    RequestStream as RequestStream,
)
from engine.serving.waiting.fair_lock import FairLock as FairLock
from engine.types.fingerprint_parts import (
    Parts as Parts,
    fingerprint_of as fingerprint_of,
    part_differences as part_differences,
)
from engine.types.gpu import (
    DEVICE as DEVICE,
    GRAPH as GRAPH,
    GpuCheck as GpuCheck,
    GpuReport as GpuReport,
    GpuVerdict as GpuVerdict,
)
from engine.types.messages import (
    ChatMessage as ChatMessage,
    ToolCall as ToolCall,
)
from engine.types.model_info import (
    EngineStats as EngineStats,
    LoadProgress as LoadProgress,
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
from engine.types.sampling_fields import (
    SamplingField as SamplingField,
    whole_number as whole_number,
)
from engine.types.sampling_params import (
    SAMPLING_FIELDS as SAMPLING_FIELDS,
    SamplingParams as SamplingParams,
)
from engine.types.tools import (
    Tool as Tool,
    ToolChoice as ToolChoice,
)
from engine.types.versions import PROJECT_VERSION as PROJECT_VERSION
from engine.verification import check_receipt as check_receipt
