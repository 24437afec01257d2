"""`ReceiptCheck`: everything of a check but the engine's work. Its caller prepares, runs and hands over the outputs.

    check = ReceiptCheck(receipt, info)
    request = check.request(request_id)                     None: decided already, see check.report()
    prepared = check.prepared(engine.prepare(request))      None: the same
    … run it …  check.add(output)
    check.report()

An error on the way goes to `check.refused`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

from engine.errors import InvalidParameter, VerbatimError
from engine.receipts.canonical import digest_of_ids
from engine.receipts.judgement import Rules, Seen, TextOf, judge
from engine.receipts.receipt import Receipt
from engine.receipts.request_record import from_record, recorded_params
from engine.receipts.verdict import MOST_TOLERANCE, TOLERANCE, CheckReport, ChoiceReport, Mode, Verdict, worst
from engine.types.fingerprint_parts import Parts, fingerprint_of, part_differences
from engine.types.model_info import ModelInfo
from engine.types.outputs import RequestOutput
from engine.types.requests import GenerationRequest, PreparedRequest
from engine.types.sampling_params import SAMPLING_FIELDS, SamplingParams

__all__ = ["ReceiptCheck"]

_SAMPLER: Final = "sampler"
_PROMPT_PARTS: Final = frozenset(
    {"prompt_format", "tokenizer", "template", "tool_template", "content_special_tokens", "chat_format"}
    | {"transformers", "tokenizers", "jinja2", "markupsafe", "regex"}
)
"""Parts of the fingerprint that a prompt's tokens depend on."""


