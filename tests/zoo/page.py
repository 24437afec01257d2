"""The page of results: `docs/reference/architectures.md`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence

import transformers
from zoo.examine import Finding
from zoo.overrides import ENCODERS, OTHER, VARIANTS

_HEAD = """# Architectures

Written by `make zoo`: every architecture that transformers {version} calls a causal language model, as a tiny model
with random weights, loaded and asked as a user would. *Right*: the tokens after a short prompt and after one of 600
tokens are those of transformers, computed without any cache. *Law*: the bits are the same alone, in a crowd, in small
chunks and from a warm cache; "claimed" is what the server says after its self-test, "found" what was found here.
Architectures that are no decoders of text (encoders that can be one, models of images and sound) and variants of those
above are counted apart. The table was made on a processor with AVX-512. With AVX2 alone, torch's products of one to
three rows have other bits: there mixtures of experts keep the law by our compiled kernels, which multiply with routers
and experts (torch still computes DBRX's experts and LongCat-Flash's router; their law is neither kept nor claimed).
Without a C compiler none does.

"""


_COUNTS: dict[str, Callable[[Finding], bool]] = {
    "architectures": lambda f: True,
    "loaded": lambda f: f.served,
    "packed": lambda f: f.served and f.runner == "packed",
    "fallback": lambda f: f.served and f.runner == "fallback",
    "refused with a reason": lambda f: f.status == "refused",
    "transformers cannot build it": lambda f: f.status == "not built",
    "crashed": lambda f: f.status == "crashed",
    "right": lambda f: f.right,
    "**loaded and wrong**": lambda f: f.served and not f.right,
    "law claimed": lambda f: f.served and f.claimed,
    "law found": lambda f: f.lawful,
    "**law claimed, not found**": lambda f: f.served and f.claimed and not f.lawful,
}
_GROUPS: dict[str, Callable[[str], bool]] = {
    "decoders of text": lambda name: name not in ENCODERS | OTHER | set(VARIANTS),
    "others": lambda name: name in ENCODERS | OTHER,
    "variants": lambda name: name in VARIANTS,
}


def page(findings: Sequence[Finding]) -> str:
    """Markdown: counts, then a row for each finding."""
    text = _HEAD.format(version=transformers.__version__)
    text += f"| | {' | '.join(_GROUPS)} |\n|---|{'---:|' * len(_GROUPS)}\n"
    for said, counts in _COUNTS.items():
        numbers = [sum(counts(f) for f in findings if member(f.name)) for member in _GROUPS.values()]
        text += f"| {said} | {' | '.join(map(str, numbers))} |\n"
    text += "\n| architecture | class | runner | right | law | why |\n|---|---|---|---|---|---|\n"
    return text + "".join(_row(finding) for finding in findings)


def _row(found: Finding) -> str:
    runner = found.runner if found.served else found.status
    right = "yes" if found.right else "; ".join(found.wrong) if found.served else ""
    law = _law(found) if found.served else ""
    why = "" if found.served and found.claimed and found.lawful else found.reason
    width = 110 if found.status == "not built" else 300  # transformers goes on to say what to install
    why = textwrap.shorten(why, width, placeholder=" …").replace("|", "\\|")
    cells = (found.name, found.architecture, runner, right, law, why)
    return f"| {' | '.join(cells)} |\n"


def _law(found: Finding) -> str:
    if found.claimed:
        return "yes" if found.lawful else f"**claimed, but** {', '.join(found.differ)}"
    if not found.tried:
        return "not claimed"
    return "found, not claimed" if found.lawful else "no"
