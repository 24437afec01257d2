// OpenAI's SDK for Node.
import { ADD, ANSWER, BASE, DRAWN, KEY, MODEL, QUESTION, load, run, same, seeded } from "./tries.mjs";

const { default: OpenAI } = await load("openai");
const { zodResponseFormat, zodTextFormat } = await load("openai/helpers/zod");
const { z } = await load("zod");

const client = new OpenAI({ baseURL: BASE, apiKey: KEY, maxRetries: 0, timeout: 60_000 });
const messages = [{ role: "user", content: QUESTION }];
const Answer = z.object({ answer: z.int() });
const parameters = {
  type: "object",
  properties: { a: { type: "integer" }, b: { type: "integer" } },
  required: ["a", "b"],
  additionalProperties: false,
};
const described = { name: "add", description: "Add two numbers.", parameters, strict: true };

const chat = (more = {}) => client.chat.completions.create({ model: MODEL, messages, ...more });
const respond = (more = {}) => client.responses.create({ model: MODEL, input: QUESTION, store: false, ...more });

await run("chat/completions", {
  plain: async () => same((await chat()).choices[0].message.content, ANSWER),
  stream: async () => {
    const stream = client.chat.completions.stream({ model: MODEL, messages, stream_options: { include_usage: true } });
    let text = "";
    stream.on("content", (delta) => (text += delta));
    same((await stream.finalChatCompletion()).choices[0].message.content, ANSWER);
    same(text, ANSWER);
  },
  tools: [
    async () => {
      const calls = [];
      const runner = client.chat.completions.runTools({
        model: MODEL,
        messages,
        tools: [{ type: "function", function: { ...described, parse: JSON.parse, function: ({ a, b }) => (calls.push([a, b]), `${a + b}`) } }],
      });
      same(await runner.finalContent(), ANSWER);
      same(calls, [[2, 2]]);
    },
    ADD,
  ],
  structured: async () => {
    const found = await client.chat.completions.parse({ model: MODEL, messages, response_format: zodResponseFormat(Answer, "answer") });
    same(found.choices[0].message.parsed, { answer: 4 });
  },
  seed: [() => seeded(async (seed) => (await chat({ seed, temperature: 1, max_tokens: 24 })).choices[0].message.content), DRAWN],
});

await run("responses", {
  plain: async () => same((await respond()).output_text, ANSWER),
  stream: async () => {
    const stream = client.responses.stream({ model: MODEL, input: QUESTION, store: false });
    let text = "";
    stream.on("response.output_text.delta", (event) => (text += event.delta));
    same((await stream.finalResponse()).output_text, ANSWER);
    same(text, ANSWER);
  },
  tools: [
    async () => {
      const tools = [{ type: "function", ...described }];
      const response = await respond({ tools });
      const call = response.output.find((item) => item.type === "function_call");
      same([call?.name, JSON.parse(call?.arguments ?? "null")], ["add", { a: 2, b: 2 }]);
      const result = { type: "function_call_output", call_id: call.call_id, output: "4" };
      const input = [{ role: "user", content: QUESTION }, ...response.output, result];
      same((await respond({ tools, input })).output_text, ANSWER);
    },
    ADD,
  ],
  structured: async () => {
    const found = await client.responses.parse({ model: MODEL, input: QUESTION, store: false, text: { format: zodTextFormat(Answer, "answer") } });
    same(found.output_parsed, { answer: 4 });
  },
});
