"""DSPy with its adapters for text, for JSON and for native tool calls."""

import dspy
from tries import ANSWER, BASE, DRAWN, KEY, MODEL, QUESTION, run, same, seeded

# DSPy's own client has to be told what a server can do; it uses neither tools nor schemas of one that it does not know.
dspy.lm15.register_provider(
    dspy.lm15.ProviderDefinition.chat(
        dspy.lm15.AccessPolicy(provider="verbatim", env_keys=("VERBATIM_KEY",), base_url=BASE),
        compat=dspy.lm15.OpenAIChatCompat(),
    ),
    supports=dspy.lm15.ModelSupport(function_calling=True, response_schema=True),
)

FIELDS = "[[ ## answer ## ]]\n4\n\n[[ ## completed ## ]]"


def model(**more: object) -> dspy.LM:
    return dspy.LM(f"verbatim/{MODEL}", api_key=KEY, cache=False, num_retries=0, **more)


class Sum(dspy.Signature):
    """Add two numbers."""

    question: str = dspy.InputField()
    answer: int = dspy.OutputField()


class Calls(dspy.Signature):
    """Call the tools that answer the question."""

    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    outputs: dspy.ToolCalls = dspy.OutputField()


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def plain() -> None:
    same(model()(QUESTION)[0], ANSWER)


def fields() -> None:
    with dspy.context(lm=model(), adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        same(dspy.Predict(Sum)(question=QUESTION).answer, 4)


def stream() -> None:
    with dspy.context(lm=model(), adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)):
        program = dspy.streamify(
            dspy.Predict("question -> answer"),
            stream_listeners=[dspy.streaming.StreamListener(signature_field_name="answer")],
            async_streaming=False,
        )
        pieces = list(program(question=QUESTION))
    told = [piece.chunk for piece in pieces if isinstance(piece, dspy.streaming.StreamResponse)]
    same("".join(told)[:1], "4")  # it may go on with the delimiter, as far as DSPy has taken that for text


def tools() -> None:
    with dspy.context(lm=model(), adapter=dspy.ChatAdapter(use_native_function_calling=True)):
        found = dspy.Predict(Calls)(question=QUESTION, tools=[dspy.Tool(add)])
    same([(call.name, call.args) for call in found.outputs.tool_calls], [("add", {"a": 2, "b": 2})])


def structured() -> None:
    with dspy.context(lm=model(), adapter=dspy.JSONAdapter()):
        same(dspy.Predict(Sum)(question=QUESTION).answer, 4)


def seed() -> None:
    seeded(lambda number: model(temperature=1.0, max_tokens=24, seed=number)(QUESTION)[0])


run(
    "chat/completions",
    {
        "plain": plain,
        "fields": (fields, {"text": FIELDS}),
        "stream": (stream, {"text": FIELDS}),
        "tools": (tools, {"call": "add", "arguments": {"a": 2, "b": 2}, "text": FIELDS}),
        "structured": structured,
        "seed": (seed, DRAWN),
    },
)
