/** Builds a request from the settings: only what was filled in, so that the server's defaults stay the server's. Pure. */
import { readSeed } from "../api/lossless";
import type { JsonObject } from "../api/types";
import type { Sent } from "../state/conversation";
import { readObject } from "../state/reading";
import type { Settings } from "../state/settings";

/** A field that was filled in with something that cannot be sent. */
export class SettingFault extends Error {}

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_completion_tokens"] as const;

/** Throws `SettingFault` that names the field. */
export function bodyOf(settings: Settings, model: string, messages: JsonObject[]): Sent {
  const system = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  const body: JsonObject = { model, messages: [...system, ...messages] };
  for (const name of NUMBERS) {
    const typed = settings[name].trim();
    if (!typed) continue;
    const value = Number(typed);
    if (!Number.isFinite(value)) throw new SettingFault(`${name} is ${typed}, which is no number.`);
    body[name] = value;
  }
  const stop = settings.stop.split("\n").filter((line) => line !== "");
  if (stop.length) body.stop = stop;
  if (settings.reasoning_effort) body.reasoning_effort = settings.reasoning_effort;
  if (settings.tools.trim()) body.tools = toolsOf(settings.tools);
  if (settings.record) Object.assign(body, recorded(settings.rivals));
  if (settings.more.trim()) {
    const more = readObject(settings.more);
    if (typeof more === "string") throw new SettingFault(`The further fields are no JSON object: ${more}`);
    delete more.seed;
    delete more.stream;
    delete more.n;
    Object.assign(body, more);
  }
  return settings.draw || !settings.seed.trim() ? { body } : { body, seed: seedOf(settings.seed) };
}

/** The fields with which a reply can be shown token by token, and checked. */
function recorded(rivals: string): JsonObject {
  const top = Number(rivals);
  if (!Number.isInteger(top) || top < 0 || top > 20) throw new SettingFault("Rivals per token must be 0 to 20.");
  return { logprobs: true, top_logprobs: top, margins: true, return_token_ids: true, receipt: true };
}

function seedOf(typed: string): string {
  const seed = readSeed(typed);
  if (seed === undefined) throw new SettingFault(`The seed ${typed.trim()} is no integer of 64 bits.`);
  return seed;
}

/** Tools as the API has them: a list of them, one alone, or bare functions. */
export function toolsOf(typed: string): JsonObject[] {
  let given: unknown;
  try {
    given = JSON.parse(typed);
  } catch (error) {
    throw new SettingFault(`The tools are no JSON: ${error instanceof Error ? error.message : ""}`);
  }
  return (Array.isArray(given) ? given : [given]).map((one: unknown) => {
    if (typeof one !== "object" || one === null) throw new SettingFault("Each tool must be a JSON object.");
    const tool = one as JsonObject;
    return "function" in tool ? tool : { type: "function", function: tool };
  });
}
