/** In what two receipts differ, causes first, as `verbatim diff` says it. Pure. */
import type { Json } from "../api/types";
import { differences } from "../fingerprint/compare";
import { object, type Receipt, type ReceiptChoice } from "./document";

export interface Difference {
  part: "request" | "prompt" | "model" | "environment" | "token" | "score" | "end";
  where: string;
  before: string;
  after: string;
  /** Of a token: its place in which choice. */
  place?: { choice: number; at: number };
}

export function receiptDifferences(a: Receipt, b: Receipt): Difference[] {
  return [
    ...leaves(a.request, b.request, "request"),
    ...(a.prompt.sha256 === b.prompt.sha256
      ? []
      : [row("prompt", "", `${a.prompt.tokens} tokens`, `${b.prompt.tokens} tokens`)]),
    ...differences(a.files, b.files).map((one) => row("model", one.name, short(one.before), short(one.after))),
    ...differences(a.parts, b.parts).map((one) => row("environment", one.name, one.before, one.after)),
    ...a.choices.flatMap((one, i) => (b.choices[i] ? choices(one, b.choices[i], i) : [])),
    ...(a.choices.length === b.choices.length
      ? []
      : [row("request", "choices", String(a.choices.length), String(b.choices.length))]),
  ];
}

function row(part: Difference["part"], where: string, before: string, after: string): Difference {
  return { part, where, before, after };
}

function short(digest: string): string {
  return digest.length > 16 ? `${digest.slice(0, 16)}…` : digest;
}

function leaves(a: Json, b: Json, part: Difference["part"]): Difference[] {
  const [first, second] = [flat(a, ""), flat(b, "")];
  const names = [...new Set([...first.keys(), ...second.keys()])].sort();
  return names.flatMap((name) => {
    const [before, after] = [first.get(name) ?? "absent", second.get(name) ?? "absent"];
    return before === after ? [] : [row(part, name, cut(before), cut(after))];
  });
}

/** The values inside JSON data by their dotted paths. */
function flat(value: Json, path: string): Map<string, string> {
  const inner = Array.isArray(value) ? Object.entries(value) : Object.entries(object(value));
  if (inner.length === 0) return new Map([[path, JSON.stringify(value)]]);
  return new Map(inner.flatMap(([name, one]) => [...flat(one, path ? `${path}.${name}` : name)]));
}

function cut(text: string): string {
  return text.length > 80 ? `${text.slice(0, 80)}…` : text;
}

function choices(a: ReceiptChoice, b: ReceiptChoice, choice: number): Difference[] {
  const most = Math.max(a.ids.length, b.ids.length);
  for (let at = 0; at < most; at += 1) {
    if (a.ids[at] !== b.ids[at]) {
      const [before, after] = [a, b].map((one) => (at < one.ids.length ? `token ${one.ids[at]}` : "the end"));
      const where = `choice ${choice}, token ${at + 1}`;
      return [{ ...row("token", where, before ?? "", after ?? ""), place: { choice, at } }];
    }
  }
  if (a.finish !== b.finish) return [row("end", `choice ${choice}`, a.finish, b.finish)];
  if (a.bits === b.bits) return [];
  const at = a.scores.findIndex((score, i) => !Object.is(score, b.scores[i]));
  const where = `choice ${choice}, the score of drawn token ${Math.floor(at / 2) + 1}`;
  return [row("score", where, String(a.scores[at]), String(b.scores[at]))];
}
