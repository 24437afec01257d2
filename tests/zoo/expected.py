"""What the zoo expects: which architectures are popular, which are refused and why, which cannot be built at all."""

from __future__ import annotations

POPULAR: frozenset[str] = frozenset(
    "llama mistral mixtral qwen2 qwen3 qwen2_moe qwen3_moe qwen3_next qwen3_5 gemma gemma2 gemma3 gemma3_text "
    "gemma3n_text gemma4 phi phi3 phi3-longrope llama-dynamic llama-yarn granite granitemoehybrid olmo2 olmo3 olmoe "
    "deepseek_v2 deepseek_v3 glm4 glm4_moe gpt_oss llama4_text llama4-tempered falcon falcon_h1 bloom mpt gpt2 "
    "gpt_neox opt stablelm nemotron nemotron_h lfm2 jamba bamba mamba mamba2 rwkv recurrent_gemma smollm3 cohere2 "
    "minimax minimax_m2 apertus".split()
)
"""Examined in every run of the suite; the others are a sweep of their own."""

LAWFUL: tuple[str, ...] = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2"),
    *("gpt_oss", "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe", "llama4_text"),
    "minimax_m2",
)
"""Popular ones that must be packed and lawful, with compiled kernels."""

ANYWHERE: tuple[str, ...] = ("qwen3", "gemma3_text", "phi3", "gpt_oss")
"""Those of them that are tried without a compiler, too."""

NOT_BUILT: dict[str, str] = {
    "gemma3n": "TimmWrapperModel",  # its vision tower is another package's
    "musicgen": "has no attribute",  # no text comes of it; transformers' own causal mapping cannot build it
    "musicgen_melody": "has no attribute",
    "gemma4_assistant": "layer types producing a cache",  # transformers 5.23
    "gemma4_unified_assistant": "layer types producing a cache",
}
"""Architectures that transformers cannot build here, and a word of what it says."""

_NO_CACHE = r"takes no cache|returns no cache"
_ALONE = r"each sequence alone (fails|differs from plain transformers)"

REFUSED: dict[str, str] = {
    # Nothing is kept from one token to the next, or not where a cache is looked for.
    "bert-encoder": _NO_CACHE,
    "openai-gpt": _NO_CACHE,
    "recurrent_gemma": _NO_CACHE,
    "reformer": _NO_CACHE,
    "xlm": _NO_CACHE,
    # transformers' own generation with a cache is not what it computes without one.
    "cpmant": _ALONE,  # it puts tokens of its own before every prompt
    "dory": _ALONE,
    "hrm_text": _ALONE,
    "prophetnet": _ALONE,
    "blt": _ALONE,  # bytes in patches
    # Not a causal language model by itself.
    "gemma4_assistant": "shared_kv_states",  # drafts for another model
    "gemma4_unified_assistant": "shared_kv_states",
    "xlnet": r"context_length|cannot be served",
}
"""Architectures that are refused, and what the refusal says: a newly refused one is noticed."""

HEARD: tuple[str, ...] = ()
"""Beginnings of Python warnings that other libraries may give, each with its reason."""