class ReceiptCheck:
    """Checks one receipt against one model."""

    def __init__(
        self,
        receipt: Receipt,
        info: ModelInfo,
        *,
        mode: Mode = "verify",
        tolerance: float = TOLERANCE,
        text_of: TextOf | None = None,
    ) -> None:
        """Begin a check.

        Args:
            info: of the model that computes.
            mode: `verify` computes the receipt's tokens as drafts; `replay` generates them again.
            tolerance: see `TOLERANCE`.
            text_of: a token's text, for the report; None to name tokens by their ids alone.

        Raises:
            InvalidParameter: a tolerance that is not between 0 and 10.
        """
        if not 0.0 <= tolerance <= MOST_TOLERANCE:  # NaN, too
            raise InvalidParameter(
                f"tolerance must be between 0 and {MOST_TOLERANCE:g}, not {tolerance!r}.", param="tolerance"
            )
        self._receipt, self._info, self._mode = receipt, info, mode
        self._parts = tuple(part_differences(receipt.environment.parts, info.fingerprint_parts))
        same = receipt.environment.fingerprint == info.system_fingerprint and not self._parts
        # What the receipt says about the law must not soften the rules: here it is known.
        self._rules = Rules(same, same and info.law.holds, tolerance, text_of)
        self._seen = [Seen() for _ in receipt.choices]
        self._decided: tuple[Verdict, str] | None = None

    @property
    def differs_elsewhere(self) -> bool:
        """Whether a replay in another environment has drawn another token.

        What follows that token is another text. Only `verify` can tell whether rounding explains the difference.
        """
        return self._mode == "replay" and not self._rules.exact and any(seen.apart for seen in self._seen)

    def request(self, request_id: str, *, group: str = "") -> GenerationRequest | None:
        """Return the receipt's request; None if the receipt cannot be checked with this model: see `report`."""
        if reason := self._obstacle():
            self._decide("not_checkable", reason)
            return None
        return from_record(self._receipt.request, request_id, group=group)

    def prepared(self, prepared: PreparedRequest) -> PreparedRequest | None:
        """Return what the engine must run, from the request as it was prepared; None if its prompt decides already."""
        receipt = self._receipt
        params = recorded_params(from_record(receipt.request, receipt.id))
        if changed := _changed(params, prepared.params):
            self._decide("not_checkable", f"this model's limits change the request: {changed}.")
            return None
        if other := self._other_prompt(prepared.prompt_token_ids):
            self._decide(*other)
            return None
        follow = tuple(choice.token_ids or () for choice in receipt.choices)
        return dataclasses.replace(
            prepared,
            record=True,
            params=dataclasses.replace(params, prompt_logprobs=None),  # they would be computed for nothing
            follow=follow if self._mode == "verify" else None,
        )

    def refused(self, error: VerbatimError) -> CheckReport:
        """Report that the request was refused, or ended with an error."""
        self._decide("not_checkable", f"this model refuses the request: {error.message}")
        return self.report()

    def add(self, output: RequestOutput) -> None:
        """Add the next output of the request."""
        if output.error is not None:
            self._decide("not_checkable", f"the check ended with an error: {output.error.message}")
        for delta in output.deltas:
            seen = self._seen[delta.index]
            if self._mode == "verify":
                seen.follow(delta)
            else:
                seen.replay(delta, self._receipt.choices[delta.index].token_ids or ())

    def report(self) -> CheckReport:
        """Return the report, once it is decided: the last output was added, or a step before returned None."""
        if self._decided is not None:
            return self._report(*self._decided, ())
        choices = tuple(
            judge(choice, seen, self._rules) for choice, seen in zip(self._receipt.choices, self._seen, strict=True)
        )
        verdict = worst(choice.verdict for choice in choices)
        found = next(choice for choice in choices if choice.verdict == verdict)
        sentence = found.sentence if len(choices) == 1 else f"choice {found.index}: {found.sentence}"
        if verdict == "identical" and len(choices) > 1:
            tokens, drawn = sum(choice.tokens for choice in choices), sum(choice.drawn for choice in choices)
            sentence = f"all {tokens} tokens of {len(choices)} choices and {drawn} scores are equal in every bit."
        return self._report(verdict, sentence, choices)

    def _report(self, verdict: Verdict, sentence: str, choices: tuple[ChoiceReport, ...]) -> CheckReport:
        receipt, info = self._receipt, self._info
        return CheckReport(
            id=receipt.id,
            digest=receipt.digest,
            verdict=verdict,
            sentence=sentence,
            mode=self._mode,
            model=info.id,
            fingerprint=info.system_fingerprint,
            tolerance=self._rules.tolerance,
            environment=(*self._parts, *self._lawless()),
            choices=choices,
        )

    def _lawless(self) -> Iterator[str]:
        """Say where the law does not hold: other bits are expected there."""
        if not self._info.law.holds:
            yield f"the law does not hold here: {self._info.law.reason}"
        if not self._rules.same and not self._receipt.law.holds:
            yield "the receipt says that the law did not hold where it was written"

    def _decide(self, verdict: Verdict, sentence: str) -> None:
        self._decided = self._decided or (verdict, sentence)

    def _obstacle(self) -> str | None:
        """Say why the receipt cannot be checked with this model; None if it can."""
        receipt, info = self._receipt, self._info
        parts, here = receipt.environment.parts, info.fingerprint_parts
        if not receipt.has_text:
            return "the receipt holds a digest of its request, not the request: nothing can be computed from it."
        if receipt.environment.fingerprint != fingerprint_of(parts, "vb-"):
            return "the receipt's fingerprint is not that of the parts that it names: its environment was altered."
        if self._rules.same and receipt.law.holds != info.law.holds:
            held = "holds" if info.law.holds else "does not hold"
            return f"the receipt says otherwise, but in its environment, which is this one, the law {held}."
        if files := _other_files(dict(receipt.model.files), dict(info.manifest.files)):
            return f"the model's files are not those of the receipt: {files}."
        if parts.get(_SAMPLER) != here.get(_SAMPLER):
            return (
                f"the receipt was drawn by version {parts.get(_SAMPLER)} of the sampler, and this program has version "
                f"{here.get(_SAMPLER)}."
            )
        strange = [t for choice in receipt.choices for t in choice.token_ids or () if t >= info.vocab_size]
        if strange:
            return f"the receipt holds token {strange[0]}, and this model has {info.vocab_size} tokens."
        return None

    def _other_prompt(self, here: tuple[int, ...]) -> tuple[Verdict, str] | None:
        """Say that the request's prompt is not the receipt's, and what follows; None if it is."""
        prompt = self._receipt.prompt
        if len(here) == prompt.tokens and digest_of_ids(here) == prompt.sha256:
            return None
        where = f"it has {len(here)} tokens here, and {prompt.tokens} there"
        if prompt.token_ids is not None:
            pairs = enumerate(zip(prompt.token_ids, here, strict=False))
            place = next((i for i, (a, b) in pairs if a != b), min(len(here), prompt.tokens))
            where = f"they part at token {place}"
        theirs, ours = _of_prompts(self._receipt.environment.parts), _of_prompts(self._info.fingerprint_parts)
        if told := ", ".join(part_differences(theirs, ours)):
            return "not_checkable", f"the request gives another prompt here ({where}), of other parts: {told}."
        return "refuted", f"the prompt is not that of the request: {where}."


def _of_prompts(parts: Parts) -> Parts:
    return {name: part for name, part in parts.items() if name in _PROMPT_PARTS}


def _changed(recorded: SamplingParams, here: SamplingParams) -> str:
    """Say which parameters a preparation has changed; empty if none."""
    pairs = ((name, getattr(recorded, name), getattr(here, name)) for name in SAMPLING_FIELDS)
    return ", ".join(f"{name} {a} → {b}" for name, a, b in pairs if a != b)


def _other_files(theirs: dict[str, str], ours: dict[str, str]) -> str:
    """Name the files that two manifests do not share; empty if they are the same."""
    names = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    shown = [
        f"{name} is not in the model" if name not in ours else f"{name} differs" if name in theirs else f"{name} is new"
        for name in names[:5]
    ]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
