/** Reads a receipt, alone, signed, or inside a reply, as far as the page shows and compares it. Proves nothing. Pure. */
import type { Json, JsonObject } from "../api/types";

export interface ReceiptChoice {
  index: number;
  finish: string;
  tokens: number;
  ids: number[];
  /** Pairs of a raw log-probability and a perturbed score, for each token that was drawn. */
  scores: Float32Array;
  bits: string;
}

export interface Receipt {
  id: string;
  created: number;
  model: string;
  files: Record<string, string>;
  fingerprint: string;
  parts: Record<string, string>;
  law: { holds: boolean; reason: string };
  request: JsonObject;
  prompt: { tokens: number; sha256: string };
  choices: ReceiptChoice[];
  digest: string;
  signed: boolean;
}

export function receiptOf(text: string): Receipt | undefined {
  try {
    return read(JSON.parse(text) as Json);
  } catch {
    return undefined;
  }
}

function read(document: Json): Receipt | undefined {
  const outer = object(document);
  if ("receipt" in outer && !("digest" in outer)) return read(outer.receipt ?? null);
  if ("payload" in outer) {
    const bytes = Uint8Array.from(atob(text(outer.payload)), (one) => one.charCodeAt(0));
    const statement = object(JSON.parse(new TextDecoder().decode(bytes)) as Json);
    const inner = read(statement.predicate ?? null);
    return inner && { ...inner, signed: true };
  }
  if (typeof outer.digest !== "string" || !("choices" in outer)) return undefined;
  const [model, environment, law, prompt] = [outer.model, outer.environment, outer.law, outer.prompt].map(object);
  return {
    id: text(outer.id),
    created: number(outer.created),
    model: text(model?.name),
    files: Object.fromEntries(list(model?.resources).map((one) => [text(object(one).name), text(object(one).digest)])),
    fingerprint: text(environment?.fingerprint),
    parts: texts(environment?.parts),
    law: { holds: law?.holds === true, reason: text(law?.reason) },
    request: object(outer.request),
    prompt: { tokens: number(prompt?.tokens), sha256: text(prompt?.sha256) },
    choices: list(outer.choices).map((one) => choice(object(one))),
    digest: outer.digest,
    signed: false,
  };
}

function choice(given: JsonObject): ReceiptChoice {
  return {
    index: number(given.index),
    finish: text(given.finish_reason),
    tokens: number(given.tokens),
    ids: list(given.token_ids).map(number),
    scores: floats(text(given.scores)),
    bits: text(given.bits),
  };
}

function floats(base64: string): Float32Array {
  const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float32Array.from({ length: Math.floor(bytes.length / 4) }, (_, i) => view.getFloat32(4 * i, true));
}

export function object(value: Json | undefined): JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value) ? value : {};
}

function list(value: Json | undefined): Json[] {
  return Array.isArray(value) ? value : [];
}

function text(value: Json | undefined): string {
  return typeof value === "string" ? value : "";
}

function number(value: Json | undefined): number {
  return typeof value === "number" ? value : 0;
}

export function texts(value: Json | undefined): Record<string, string> {
  const entries = Object.entries(object(value));
  return Object.fromEntries(entries.map(([name, one]) => [name, typeof one === "string" ? one : JSON.stringify(one)]));
}
