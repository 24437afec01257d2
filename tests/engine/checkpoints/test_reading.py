"""Checkpoints that also see: served for text with the tokens of transformers' own class, without what they see with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from engine import LLM, ChatMessage, LoadError, ModelConfig, ensure_noise_checkpoint
from engine.errors import InvalidParameter
from engine.loading.loader import load
from tests import tiny_models
from tests.engine.tokenizers_for_tests import llama_like
from tests.tiny_models import COMMON

TEXT = {**COMMON, "bos_token_id": 1}
PIXELS = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
PATCHES = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64}
IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {**ROPE, "mrope_section": [2, 3, 3]}
SEEING: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**PATCHES, "fullatt_block_indexes": [0]},
        **IDS,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        "vision_config": {**PATCHES, "deepstack_visual_indexes": [0]},
        **IDS,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "head_dim": 16},
        "vision_config": {**PIXELS, "model_type": "pixtral", "num_hidden_layers": 1},
        "image_token_index": 5,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**PIXELS, "model_type": "clip_vision_model", "num_hidden_layers": 2},
        "image_token_index": 5,
    },
    "mllama": {
        "text_config": {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": ROPE},
        "vision_config": {
            **{key: value for key, value in PIXELS.items() if key != "num_attention_heads"},
            "attention_heads": 2,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
        "image_token_index": 5,
    },
    "emu3": {
        "text_config": TEXT,
        "vq_config": {
            "codebook_size": 16,
            "embed_dim": 8,
            "latent_dim": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
        },
        "vocabulary_map": {"<image>": 5, **{f"<|visual token {i:06d}|>": 100 + i for i in range(16)}},
    },
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 16, "sliding_window": 24},
        "vision_config": {**PIXELS, "num_hidden_layers": 1},
        "image_token_index": 5,
        "mm_tokens_per_image": 4,
    },
}
SEEING |= {
    "gemma4": {
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 448,
            "num_kv_shared_layers": 0,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        "audio_config": None,
        "image_token_id": 5,
        "audio_token_id": 6,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
        **IDS,
    },
    "idefics3": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**PIXELS, "num_hidden_layers": 1},
        "image_token_id": 5,
        "scale_factor": 1,
    },
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**PIXELS, "num_hidden_layers": 1, "image_size": [28, 28], "patch_size": [14, 14]},
        "image_token_id": 5,
    },
}
FALLBACK = {"mllama"}  # layers that attend to an image only: without one they are skipped
PROMPT = "the same seed with the same request gives the same words again, alone or in a crowd. "


def _write(folder: Path, family: str, tokenizer: Callable[[], Any]) -> Path:
    settings = AutoConfig.for_model(family, **SEEING[family])
    model = AutoModelForImageTextToText.from_config(settings, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1, generator=generator)
            elif "gate" in name:
                parameter.fill_(0.5)  # cross-attention that were not skipped would show
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _noise_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ensure_noise_checkpoint())


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", SEEING)
def test_text_has_the_tokens_of_transformers_own_class(family: str, tmp_path: Path) -> None:
    """Also where positions have three axes (Qwen): a user without an image must not notice that there could be one."""
    tokenizer = llama_like if family in ("mistral3", "llava") else _noise_tokenizer
    folder = _write(tmp_path / family, family, tokenizer)
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    llm = LLM(folder)
    placeholder = llm.engine.model.tokenizer.decode([5])  # a text may spell what stands for an image
    for prompt in (PROMPT, PROMPT * 5, f"{PROMPT}{placeholder} "):
        ids, tokens = llm.engine.model.tokenizer(prompt)["input_ids"], []
        assert (5 in ids) == (placeholder in prompt)
        with torch.inference_mode():
            for _ in range(6):
                row = torch.tensor([[*ids, *tokens]])
                logits = plain(row, position_ids=torch.arange(row.shape[1])[None], use_cache=False).logits[0, -1]
                logits[list(llm.engine.model.vocabulary.invalid_ids(llm.info.vocab_size))] = -torch.inf
                tokens.append(int(logits[: llm.info.vocab_size].argmax()))
        [answer] = llm.generate(prompt, temperature=0, max_tokens=6, ignore_eos=True)
        assert list(answer.token_ids) == tokens
    assert llm.info.runner == ("fallback" if family in FALLBACK else "packed"), llm.info.law.reason
    assert llm.info.law.holds or family in FALLBACK
    served = llm.engine.model.runner._model.model  # type: ignore[attr-defined]
    assert not [name for name, _ in served.named_parameters() if "vision" in name or "visual" in name or "vq" in name]
    assert _parameters(served) < _parameters(plain)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("florence2", r"florence2 is an encoder-decoder"),
        ("diffusion_gemma", r"DiffusionGemma\w+ does not generate text token by token"),
        ("blip-2", r"Blip2\w+ does not generate text token by token"),
    ],
)
def test_a_model_that_does_not_continue_a_text_is_refused_by_its_name(
    family: str, message: str, tmp_path: Path
) -> None:
    folder = _write(tmp_path / "m", "llava", _noise_tokenizer)
    AutoConfig.for_model(family).save_pretrained(folder)
    with pytest.raises(LoadError, match=message):
        load(ModelConfig(id="m", path=folder))


def test_a_token_that_stands_for_an_image_is_refused_where_the_model_has_no_row_for_it(tmp_path: Path) -> None:
    """Gemma 3's tokenizer has one more token than the text model has rows; it must not reach the embedding."""
    folder = tmp_path / "m"
    tiny_models.write(folder, "gemma3_text", vocab_size=len(_noise_tokenizer()))
    tokenizer = _noise_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(folder)
    llm = LLM(folder, content_special_tokens="parse")
    with pytest.raises(
        InvalidParameter, match=r"messages holds '<image_soft_token>', a token that this model does not"
    ):
        llm.generate([ChatMessage("user", "look: <image_soft_token>")], max_tokens=2)
    assert llm.generate([ChatMessage("user", "look:")], max_tokens=2, seed=1)[0].usage.completion_tokens == 2
    as_text = LLM(folder).generate([ChatMessage("user", "look: <image_soft_token>")], max_tokens=2, seed=1)
    assert as_text[0].usage.completion_tokens == 2, "where content stays text, it is no such token"
