// Vercel AI SDK with its three providers that a server of one's own can stand behind.
import { ADD, ANSWER, BASE, DRAWN, KEY, MODEL, QUESTION, load, run, same, seeded } from "./tries.mjs";

const { Output, generateText, stepCountIs, streamText, tool } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { createAnthropic } = await load("@ai-sdk/anthropic");
const { z } = await load("zod");

const schema = z.object({ answer: z.int() });

function tries(model) {
  const asked = { model, prompt: QUESTION, maxRetries: 0 };
  return {
    plain: async () => same((await generateText(asked)).text, ANSWER),
    stream: async () => {
      let text = "";
      const result = streamText({ ...asked, onError: ({ error }) => { throw error; } });
      for await (const piece of result.textStream) text += piece;
      same(text, ANSWER);
      if (!((await result.usage).outputTokens > 0)) throw new Error("no usage");
    },
    tools: [
      async () => {
        const calls = [];
        const add = tool({
          description: "Add two numbers.",
          inputSchema: z.object({ a: z.int(), b: z.int() }),
          execute: async ({ a, b }) => (calls.push([a, b]), a + b),
        });
        const result = await generateText({ ...asked, tools: { add }, stopWhen: stepCountIs(3) });
        same(calls, [[2, 2]]);
        same(result.text, ANSWER);
      },
      ADD,
    ],
    structured: async () => same((await generateText({ ...asked, output: Output.object({ schema }) })).output, { answer: 4 }),
    seed: [
      () => seeded(async (seed) => (await generateText({ ...asked, seed, temperature: 1, maxOutputTokens: 24 })).text),
      DRAWN,
    ],
  };
}

const openai = createOpenAI({ baseURL: BASE, apiKey: KEY });
const compatible = createOpenAICompatible({ name: "verbatim", baseURL: BASE, apiKey: KEY, includeUsage: true, supportsStructuredOutputs: true });
const anthropic = createAnthropic({ baseURL: BASE, apiKey: KEY });
await run("chat/completions", tries(compatible(MODEL)));
await run("responses", tries(openai(MODEL)));
await run("messages", tries(anthropic(MODEL)));
