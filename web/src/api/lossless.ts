/**
 * Numbers of JSON that JavaScript cannot hold. A seed may have 64 bits, and a receipt's digest is over its exact values:
 * both are kept as the text that came, and are sent as that text.
 */

/** The reply's seed, as its digits. The head of a reply comes before any text, so the first such name is the one. */
export function seedIn(json: string): string | undefined {
  return /"seed":(-?\d+)/.exec(json)?.[1];
}

/** The receipt at the end of a reply or of a stream's last event, as its JSON text. */
export function receiptIn(json: string): string | undefined {
  const start = json.lastIndexOf(',"receipt":{"');
  if (start < 0 || !json.endsWith("}")) return undefined;
  const text = json.slice(start + ',"receipt":'.length, -1);
  try {
    JSON.parse(text);
    return text;
  } catch {
    return undefined;
  }
}

/** The JSON of a body, with a seed of any size. */
export function bodyWithSeed(body: object, seed: string | undefined): string {
  const json = JSON.stringify(body);
  if (seed === undefined) return json;
  return json === "{}" ? `{"seed":${seed}}` : `${json.slice(0, -1)},"seed":${seed}}`;
}

const [LEAST, MOST] = [-(2n ** 63n), 2n ** 63n - 1n];

/** A seed as somebody typed it: an integer of 64 bits, with a sign. Undefined: it is none. */
export function readSeed(text: string): string | undefined {
  if (!/^-?\d{1,20}$/.test(text.trim())) return undefined;
  const value = BigInt(text.trim());
  return value >= LEAST && value <= MOST ? value.toString() : undefined;
}

export function nextSeed(seed: string, by = 1): string {
  const next = BigInt(seed) + BigInt(by);
  return (next <= MOST ? next : LEAST + next - MOST - 1n).toString();
}
