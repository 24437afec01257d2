/** A reply's tokens with what is known of each, and the beginning of a reply up to one of them. Pure. */
import type { TokenEntry } from "../api/types";
import type { Reply } from "../state/conversation";

/** A token in its place. `given`: the reply was begun with it; `at`: its place among those that were drawn. */
export interface Piece {
  entry: TokenEntry;
  given: boolean;
  at: number;
  id?: number;
  margin?: number | null;
  processed?: TokenEntry;
}

export function piecesOf(reply: Reply): Piece[] {
  const before = (reply.given?.tokens ?? []).map((entry, at): Piece => ({ entry, given: true, at }));
  const drawn = reply.tokens.map((entry, at): Piece => {
    const [id, margin, processed] = [reply.tokenIds[at], reply.margins[at], reply.processed?.[at]];
    return {
      entry,
      given: false,
      at,
      ...(id === undefined ? {} : { id }),
      ...(margin === undefined ? {} : { margin }),
      ...(processed === undefined ? {} : { processed }),
    };
  });
  return [...before, ...drawn];
}

/** The text of tokens: their bytes as UTF-8, without a character that is cut. */
export function textOf(tokens: readonly TokenEntry[]): string {
  const encoder = new TextEncoder();
  const bytes = tokens.flatMap((entry) => entry.bytes ?? [...encoder.encode(entry.token)]);
  return new TextDecoder().decode(new Uint8Array(bytes), { stream: true });
}

/** Thoughts and answer in a reply's tokens, by the texts that open and close the model's thoughts. */
export function parted(
  tokens: readonly TokenEntry[],
  marks: { open: string; close: string } | null | undefined,
  thinks: boolean,
): { content: string; reasoning: string } {
  const text = textOf(tokens);
  if (!marks || !thinks) return { content: text, reasoning: "" };
  const begun = text.indexOf(marks.open.trim());
  const inner = begun < 0 ? text : text.slice(begun + marks.open.trim().length);
  const end = inner.indexOf(marks.close.trim());
  if (end < 0) return { content: "", reasoning: inner.replace(/^\s+/, "") };
  return {
    content: inner.slice(end + marks.close.trim().length).replace(/^\s+/, ""),
    reasoning: inner.slice(0, end).trim(),
  };
}

/** How surprising a token was, from 0 (certain) to 1 (a probability of e⁻⁵ or less). */
export function surprise(logprob: number): number {
  return Math.min(1, Math.max(0, -logprob / 5));
}
