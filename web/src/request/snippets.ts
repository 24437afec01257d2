/** A request as a command or a program that sends it. The key is never written out. Pure. */
import { bodyWithSeed } from "../api/lossless";
import type { Json, JsonObject } from "../api/types";
import type { Sent } from "../state/conversation";

/** Fields that the `openai` client for Python takes by name; it sends all others in `extra_body`. */
const OPENAI = new Set(
  (
    "model messages max_completion_tokens max_tokens n temperature top_p presence_penalty frequency_penalty logit_bias " +
    "seed stop logprobs top_logprobs response_format tools tool_choice parallel_tool_calls reasoning_effort user"
  ).split(" "),
);

/** The body, with a seed of any size, in lines. */
export function asJson(sent: Sent): string {
  const json = JSON.stringify(sent.body, null, 2);
  return sent.seed === undefined ? json : `${json.slice(0, -2)},\n  "seed": ${sent.seed}\n}`;
}

export function asCurl(sent: Sent, origin: string, keyed: boolean): string {
  const body = asJson(sent).replaceAll("'", "'\\''");
  const key = keyed ? ` \\\n  -H "Authorization: Bearer $VERBATIM_KEY"` : "";
  return `curl ${origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${body}'\n`;
}

export function asPython(sent: Sent, origin: string, keyed: boolean): string {
  const known = Object.entries(sent.body).filter(([name]) => OPENAI.has(name));
  const more = Object.fromEntries(Object.entries(sent.body).filter(([name]) => !OPENAI.has(name)));
  const lines = known.map(([name, value]) => `    ${name}=${python(value, 1)},`);
  if (sent.seed !== undefined) lines.push(`    seed=${sent.seed},`);
  if (Object.keys(more).length) lines.push(`    extra_body=${python(more, 1)},`);
  const key = keyed ? 'os.environ["VERBATIM_KEY"]' : '"none"';
  return `${keyed ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${python(`${origin}/v1`, 0)}, api_key=${key})
reply = client.chat.completions.create(
${lines.join("\n")}
)
print(reply.choices[0].message.content, reply.seed, reply.system_fingerprint)
`;
}

export function asJavaScript(sent: Sent, origin: string, keyed: boolean): string {
  const big = sent.seed !== undefined && !Number.isSafeInteger(Number(sent.seed));
  const body: JsonObject = sent.seed === undefined || big ? sent.body : { ...sent.body, seed: Number(sent.seed) };
  const json = JSON.stringify(body, null, 2);
  // a seed that is no number of JavaScript must be sent as text
  const text = big ? `'${bodyWithSeed(sent.body, sent.seed).replace(/[\\']/g, "\\$&")}'` : `JSON.stringify(${json})`;
  const key = keyed ? "\n    Authorization: `Bearer ${process.env.VERBATIM_KEY}`," : "";
  return `const response = await fetch(${JSON.stringify(`${origin}/v1/chat/completions`)}, {
  method: "POST",
  headers: {
    "Content-Type": "application/json",${key}
  },
  body: ${text},
});
const reply = await response.json();
console.log(reply.choices[0].message.content, reply.seed, reply.system_fingerprint);
`;
}

function python(value: Json, level: number): string {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "string") return JSON.stringify(value).replace(/[\u007f-\u009f\u2028\u2029]/g, escaped);
  if (typeof value === "number") return JSON.stringify(value);
  const indent = "    ".repeat(level + 1);
  const items = Array.isArray(value)
    ? value.map((one) => python(one, level + 1))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one, level + 1)}`);
  const [open, close] = Array.isArray(value) ? ["[", "]"] : ["{", "}"];
  const line = `${open}${items.join(", ")}${close}`;
  if (line.length <= 80 && !line.includes("\n")) return line;
  return `${open}\n${items.map((item) => `${indent}${item},\n`).join("")}${"    ".repeat(level)}${close}`;
}

function escaped(character: string): string {
  return `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
}
