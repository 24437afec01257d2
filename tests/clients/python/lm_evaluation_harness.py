"""lm-evaluation-harness: the tasks of `make evaluations`, cut short, over completions and chat completions."""

import os
from pathlib import Path

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}

import lm_eval
from lm_eval.tasks import TaskManager
from tries import ANSWER, BASE, FREE, MODEL, run, same, seeded

TASKS = Path(__file__).resolve().parents[3] / "evaluations" / "tasks"
ITEMS = 2
os.chdir(TASKS.parents[1])  # the tasks name their files from there


def replies(kind: str, task: str, **generation: object) -> list:
    """What the model said on each item of a task."""
    chat = kind == "chat/completions"
    arguments = {"model": MODEL, "base_url": f"{BASE}/{kind}", "max_retries": 1}
    # The server has endpoints for its tokenizer, so the harness needs no tokenizer of its own.
    arguments |= {} if chat else {"tokenizer_backend": "remote"}
    found = lm_eval.simple_evaluate(
        model="local-chat-completions" if chat else "local-completions",
        model_args=arguments,
        tasks=[task],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        limit=ITEMS,
        apply_chat_template=chat,
        gen_kwargs=generation or None,
        bootstrap_iters=0,
        log_samples=True,
    )
    return [[answer[0] for answer in sample["resps"]] for sample in found["samples"][task]]


def generated(kind: str) -> None:
    same(len(replies(kind, "verbatim_answers")), ITEMS)


def chat() -> None:
    same(replies("chat/completions", "verbatim_answers"), [[ANSWER.split("\n")[0]]] * ITEMS)


def likelihoods() -> None:
    for item in replies("completions", "verbatim_facts"):
        for likelihood, _ in item:
            if not -1000 < likelihood < 0:
                raise AssertionError(f"a log-likelihood of {likelihood}")


def seed(kind: str) -> None:
    def ask(number: int) -> object:
        return replies(kind, "verbatim_answers", seed=number, temperature=1.0, do_sample=True, max_gen_toks=16)

    seeded(ask)


run(
    "completions",
    {
        "plain": (lambda: generated("completions"), FREE),
        "log-likelihoods": (likelihoods, FREE),
        "seed": (lambda: seed("completions"), FREE),
    },
)
run("chat/completions", {"plain": chat, "seed": (lambda: seed("chat/completions"), FREE)})
