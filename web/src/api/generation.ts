/** Asks for a reply and reads it, streamed, into a `Reply`. */
import type { Reply, Sent } from "../state/conversation";
import { send } from "./client";
import { bodyWithSeed, receiptIn, seedIn } from "./lossless";
import { events } from "./stream";
import type { Json, JsonObject, Rival, TokenEntry, ToolCall, Usage } from "./types";

const CHAT = "/v1/chat/completions";

interface Chunk {
  id?: string;
  model?: string;
  system_fingerprint?: string;
  error?: { message?: string };
  usage?: Usage | null;
  choices?: {
    delta?: {
      content?: string | null;
      reasoning_content?: string | null;
      tool_calls?: { index: number; id?: string; function?: { name?: string; arguments?: string } }[];
    };
    logprobs?: { content?: RawEntry[] | null } | null;
    finish_reason?: string | null;
    token_ids?: number[];
    margins?: (number | null)[];
    schema_error?: string | null;
  }[];
}

interface RawEntry extends Rival {
  bytes?: number[] | null;
  top_logprobs?: Rival[];
}

export function emptyReply(sent: Sent, defaults: string): Reply {
  const model = typeof sent.body.model === "string" ? sent.body.model : "";
  return {
    id: "",
    model,
    fingerprint: "",
    defaults,
    seed: sent.seed ?? "",
    content: "",
    reasoning: "",
    calls: [],
    tokens: [],
    tokenIds: [],
    margins: [],
    finish: "",
    ignored: [],
    sent,
    seconds: 0,
    done: false,
  };
}

/** Read a reply to its end. `grown` is called with the same object after each event. Refusals are thrown. */
export async function generate(reply: Reply, signal: AbortSignal, grown: () => void): Promise<void> {
  const body: JsonObject = { ...reply.sent.body, stream: true, stream_options: { include_usage: true } };
  const began = performance.now();
  const response = await send(CHAT, { method: "POST", body: bodyWithSeed(body, reply.sent.seed), signal });
  reply.ignored = (response.headers.get("x-ignored-fields") ?? "").split(",").map((name) => name.trim()).filter(Boolean);
  let ended = false;
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") {
        ended = true;
        break;
      }
      take(reply, data);
      reply.seconds = (performance.now() - began) / 1000;
      grown();
    }
  } catch (error) {
    if (signal.aborted) throw error; // what the browser calls a broken connection differs
  }
  if (!ended && !reply.error) reply.error = "The connection ended before the reply did.";
}

function take(reply: Reply, data: string): void {
  const chunk = JSON.parse(data) as Chunk;
  if (chunk.error) {
    reply.error = chunk.error.message ?? "The reply ended with an error.";
    return;
  }
  if (!reply.id) {
    reply.id = chunk.id ?? "";
    reply.model = chunk.model ?? reply.model;
    reply.fingerprint = chunk.system_fingerprint ?? "";
    reply.seed = seedIn(data) ?? reply.seed;
  }
  if (chunk.usage) reply.usage = chunk.usage;
  const receipt = chunk.choices?.length === 0 ? receiptIn(data) : undefined;
  if (receipt !== undefined) reply.receipt = receipt;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  reply.content += choice.delta?.content ?? "";
  reply.reasoning += choice.delta?.reasoning_content ?? "";
  for (const call of choice.delta?.tool_calls ?? []) takeCall(reply.calls, call);
  for (const entry of choice.logprobs?.content ?? []) reply.tokens.push(entryOf(entry));
  reply.tokenIds.push(...(choice.token_ids ?? []));
  reply.margins.push(...(choice.margins ?? []));
  if (choice.finish_reason) reply.finish = choice.finish_reason;
  if (choice.schema_error) reply.error = choice.schema_error;
}

function takeCall(
  calls: ToolCall[],
  part: { index: number; id?: string; function?: { name?: string; arguments?: string } },
): void {
  const call = (calls[part.index] ??= { id: "", name: "", arguments: "" });
  call.id ||= part.id ?? "";
  call.name += part.function?.name ?? "";
  call.arguments += part.function?.arguments ?? "";
}

function entryOf(entry: RawEntry): TokenEntry {
  return {
    token: entry.token,
    logprob: entry.logprob,
    bytes: entry.bytes ?? null,
    top: (entry.top_logprobs ?? []).map(({ token, logprob }) => ({ token, logprob })),
  };
}

/** A copy that shares nothing with what still grows. */
export function snapshot(reply: Reply): Reply {
  return {
    ...reply,
    calls: reply.calls.map((call) => ({ ...call })),
    tokens: [...reply.tokens],
    tokenIds: [...reply.tokenIds],
    margins: [...reply.margins],
  };
}

export type { Json };
