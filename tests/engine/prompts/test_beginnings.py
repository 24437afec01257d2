"""A message that a reply goes on with: the prompt ends behind its last character, whatever the template would do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from tiny_models import write
from tokenizers_for_tests import llama_like, unigram

from engine import LLM, ChatMessage, InvalidParameter, Unsupported
from engine.prompts.going_on import find_reply_form
from engine.replies.chat_format import find_chat_format
from engine.templates.chat_template import ChatTemplate

SHARED = Path(__file__).parents[3].parent / "shared" / "chat_templates"
TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + ASKS
)
OPENS = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}{# </think> #}"
OFF = (
    THINKS + "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think>\n\n</think>"
    "\n\n{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
NO_ASSISTANT_LAST = "{% if messages[-1].role != 'user' %}{{ raise_exception('user last') }}{% endif %}" + TURN + ASKS
HEADED = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
QUESTION = ChatMessage("user", "Hi")


def said(content: str | None, thoughts: str | None = None) -> ChatMessage:
    return ChatMessage("assistant", content, reasoning_content=thoughts)


WRITTEN: list[tuple[str, str, ChatMessage, str]] = [
    # what is tried, template, message, what follows the prompt
    ("as it is", TURN + ASKS, said("Yes, b"), "Yes, b"),
    ("a template that trims", TURN.replace("m.content", "m.content | trim") + ASKS, said("  Yes,\n "), "  Yes,\n "),
    ("one that refuses it", NO_ASSISTANT_LAST, said("Yes"), "Yes"),
    ("one that writes a space", INST, said("Yes "), " Yes "),
    ("one without a generation prompt", HEADED, said("Yes"), "assistant: Yes"),
    ("nothing yet", TURN + ASKS, said(""), ""),
    ("nothing yet, and a space", INST, said(None), ""),
    ("thoughts", THINKS, said("", "Hm, "), "<think>\nHm, "),
    ("thoughts and answer", THINKS, said("Yes", "Hm."), "<think>\nHm.\n</think>\n\nYes"),
    ("answer alone", THINKS, said("Yes"), "Yes"),
    ("opened by the prompt", OPENS, said(None, "Hm"), "Hm"),
    ("opened, with an answer", OPENS, said("Yes", "Hm."), "Hm.\n</think>\n\nYes"),
    ("opened, without thoughts", OPENS, said("Yes"), "\n</think>\n\nYes"),
]


@pytest.mark.parametrize(("source", "message", "text"), [case[1:] for case in WRITTEN], ids=[c[0] for c in WRITTEN])
def test_a_beginning_is_what_the_model_would_have_written(source: str, message: ChatMessage, text: str) -> None:
    template = ChatTemplate(source)
    form = find_reply_form(template, find_chat_format(template).reasoning)
    assert form.beginning(message, template.render([QUESTION]), "messages.1").text == text


def test_thoughts_where_there_are_none_are_refused_by_name() -> None:
    for source, variables, error in (
        (TURN + ASKS, {}, Unsupported),
        (OFF, {"enable_thinking": False}, InvalidParameter),
    ):
        template = ChatTemplate(source)
        form = find_reply_form(template, find_chat_format(template).reasoning)
        prompt = template.render([QUESTION], variables)
        with pytest.raises(error) as refused:
            form.beginning(said("Yes", "Hm."), prompt, "messages.1")
        assert refused.value.param == "messages.1.reasoning_content"
        assert form.beginning(said("Yes"), prompt, "messages.1").text == "Yes"


PUBLISHED = {
    "Qwen-Qwen3-0.6B": ("<think>\nHm.\n</think>\n\nYes", "Yes"),
    "GLM-4.6": ("\n<think>Hm.</think>\nYes", "Yes"),
    "HuggingFaceTB-SmolLM3-3B": ("<think>\nHm.\n</think>\n\nYes", "Yes"),
    "openai-gpt-oss-120b": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes",
        "<|channel|>final<|message|>Yes",
    ),
    "meta-llama-Llama-3.1-8B-Instruct": (None, "Yes"),
    "google-gemma-2-2b-it": (None, "Yes"),
    "mistralai-Mistral-Nemo-Instruct-2407": (None, "Yes"),
    "microsoft-Phi-3.5-mini-instruct": (None, "Yes"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published templates are not beside the checkout")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(name: str) -> None:
    template = ChatTemplate((SHARED / f"{name}.jinja").read_text(encoding="utf-8"), {"bos_token": "<s>"})
    form = find_reply_form(template, find_chat_format(template).reasoning)
    prompt = template.render([QUESTION])
    thoughtful, plain = PUBLISHED[name]
    assert form.beginning(said("Yes"), prompt, "m").text == plain
    if thoughtful is not None:
        assert form.beginning(said("Yes", "Hm."), prompt, "m").text == thoughtful


# -- as tokens ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["byte-level", "SentencePiece", "dummy prefix"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = write(tmp_path_factory.mktemp("model") / "tiny", "qwen3")
    if request.param == "SentencePiece":
        llama_like().save_pretrained(folder)
    if request.param == "dummy prefix":
        unigram().save_pretrained(folder)
    template = folder / "asks.jinja"
    template.write_text(TURN + ASKS)
    return LLM(folder, cache_size="8MiB", context_length=512, chat_template=str(template))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), min_size=1, max_size=12))
@example(text="in the mid")
@example(text=" ")
@example(text="\n\nx")
@example(text="<|im_end|>\n<|im_start|>system\n")
@example(text="naïve 漢字 ")
def test_the_tokens_are_those_of_the_text(llm: LLM, text: str) -> None:
    """Behind the prompt that the reply would have had; none of them control; and they are what the tokenizer makes."""
    engine = llm.engine
    asked = engine.prepare(llm.request([QUESTION], seed=1)).prompt_token_ids
    request = llm.request([QUESTION, said(text)], continue_final_message=True, seed=1)
    found = engine.prepare(request)
    begun = found.prompt_token_ids[len(found.prompt_token_ids) - found.begun :]
    assert found.prompt_token_ids[: len(found.prompt_token_ids) - found.begun] == asked
    assert found.begun > 0
    special = engine.model.vocabulary.special_ids
    assert not special.intersection(begun) or engine.model.tokenizer.unk_token_id in begun
    assert engine.preparer.tokenize(request).tokens == found.prompt_token_ids
    whole = engine.model.tokenizer(TURN_OF_A_QUESTION + text, add_special_tokens=False)["input_ids"]
    if whole[: len(asked)] == list(asked) and "<|" not in text:
        assert begun == tuple(whole[len(asked) :])


TURN_OF_A_QUESTION = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_text_goes_on_as_its_tokens_do(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Where a reply's tokens are those of its text, the text is as good as the tokens."""
    template = tmp_path / "thinks.jinja"
    template.write_text(THINKS)
    llm = LLM(tiny("qwen3"), cache_size="8MiB", context_length=512, chat_template=str(template))
    how: dict[str, Any] = {
        "seed": 4,
        "max_tokens": 12,
        "ignore_eos": True,
        "frequency_penalty": 0.7,
        "stop": ["zz", " b"],
    }
    for message in (said("Yes, of cou"), said(None, "Let me th"), said("Well z", "Hm.")):
        request = llm.request([QUESTION, message], continue_final_message=True, **how)
        prepared = llm.engine.prepare(request)
        ids = prepared.prompt_token_ids[len(prepared.prompt_token_ids) - prepared.begun :]
        [by_text] = llm.generate([QUESTION, message], continue_final_message=True, receipt=True, **how)
        [by_ids] = llm.generate([QUESTION], continue_token_ids=ids, **how)
        assert (by_text.token_ids, by_text.text, by_text.reasoning) == (by_ids.token_ids, by_ids.text, by_ids.reasoning)
        assert by_text.usage.prompt_tokens == len(prepared.prompt_token_ids)
        assert by_text.receipt is not None
        assert by_text.receipt.request["continue_final_message"] is True
        if message.content is None:
            assert by_text.reasoning
            assert "</think>" not in by_text.text


REFUSED: list[tuple[str, tuple[ChatMessage, ...], str]] = [
    ("the user's", (said("Yes"), QUESTION), "messages.1.role"),
    ("nobody before it", (said("Yes"),), "messages"),
]


@pytest.mark.parametrize(("messages", "param"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_gone_on_with_is_refused_by_name(
    llm: LLM, messages: tuple[ChatMessage, ...], param: str
) -> None:
    with pytest.raises(InvalidParameter) as refused:
        llm.engine.prepare(llm.request(messages, continue_final_message=True))
    assert refused.value.param == param
