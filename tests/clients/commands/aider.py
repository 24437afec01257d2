"""aider, which edits a file from a reply in its own form."""

from pathlib import Path

from tool import Tool
from tries import BASE, KEY, MODEL, run, same

WHOLE = "hello.txt\n```\nThe answer is 4.\n```\n"


def edited(*more: str) -> str:
    with Tool("aider") as aider:
        Path(aider.work, "hello.txt").write_text("What is 2 + 2?\n")
        where = ["--model", f"openai/{MODEL}", "--openai-api-base", BASE, "--openai-api-key", KEY]
        quiet = [
            "--no-git",
            "--no-check-update",
            "--no-analytics",
            "--no-show-model-warnings",
            "--no-show-release-notes",
        ]
        quiet += ["--yes-always", "--no-pretty", "--no-gitignore", "--no-detect-urls", "--map-tokens", "0"]
        request = ["--edit-format", "whole", "--message", "Answer in the file.", "hello.txt"]
        aider.run(*where, *quiet, *more, *request)
        return Path(aider.work, "hello.txt").read_text()


def plain() -> None:
    same(edited("--no-stream"), "The answer is 4.\n")


def stream() -> None:
    same(edited("--stream"), "The answer is 4.\n")


run("chat/completions", {"plain": (plain, {"text": WHOLE}), "stream": (stream, {"text": WHOLE})})
