"""The page of model families: what is found out about chat templates."""

from __future__ import annotations

import inspect
from pathlib import Path

from docs.pages.markdown import NOTE, code, table
from engine import VerbatimError
from engine.replies.chat_format import find_chat_format
from engine.replies.reasoning import EFFORTS, ReasoningFormat, template_variables
from engine.templates.chat_template import ChatTemplate


def families(folder: Path) -> str:
    """What is found out about each of the chat templates in a folder."""
    rows = []
    for path in sorted(folder.glob("*.jinja"), key=lambda p: p.name.lower()):
        template = ChatTemplate(path.read_text(encoding="utf-8"), {"bos_token": "<s>", "eos_token": "</s>"})
        chat_format = find_chat_format(template)
        found = chat_format.reasoning
        rows.append(
            (
                path.stem,
                chat_format.source,
                code(chat_format.describe()),
                f"`{found.open}` … `{found.close}`" if found else "none",
                _efforts(template, found),
            )
        )
    return (
        NOTE
        + "# Model families\n\n"
        + inspect.cleandoc(
            """
            What is found out about chat templates that people run, by rendering them. Nothing here is looked up by a
            model's name; other templates are treated alike. `verbatim models check` says the same of your models.

            *Calls from*: `chat template`: read off it. `table`: the template does not write what the model writes, so a
            small table in `engine/replies/chat_format.py` says it. `generic`: the template knows no tools; they are
            explained in a system turn, and calls are expected in the form that is shown there. A response template in
            models.yaml or in the tokenizer wins over all of these. `⏎` is the end of a line.
            """
        )
        + "\n\n"
        + table(("family", "calls from", "how a call is written", "thoughts", "reasoning_effort sets"), rows)
    )


def _efforts(template: ChatTemplate, found: ReasoningFormat | None) -> str:
    """What each effort sets in a template; efforts that set the same stand together."""
    groups: dict[str, list[str]] = {}
    for effort in EFFORTS:
        try:
            variables = template_variables(template, found, effort)
        except VerbatimError:
            shown = "refused"
        else:
            shown = ", ".join(f"`{k}={v}`" for k, v in variables.items()) if variables else "nothing"
        groups.setdefault(shown, []).append(effort)
    if len(groups) == 1 and "nothing" in groups:
        return "nothing"
    return "; ".join(f"{', '.join(efforts)}: {shown}" for shown, efforts in groups.items())
