"""What the demo model knows about this project: questions' topics and the answers to them. Knows no code.

Each answer is a sentence or two from the documents of this repository, true of the build beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Fact:
    """One answer. `topics` fit "What is …?"; `tasks` fit "How do I …?"; `short` is all that one word can say."""

    id: str
    short: str
    answer: str
    topics: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()


FACTS: Final = (
    Fact(
        "verbatim",
        "Server",
        "verbatim is a local inference server for language models. Every reply can be reproduced, word for word.",
        topics=("verbatim", "this project", "this server", "this software"),
    ),
    Fact(
        "seed",
        "Number",
        "The seed is a number that fixes every random choice. The same model, prompt, parameters and seed give the "
        "same reply.",
        topics=("a seed", "the seed", "the seed parameter", "seed"),
        tasks=("repeat a reply", "get the same answer twice", "reproduce a reply"),
    ),
    Fact(
        "fingerprint",
        "Identity",
        "system_fingerprint names all that the bits of a reply depend on: the weights, the tokenizer, the kernels and "
        "the machine. Equal fingerprints and seeds mean equal replies.",
        topics=("system_fingerprint", "the system_fingerprint", "the fingerprint", "a fingerprint"),
    ),
    Fact(
        "add-model",
        "models.yaml",
        "Add an entry with an id and a path to models.yaml and start the server again. The path is a folder with "
        "safetensors.",
        tasks=("add a model", "serve another model", "use my own model", "add my own checkpoint", "change the model"),
    ),
    Fact(
        "models-yaml",
        "Configuration",
        "models.yaml lists the models that the server offers, each with its id, its path and its settings.",
        topics=("models.yaml", "the models.yaml file", "the configuration file"),
    ),
    Fact(
        "start",
        "serve",
        "Run make serve. It installs what is needed and serves the API on port 8000.",
        tasks=("start the server", "run the server", "start verbatim", "run verbatim", "install verbatim"),
    ),
    Fact(
        "port",
        "8000",
        "The server listens on port 8000 of this machine. Another port is set with --port.",
        topics=("the port", "the default port"),
        tasks=("change the port", "set the port", "use another port"),
    ),
    Fact(
        "endpoint",
        "/v1/chat/completions",
        "The endpoint is /v1/chat/completions. It speaks the chat completions format of OpenAI.",
        topics=("the endpoint", "the API endpoint", "the address of the API", "the URL of the API"),
    ),
    Fact(
        "client",
        "openai",
        "Use the openai package and set its base_url to http://127.0.0.1:8000/v1.",
        tasks=("use the openai client", "call the server from Python", "connect from Python", "use the Python client"),
    ),
    Fact(
        "stream",
        "stream",
        "Set stream to true. The reply then comes in pieces, as server-sent events.",
        topics=("streaming", "the stream parameter"),
        tasks=("stream a reply", "get the reply in pieces", "turn on streaming"),
    ),
    Fact(
        "temperature",
        "Randomness",
        "The temperature scales the randomness of a reply. At 0 the likeliest token is always taken.",
        topics=("temperature", "the temperature", "the temperature parameter"),
    ),
    Fact(
        "top-p",
        "Sampling",
        "top_p keeps the smallest set of tokens whose probabilities add up to it, and drops the rest.",
        topics=("top_p", "the top_p parameter", "nucleus sampling"),
    ),
    Fact(
        "top-k",
        "Sampling",
        "top_k keeps only the k likeliest tokens. It is an extension to the API.",
        topics=("top_k", "the top_k parameter"),
    ),
    Fact(
        "stop",
        "Ending",
        "Stop strings end a reply as soon as the text contains one of them. They are never part of the reply.",
        topics=("a stop string", "stop strings", "the stop parameter", "a stop sequence"),
        tasks=("stop a reply at a word", "set a stop string"),
    ),
    Fact(
        "max-tokens",
        "max_completion_tokens",
        "max_completion_tokens limits how many tokens a reply may have. A reply that was cut has the finish reason "
        "length.",
        topics=("max_completion_tokens", "max_tokens", "the length limit"),
        tasks=("limit the length of a reply", "make replies shorter"),
    ),
    Fact(
        "finish-reason",
        "Ending",
        "finish_reason says why a reply ended: stop for a natural end, length when the limit was reached.",
        topics=("finish_reason", "the finish_reason", "a finish reason"),
    ),
    Fact(
        "logprobs",
        "Probabilities",
        "Logprobs are the logarithms of the probabilities that the model gave to its tokens. Set logprobs to true to "
        "get them.",
        topics=("logprobs", "a logprob", "log probabilities"),
        tasks=("get logprobs", "see the probabilities of tokens"),
    ),
    Fact(
        "n",
        "Count",
        "The parameter n asks for several replies to one prompt. The prompt is computed once.",
        topics=("n", "the n parameter", "the parameter n"),
        tasks=("get several replies", "ask for more than one answer"),
    ),
    Fact(
        "penalties",
        "Repetition",
        "Penalties make tokens that were already used less likely: once with presence_penalty, by their count with "
        "frequency_penalty.",
        topics=("a penalty", "presence_penalty", "frequency_penalty", "the frequency penalty"),
        tasks=("avoid repetition", "stop the model from repeating itself"),
    ),
    Fact(
        "logit-bias",
        "Preference",
        "logit_bias adds a number to the score of chosen tokens, to make them likelier or to forbid them.",
        topics=("logit_bias", "the logit_bias parameter"),
        tasks=("forbid a token", "make a token likelier"),
    ),
    Fact(
        "token",
        "Piece",
        "A token is a piece of text, a word or a part of one. Models read and write tokens.",
        topics=("a token", "tokens"),
    ),
    Fact(
        "template",
        "Prompt",
        "A chat template turns the messages into the prompt that the model was trained on. It comes with the model.",
        topics=("a chat template", "the chat template"),
    ),
    Fact(
        "context",
        "Length",
        "The context length is the number of tokens that prompt and reply may have together.",
        topics=("the context length", "the context", "context_length"),
    ),
    Fact(
        "cache",
        "Speed",
        "The prefix cache keeps what was computed for a prompt. A request that begins the same way starts sooner, with "
        "the same bits.",
        topics=("the prefix cache", "prefix caching", "a prefix cache"),
    ),
    Fact(
        "offline",
        "Yes",
        "Yes. The server needs no network: models are read from the disk and nothing is downloaded.",
        tasks=("work offline", "run without a network", "use it behind an air gap", "run it offline"),
    ),
    Fact(
        "gpu",
        "cuda",
        "Set device to cuda in models.yaml, or to auto, which takes a GPU if there is one.",
        tasks=("use a GPU", "run on a GPU", "use my graphics card"),
    ),
    Fact(
        "health",
        "Readiness",
        "GET /health/ready says whether every model is loaded and ready.",
        topics=("the health endpoint", "/health/ready"),
        tasks=("check the health of the server", "see whether the server is ready"),
    ),
    Fact(
        "check",
        "models.yaml",
        "Run verbatim models check. It loads each model of models.yaml and says what it found.",
        tasks=("check my models", "check models.yaml", "test a model"),
    ),
    Fact(
        "generate",
        "generate",
        "Run verbatim generate with a prompt. It answers on the command line without a server.",
        tasks=("use the command line", "generate text without a server", "ask from the terminal"),
    ),
    Fact(
        "refused",
        "Refused",
        "A parameter that cannot be honoured is refused by name with status 422. Nothing is ignored in silence.",
        topics=("an unsupported parameter", "status 422", "error 422"),
    ),
    Fact(
        "law",
        "Reproducibility",
        "The bits of a reply depend on the model, the prompt, the parameters and the seed, and on nothing else.",
        topics=("the law", "the promise of verbatim", "reproducibility"),
    ),
    Fact(
        "retrain",
        "Training",
        "Run make demo-model. It trains me again from a corpus that is generated on the spot.",
        tasks=("train you", "retrain the demo model", "train the demo model again"),
    ),
)
