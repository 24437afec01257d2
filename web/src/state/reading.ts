/** Reads conversations that come from a file or from the browser's database: anything may be in there. Pure. */
import type { Json, JsonObject, Rival, TokenEntry } from "../api/types";
import type { Conversation, Message, Reply } from "./conversation";

type Fields = Record<string, unknown>;

function fields(value: unknown): Fields {
  return typeof value === "object" && value !== null && !Array.isArray(value) ? (value as Fields) : {};
}

function list(value: unknown): unknown[] {
  return Array.isArray(value) ? value : [];
}

function text(value: unknown): string {
  return typeof value === "string" ? value : "";
}

function number(value: unknown): number {
  return typeof value === "number" && Number.isFinite(value) ? value : 0;
}

function rival(value: unknown): Rival {
  const given = fields(value);
  return { token: text(given.token), logprob: number(given.logprob) };
}

function entry(value: unknown): TokenEntry {
  const given = fields(value);
  const bytes = Array.isArray(given.bytes) ? given.bytes.map((one) => number(one) & 255) : null;
  return { ...rival(given), bytes, top: list(given.top).map(rival) };
}

function digits(value: unknown): string {
  return /^-?\d{1,20}$/.test(text(value)) ? text(value) : "";
}

function reply(value: unknown): Reply {
  const given = fields(value);
  const sent = fields(given.sent);
  const before = fields(given.given);
  const usage = fields(given.usage);
  const seed = digits(sent.seed);
  return {
    id: text(given.id),
    model: text(given.model),
    fingerprint: text(given.fingerprint),
    defaults: text(given.defaults),
    seed: digits(given.seed),
    content: text(given.content),
    reasoning: text(given.reasoning),
    calls: list(given.calls).flatMap((one) => {
      const call = fields(one);
      const read = { id: text(call.id), name: text(call.name), arguments: text(call.arguments) };
      return read.id && read.name ? [read] : [];
    }),
    tokens: list(given.tokens).map(entry),
    tokenIds: list(given.tokenIds).map(number),
    margins: list(given.margins).map((one) => (typeof one === "number" ? one : null)),
    finish: text(given.finish),
    ...(given.usage
      ? {
          usage: {
            prompt_tokens: number(usage.prompt_tokens),
            completion_tokens: number(usage.completion_tokens),
            prompt_tokens_details: { cached_tokens: number(fields(usage.prompt_tokens_details).cached_tokens) },
          },
        }
      : {}),
    ignored: list(given.ignored).map(text),
    ...(text(given.receipt) ? { receipt: text(given.receipt) } : {}),
    ...(text(given.error) ? { error: text(given.error) } : {}),
    sent: { body: fields(sent.body) as JsonObject, ...(seed ? { seed } : {}) },
    ...(given.given
      ? {
          given: {
            content: text(before.content),
            reasoning: text(before.reasoning),
            tokens: list(before.tokens).map(entry),
            ...(Array.isArray(before.ids) ? { ids: before.ids.map(number) } : {}),
          },
        }
      : {}),
    ...(Array.isArray(given.processed) ? { processed: given.processed.map(entry) } : {}),
    seconds: number(given.seconds),
    done: true,
  };
}

function message(value: unknown): Message | undefined {
  const given = fields(value);
  const role = given.role;
  if (!text(given.id) || (role !== "user" && role !== "assistant" && role !== "tool")) return undefined;
  return {
    id: text(given.id),
    parent: text(given.parent),
    role,
    content: text(given.content),
    ...(text(given.callId) ? { callId: text(given.callId) } : {}),
    ...(given.reply ? { reply: reply(given.reply) } : {}),
  };
}

function conversation(value: unknown): Conversation | undefined {
  const given = fields(value);
  if (!text(given.id)) return undefined;
  const messages: Record<string, Message> = Object.create(null) as Record<string, Message>;
  for (const one of Object.values(fields(given.messages))) {
    const read = message(one);
    if (read) messages[read.id] = read;
  }
  const shown: Record<string, string> = Object.create(null) as Record<string, string>;
  for (const [parent, child] of Object.entries(fields(given.shown))) shown[parent] = text(child);
  return {
    id: text(given.id),
    title: text(given.title),
    created: number(given.created),
    updated: number(given.updated),
    messages: { ...messages },
    shown: { ...shown },
  };
}

/** Return what of a list are conversations, each field what it should be. */
export function readConversations(value: unknown): Conversation[] {
  return list(value).flatMap((one) => conversation(one) ?? []);
}

/** A text that should be a JSON object, or why it is none. */
export function readObject(source: string): JsonObject | string {
  try {
    const value = JSON.parse(source) as Json;
    return typeof value === "object" && value !== null && !Array.isArray(value) ? value : "This is JSON, but no object.";
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
}
