"""A conversation: its messages, its commands, and what is said under each reply. Knows no engine and no HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from engine import ConfigError, SamplingParams, VerbatimError
from server.commands.chat.screen import Screen
from server.commands.chat.talker import Message, Reply, Talker, difference, rate

__all__ = ["HELP", "Session"]

HELP: Final = """/again        the last reply once more, with its seed: ✓ same bits, or the first difference
/seed N       use this seed for every reply; /seed alone draws one for each again
/system TEXT  the system message from now on; /system alone takes it away
/new          begin anew
/save FILE    write the conversation as JSON
/quit         the end (also Ctrl-D)
A line that ends with \\ goes on in the next one; three quotes begin and end a message of several lines.
A message that begins with / is written with two."""


class Session:
    """One conversation with one model.

    Args:
        system: the system message; None for none.
        seed: for every reply; None draws one for each.
    """

    def __init__(
        self,
        talker: Talker,
        screen: Screen,
        *,
        system: str | None = None,
        seed: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._talker, self._screen, self._clock = talker, screen, clock
        self._system, self._seed = system, seed
        self._turns: list[Message | Reply] = []  # questions and replies, in turn
        self._asked: tuple[Message, ...] = ()  # what the last reply is the reply to
        self._last: Reply | None = None
        self.failed = False
        """Whether a message got no reply, or a command was wrong."""

    def run(self) -> None:
        """Take messages until the end."""
        while True:
            try:
                said = self._screen.read()
            except KeyboardInterrupt:
                self._screen.end()
                return
            if said is None or not self.take(said):
                return

    def take(self, said: str) -> bool:
        """Take one message or command. False: it was the last."""
        if not said.strip():
            return True
        try:
            if said.startswith("/") and not said.startswith("//"):
                return self._command(said)
            self._ask(said.removeprefix("/") if said.startswith("//") else said)
        except VerbatimError as error:
            self.failed = True
            self._screen.note(f"error: {' '.join(error.message.split())}")
        return True

    # -- replies -----------------------------------------------------------------------------------------------------

    def _ask(self, text: str) -> None:
        messages = (*self._messages(), Message("user", text))
        reply = self._shown(messages, self._seed)
        if reply is not None:
            self._asked, self._last = messages, reply
            self._turns += [messages[-1], reply]

    def _again(self) -> None:
        before = self._last
        if before is None:
            raise ConfigError("there is no reply yet to have again.")
        reply = self._shown(self._asked, before.seed)
        if reply is None:
            return
        found = difference(before, reply)
        if found is None:
            self._screen.note(f"✓ same bits: {len(reply.tokens)} tokens and their log-probabilities")
        else:
            self.failed = True
            self._screen.note(f"✗ {found}")

    def _shown(self, messages: tuple[Message, ...], seed: int | None) -> Reply | None:
        """Show a reply while it comes, and what it can be had again with; None if it was interrupted."""
        coming = self._talker.reply(messages, seed)
        begun: float | None = None
        try:
            while True:
                try:
                    piece = next(coming)
                except StopIteration as end:
                    reply: Reply = end.value
                    break
                begun = self._clock() if begun is None else begun
                self._screen.piece(piece)
        except KeyboardInterrupt:
            self._screen.end()
            self._screen.note("interrupted; the message and its reply are forgotten")
            return None
        finally:
            coming.close()
        self._screen.end()
        seconds = 0.0 if begun is None else self._clock() - begun
        self._screen.note(self._told(reply, seconds))
        return reply

    def _told(self, reply: Reply, seconds: float) -> str:
        speed = rate(reply.completion_tokens - 1, seconds)  # the first token's time is the prompt's
        cut = "cut at the limit of tokens" if reply.finish_reason == "length" else ""
        parts = [f"seed {reply.seed}", reply.fingerprint, f"{reply.completion_tokens} tokens", speed, cut]
        return " · ".join(filter(None, [*parts, "/again: the same bits" if self._screen.interactive else ""]))

    def _messages(self) -> tuple[Message, ...]:
        system = () if self._system is None else (Message("system", self._system),)
        turns = (Message("assistant", t.text) if isinstance(t, Reply) else t for t in self._turns)
        return (*system, *turns)

    # -- commands ----------------------------------------------------------------------------------------------------

    def _command(self, said: str) -> bool:
        name, _, rest = said[1:].partition(" ")
        rest = rest.strip()
        match name:
            case "quit" | "exit":
                return False
            case "help":
                self._screen.note(HELP)
            case "again":
                self._again()
            case "seed":
                self._set_seed(rest)
            case "system":
                self._system = rest or None
                self._screen.note("a system message from now on" if rest else "no system message from now on")
            case "new":
                self._turns, self._last = [], None
                self._screen.note("a new conversation")
            case "save":
                self._save(rest)
            case _:
                raise ConfigError(f"there is no command /{name:.50}; /help lists those there are.")
        return True

    def _set_seed(self, text: str) -> None:
        if not text:
            self._seed = None
            self._screen.note("a seed is drawn for each reply from now on")
            return
        try:
            seed = int(text)
        except ValueError:
            raise ConfigError(f"a seed is a whole number, unlike {text!r:.50}.") from None
        SamplingParams.merged({"seed": seed})
        self._seed = seed
        self._screen.note(f"seed {seed} for every reply from now on")

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs the name of a file.")
        file = Path(name).expanduser()
        try:
            with file.open("x", encoding="utf-8") as out:
                json.dump(self._document(), out, ensure_ascii=True, indent=1)
                out.write("\n")
        except FileExistsError:
            raise ConfigError(f"{file} exists, and is not overwritten.") from None
        except OSError as error:
            raise ConfigError(f"{file} cannot be written: {error.strerror or error}.") from None
        self._screen.note(f"saved to {file}")

    def _document(self) -> dict[str, object]:
        messages: list[dict[str, object]] = []
        if self._system is not None:
            messages.append({"role": "system", "content": self._system})
        for turn in self._turns:
            if isinstance(turn, Message):
                messages.append({"role": turn.role, "content": turn.content})
                continue
            thoughts = {"reasoning_content": turn.thoughts} if turn.thoughts else {}
            more = {"seed": turn.seed, "system_fingerprint": turn.fingerprint, "finish_reason": turn.finish_reason}
            messages.append({"role": "assistant", "content": turn.text, **thoughts, **more})
        return {"model": self._talker.name, "messages": messages}
