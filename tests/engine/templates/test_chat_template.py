"""Prompts: rendered as transformers renders them, refused in the template's own words, nothing ignored."""

from __future__ import annotations

import datetime as dt
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers_for_tests import byte_level
from transformers.utils import chat_template_utils

from engine.errors import InvalidFormat, InvalidParameter, LoadError, TemplateRefused
from engine.templates import chat_template as module
from engine.templates.chat_template import ChatTemplate, choose_template
from engine.types.messages import ChatMessage

TEMPLATES = Path(__file__).parents[3].parent / "shared" / "chat_templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
NOW = dt.datetime(2024, 2, 29, 12, 30)

SYSTEM = ChatMessage("system", "Be brief. ")
HELLO = ChatMessage("user", " Hello, <b>wörld</b> & \"you\" 'there'!\n")
ANSWER = ChatMessage("assistant", "<think>\nhm\n</think>\n\nHi 🤷🏽‍♀️.")
NAMED = ChatMessage("user", "漢字 {{ 7 * 7 }} {% raise %}", name="Ada")
CONVERSATIONS = {
    "user": [HELLO],
    "system": [SYSTEM, HELLO],
    "turns": [HELLO, ANSWER, NAMED],
    "system and turns": [SYSTEM, HELLO, ANSWER, NAMED, ANSWER, HELLO],
    "empty contents": [ChatMessage("system", ""), ChatMessage("user", "")],
    "no content": [ChatMessage("user", None)],
    "two users": [HELLO, HELLO],
    "assistant last": [HELLO, ANSWER],
    "unknown role": [ChatMessage("critic", "No."), HELLO],
    "system /no_think": [ChatMessage("system", "Be kind. /no_think"), HELLO],
    "developer": [ChatMessage("developer", "Speak French."), HELLO],
}


def clock() -> dt.datetime:
    return NOW


def source_of(family: str) -> str:
    found = sorted(TEMPLATES.glob(f"*{family}*.jinja"))
    if not found:
        pytest.skip("../shared/chat_templates is absent")
    return found[0].read_text()


