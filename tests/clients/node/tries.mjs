// What the scripts of clients for Node share: as tests/clients/python/tries.py, which says it in full.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

export const ROOT = process.env.CLIENT_ROOT;
export const BASE = `${ROOT}/v1`;
export const MODEL = "test";
export const KEY = "none";
export const QUESTION = "What is 2 + 2?";
export const ANSWER = "The answer is 4.";
export const ADD = { call: "add", arguments: { a: 2, b: 2 } };
export const DRAWN = { drawn: "[a-z]{16}" };

// Packages lie in the client's own environment, not beside its script.
const require = createRequire(path.join(process.env.CLIENT_ENVIRONMENT, "package.json"));
export const load = (name) => import(pathToFileURL(require.resolve(name)));

export async function run(endpoint, tries) {
  for (const [name, what] of Object.entries(tries)) {
    const [attempt, script] = Array.isArray(what) ? what : [what, {}];
    await fetch(`${ROOT}/scripted`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ endpoint, try: name, ...script }),
    });
    const started = Date.now();
    let error = "";
    try {
      await attempt();
    } catch (failed) {
      console.error(failed);
      error = `${failed?.name}: ${failed?.message}`.slice(0, 2000);
    }
    const line = { endpoint, try: name, error, seconds: (Date.now() - started) / 1000 };
    fs.appendFileSync(process.env.CLIENT_RESULTS, JSON.stringify(line) + "\n");
  }
}

export function same(found, wanted) {
  const [one, other] = [JSON.stringify(found), JSON.stringify(wanted)];
  if (one !== other) throw new Error(`${one?.slice(0, 300)} instead of ${other?.slice(0, 300)}`);
}

export async function seeded(ask) {
  const [first, again, other] = [await ask(7), await ask(7), await ask(8)];
  same(again, first);
  if (!first || other === first) throw new Error(`the seed has no effect: ${first.slice(0, 300)}`);
}
