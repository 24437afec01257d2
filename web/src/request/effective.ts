/** The parameters that a reply was computed with: as its receipt records them, or else as the server's defaults say. Pure. */
import type { Json, JsonObject, Model } from "../api/types";
import type { Reply } from "../state/conversation";
import { receiptOf } from "../receipts/document";

export interface Parameter {
  name: string;
  value: string;
  /** Where it comes from. */
  from: "request" | "drawn" | "model" | "default" | "receipt";
}

const DEFAULTS: JsonObject = {
  temperature: 1,
  top_p: 1,
  top_k: 0,
  min_p: 0,
  presence_penalty: 0,
  frequency_penalty: 0,
  repetition_penalty: 1,
  logprobs_mode: "raw",
};

const NOT_SHOWN = new Set(["messages", "model", "tools", "stream", "stream_options", "receipt"]);

/** The same parameter under the name that a receipt has for it. */
const RECORDED: Record<string, string> = { max_completion_tokens: "max_tokens" };

export function effective(reply: Reply, model: Model | undefined): Parameter[] {
  const sent = reply.sent.body;
  const names = new Map<string, Parameter>();
  const put = (name: string, value: Json, from: Parameter["from"]): void => {
    if (!NOT_SHOWN.has(name)) names.set(name, { name, value: JSON.stringify(value), from });
  };
  for (const [name, value] of Object.entries(DEFAULTS)) put(name, value, "default");
  for (const [name, value] of Object.entries(model?.default_sampling ?? {})) put(name, value, "model");
  for (const [name, value] of Object.entries(recorded(reply))) {
    const before = names.get(name);
    if (before?.value !== JSON.stringify(value)) put(name, value, "receipt");
  }
  for (const [name, value] of Object.entries(sent)) {
    const known = RECORDED[name];
    if (known && names.has(known)) {
      const now = names.get(known);
      names.set(known, { name: known, value: now?.value ?? "", from: "request" });
    } else put(name, value, "request");
  }
  if (reply.seed) names.set("seed", { name: "seed", value: reply.seed, from: reply.sent.seed ? "request" : "drawn" });
  const asked = (one: Parameter): number => (one.from === "request" || one.from === "drawn" ? 0 : 1);
  return [...names.values()].sort((a, b) => asked(a) - asked(b) || a.name.localeCompare(b.name));
}

function recorded(reply: Reply): JsonObject {
  const receipt = reply.receipt === undefined ? undefined : receiptOf(reply.receipt);
  const sampling = receipt?.request.sampling;
  return typeof sampling === "object" && sampling !== null && !Array.isArray(sampling) ? sampling : {};
}