def by_transformers(source: str, messages: list[ChatMessage], monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> str:
    class Pinned(dt.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return NOW

    monkeypatch.setattr(chat_template_utils, "datetime", Pinned)
    tokenizer = byte_level()
    tokenizer.add_special_tokens(SPECIAL)
    # Without the missing ones, as newer releases of transformers do by themselves.
    fields = [{"role": m.role, "content": m.content or "", "name": m.name} for m in messages]
    dicts = [{key: value for key, value in turn.items() if value is not None} for turn in fields]
    return tokenizer.apply_chat_template(
        dicts, chat_template=source, tokenize=False, add_generation_prompt=True, **kwargs
    )


ALL_TEMPLATES = sorted(path.stem for path in TEMPLATES.glob("*.jinja")) or ["absent"]


@pytest.mark.slow
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_rendered_as_transformers_renders(name: str, conversation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same prompt, character for character, or a refusal with the same words."""
    source, messages = source_of(name), CONVERSATIONS[conversation]
    template = ChatTemplate(source, SPECIAL, clock)
    if conversation == "developer" and "developer" not in source:
        messages = [ChatMessage("system", messages[0].content), *messages[1:]]
    words = None
    try:
        expected = by_transformers(source, messages, monkeypatch)
    except Exception as error:  # whatever its type: the words count
        words = str(error)
    if words is None:
        assert template.render(CONVERSATIONS[conversation]) == expected
    else:
        with pytest.raises(TemplateRefused, match=re.escape(words)) as refused:
            template.render(CONVERSATIONS[conversation])
        assert refused.value.param == "messages"


@pytest.mark.parametrize(
    ("family", "kwargs"),
    [
        ("Qwen3-0.6B", {"enable_thinking": False}),
        ("Qwen3-0.6B", {"enable_thinking": True}),
        ("GLM-4.6", {"enable_thinking": False}),
        ("SmolLM3", {"enable_thinking": False}),
        ("DeepSeek-V3.1", {"thinking": True}),
        ("granite", {"thinking": True}),
        ("gpt-oss", {"reasoning_effort": "high", "model_identity": "You are a test."}),
        ("meta-llama", {"date_string": "1 April 2030"}),
    ],
)
def test_variables_reach_the_template(family: str, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(family)
    template = ChatTemplate(source, SPECIAL, clock)
    assert kwargs.keys() <= set(template.extra_variables)
    rendered = template.render([HELLO], kwargs)
    assert rendered == by_transformers(source, [HELLO], monkeypatch, **kwargs)
    if kwargs != {"enable_thinking": True}:  # Qwen3's default
        assert rendered != template.render([HELLO])


@pytest.mark.parametrize(
    ("family", "date"),
    [
        ("gpt-oss", "2024-02-29"),
        ("granite", "February 29, 2024"),
    ],
)
def test_the_clock_can_be_pinned(family: str, date: str) -> None:
    """A prompt that holds today's date is the same tomorrow."""
    source = source_of(family)
    assert date in ChatTemplate(source, SPECIAL, clock).render([HELLO])
    assert date not in ChatTemplate(source, SPECIAL).render([HELLO])


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("Qwen3-0.6B", ("enable_thinking",)),
        ("SmolLM3", ("enable_thinking",)),
        ("gpt-oss", ("builtin_tools", "model_identity", "reasoning_effort")),
        ("gemma-2", ()),  # it sets `role` itself, in every branch
    ],
)
def test_what_a_template_reads(family: str, names: tuple[str, ...]) -> None:
    """Exactly what a caller may set: a name that the template always sets first would be accepted and ignored."""
    template = ChatTemplate(source_of(family), SPECIAL)
    assert template.extra_variables == names
    assert {"messages", "add_generation_prompt"} <= template.variables


@pytest.mark.parametrize(
    ("source", "read"),
    [
        ("{{ a }}{% set a = 1 %}", True),
        ("{% set a = a or 1 %}{{ a }}", True),
        ("{% if x %}{% set a = 1 %}{% else %}{% set a = 2 %}{% endif %}{{ a }}", False),
        ("{% if x %}{% set a = 1 %}{% endif %}{% if a is defined %}{{ a }}{% endif %}", True),
        ("{% if x %}{% set a = 1 %}{% endif %}{{ a | default('b') }}", True),
        ("{% for a in messages %}{{ a }}{% endfor %}", False),
        ("{% macro f(a) %}{{ a }}{% endmacro %}{{ f(1) }}", False),
    ],
)
def test_read_before_set(source: str, read: bool) -> None:
    assert ("a" in ChatTemplate(source).variables) is read


def test_gemma_2_refuses_a_system_role_in_its_own_words() -> None:
    with pytest.raises(TemplateRefused, match="System role not supported"):
        ChatTemplate(source_of("gemma-2"), SPECIAL).render([SYSTEM, HELLO])


def test_developer_becomes_system_unless_the_template_knows_developers() -> None:
    roles = "{% for m in messages %}{{ m.role }} {% endfor %}"
    messages = [ChatMessage("developer", "x"), HELLO]
    assert ChatTemplate(roles).render(messages) == "system user "
    assert ChatTemplate(roles + "{# developer #}").render(messages) == "developer user "


def test_messages_are_data() -> None:
    """Jinja inside a message is text; names arrive; a name that is None is no key at all, a content an empty text."""
    source = "{% for m in messages %}{{ m.content }}|{{ m.name }}|{{ m | tojson }};{% endfor %}"
    rendered = ChatTemplate(source).render([ChatMessage("user", "{{ 7*7 }}<é>", "Ada"), ChatMessage("user", None)])
    first = '{{ 7*7 }}<é>|Ada|{"role": "user", "content": "{{ 7*7 }}<é>", "name": "Ada"};'
    assert rendered == first + '||{"role": "user", "content": ""};'


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate."),
        ("{{ messages[0].missing.deeper }}", "has no attribute 'missing'"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ messages[9].content }}", "list object has no element 9"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(__init__=1) }}", "underscored"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "underscored"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ dict.mro() }}", "has no attribute 'mro'"),
    ],
)
def test_whatever_a_template_raises_is_a_refusal(source: str, words: str) -> None:
    with pytest.raises(TemplateRefused, match=words) as refused:
        ChatTemplate(source).render([HELLO])
    assert refused.value.param == "messages"


