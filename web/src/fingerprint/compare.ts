/** In which parts two fingerprints differ, and the reading of a pasted one. Pure. */
import type { Json } from "../api/types";
import { object, texts } from "../receipts/document";

export interface PartDifference {
  name: string;
  before: string;
  after: string;
}

export function differences(a: Record<string, string>, b: Record<string, string>): PartDifference[] {
  const names = [...new Set([...Object.keys(a), ...Object.keys(b)])].sort();
  return names.flatMap((name) => {
    const [before, after] = [name in a ? a[name]! : "absent", name in b ? b[name]! : "absent"];
    return before === after ? [] : [{ name, before, after }];
  });
}

export interface Pasted {
  id: string;
  fingerprint: string;
  parts: Record<string, string>;
  defaults: string;
  defaultParts: Record<string, string>;
}

/** Read what `verbatim fingerprint --json` or `GET /v1/models/ID` wrote, or a receipt's environment. Or say why not. */
export function readPasted(text: string, id: string): Pasted | string {
  let document: Json;
  try {
    document = JSON.parse(text) as Json;
  } catch (error) {
    return `This is no JSON: ${error instanceof Error ? error.message : ""}`;
  }
  const { data } = object(document);
  const several = Array.isArray(document) ? document : Array.isArray(data) ? data : [document];
  const found = several.map(object).filter((one) => "fingerprint_parts" in one || "environment" in one);
  const one = found.find((model) => model.id === id) ?? found[0];
  if (!one) return "This holds no fingerprint_parts: paste what the command verbatim fingerprint --json prints.";
  const environment = object(one.environment);
  const named = (value: Json | undefined): string => (typeof value === "string" ? value : "");
  return {
    id: named(one.id),
    fingerprint: named(one.system_fingerprint) || named(environment.fingerprint),
    parts: texts(one.fingerprint_parts ?? environment.parts),
    defaults: named(one.defaults_fingerprint),
    defaultParts: texts(one.default_parts),
  };
}
