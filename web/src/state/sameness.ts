/** Compares two replies to the same request, bit by bit. Pure. */
import type { TokenEntry } from "../api/types";

export interface Compared {
  fingerprint: string;
  seed: string;
  content: string;
  reasoning: string;
  finish: string;
  tokens: TokenEntry[];
  tokenIds: number[];
  margins: (number | null)[];
}

/** What came of a comparison. */
export type Sameness =
  | { same: true; tokens: number; numbers: number }
  | { same: false; at: number; what: string; before: string; after: string; environment: string };

/** Compare a reply with the one before: ids, log-probabilities with all rivals, margins, the end. */
export function sameness(before: Compared, after: Compared): Sameness {
  const environment =
    before.fingerprint === after.fingerprint
      ? ""
      : `The server's fingerprint is another one: ${before.fingerprint} → ${after.fingerprint}.`;
  const differs = (at: number, what: string, one: string, other: string): Sameness => ({
    same: false,
    at,
    what,
    before: one,
    after: other,
    environment,
  });
  const most = Math.max(before.tokenIds.length, after.tokenIds.length);
  let numbers = 0;
  for (let at = 0; at < most; at += 1) {
    const [one, other] = [before.tokens[at], after.tokens[at]];
    if (before.tokenIds[at] !== after.tokenIds[at] || one?.token !== other?.token) {
      return differs(at, "token", named(before, at), named(after, at));
    }
    const pairs = numbersOf(one, before.margins[at]);
    const others = numbersOf(other, after.margins[at]);
    const place = pairs.findIndex((value, i) => !Object.is(value, others[i]));
    if (place >= 0 || pairs.length !== others.length) {
      const i = place >= 0 ? place : pairs.length;
      return differs(at, i === 0 ? "log-probability" : "rival or margin", String(pairs[i]), String(others[i]));
    }
    numbers += pairs.length;
  }
  const [text, otherText] = [before, after].map((reply) => reply.reasoning + reply.content) as [string, string];
  if (text !== otherText) {
    let at = 0;
    while (at < text.length && text[at] === otherText[at]) at += 1;
    return differs(most, "text", cut(text, at), cut(otherText, at));
  }
  if (before.finish !== after.finish) return differs(most, "end", before.finish, after.finish);
  return { same: true, tokens: most, numbers };
}

/** The text from where it differs. */
function cut(text: string, at: number): string {
  return at >= text.length ? "the end" : JSON.stringify(text.slice(at, at + 40));
}

function numbersOf(entry: TokenEntry | undefined, margin: number | null | undefined): (number | null)[] {
  const numbers: (number | null)[] = entry ? [entry.logprob, ...entry.top.map((rival) => rival.logprob)] : [];
  return margin === undefined ? numbers : [...numbers, margin];
}

function named(reply: Compared, at: number): string {
  const id = reply.tokenIds[at];
  if (id === undefined) return "the end";
  const text = reply.tokens[at]?.token;
  return text === undefined ? `token ${id}` : `${JSON.stringify(text)} (token ${id})`;
}