def test_a_prompt_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PROMPT_CHARACTERS", 1000)
    source = "{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(TemplateRefused, match="1000 characters"):
        ChatTemplate(source).render([HELLO])


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "pad_token",
        "image",
    ],
)
def test_reserved_variables_are_refused_by_name(name: str) -> None:
    """Also those that this template reads: they are the server's to set."""
    template = ChatTemplate("{{ messages }}{{ tools }}{{ bos_token }}{{ image }}", {"image": "<image>"})
    with pytest.raises(InvalidParameter, match=f"{name} is set by the server") as refused:
        template.render([HELLO], {name: "x"})
    assert refused.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("enable_thinkin", "Did you mean 'enable_thinking'"),
        ("zzz", "It reads: enable_thinking, style"),
        ("self", "no variable 'self'"),
        ("raise_exception", "no variable"),
        ("namespace", "no variable"),
        ("inner", "no variable"),
    ],
)
def test_unknown_variables_are_refused_by_name(name: str, words: str) -> None:
    source = "{% set inner = namespace(x=1) %}{{ enable_thinking }}{{ style }}{{ inner.x }}{{ messages }}"
    with pytest.raises(InvalidParameter, match=words) as refused:
        ChatTemplate(source).render([HELLO], {name: True})
    assert refused.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize("name", ["again", "variables", "self_"])
def test_a_variable_may_have_any_other_name(name: str) -> None:
    assert ChatTemplate(f"{{{{ {name} }}}}{{{{ messages[0].role }}}}").render([HELLO], {name: "x"}) == "xuser"


def test_a_template_that_reads_nothing_says_so() -> None:
    with pytest.raises(InvalidParameter, match="none beside the messages"):
        ChatTemplate("{{ messages }}").render([HELLO], {"thinking": True})


def test_no_template_says_what_to_do() -> None:
    template = ChatTemplate(None)
    assert template.variables == frozenset()
    with pytest.raises(TemplateRefused, match=r"set chat_template in models\.yaml"):
        template.render([HELLO])


def test_no_messages() -> None:
    with pytest.raises(InvalidFormat, match="at least one"):
        ChatTemplate("{{ messages }}").render([])


def test_a_broken_template_is_found_when_it_is_loaded() -> None:
    with pytest.raises(LoadError, match="line 2"):
        ChatTemplate("{{ messages }}\n{% if %}")


def test_todays_date_is_the_pinned_one() -> None:
    """As Llama 3.1 and SmolLM3 print it, where the template at hand may not."""
    source = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    assert ChatTemplate(source, clock=clock).render([HELLO]) == "29 Feb 2024"
    before = dt.datetime.now()
    assert ChatTemplate(source).render([HELLO]) in {t.strftime("%d %b %Y") for t in (before, dt.datetime.now())}


def test_extensions_as_in_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block trimming, loop controls, the generation mark (whose names stay inside), tojson's options."""
    source = """\
{% set word = 'outside' %}
  {% for m in messages %}
    {% generation %}{% set word = 'inside' %}{{ m.content }}{% endgeneration %}
    {% if loop.index == 2 %}{% break %}{% endif %}
    {{ {'b': 'é<', 'a': 1} | tojson(indent=2, sort_keys=true) }}{{ word }}
  {% endfor %}
{{ dict(a=1) }}{{ dict.fromkeys([1]) }}{{ strftime_now('%d %b %Y') }}{{ namespace({'a': 2}).a }}
"""
    messages = [HELLO, ANSWER, NAMED]
    rendered = ChatTemplate(source, SPECIAL, clock).render(messages)
    assert rendered == by_transformers(source, messages, monkeypatch)
    assert "29 Feb 2024" in rendered


def test_choose_template() -> None:
    named = {"default": "D", "tool_use": "T"}
    assert choose_template("S") == "S"
    assert choose_template(None) is None
    assert choose_template(named) == "D"
    assert choose_template(named, "tool_use") == "T"
    assert choose_template({"default": "D"}, "tool_use") == "D"
    with pytest.raises(LoadError, match="rag, tool_use"):
        choose_template({"tool_use": "T", "rag": "R"})


def test_from_tokenizer() -> None:
    """The tokenizer's template and special tokens, or the configured template in its place."""
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": "{{ eos_token }}{{ messages[0].content }}", "tool_use": ""}
    assert ChatTemplate.from_tokenizer(tokenizer).render([ChatMessage("user", "x")]) == "<|im_end|>x"
    assert ChatTemplate.from_tokenizer(tokenizer, source="y{{ eos_token }}").render([HELLO]) == "y<|im_end|>"
    tokenizer.chat_template = None
    assert ChatTemplate.from_tokenizer(tokenizer).source is None
