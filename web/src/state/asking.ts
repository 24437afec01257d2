/** Asks for replies: a new one, the same again, with the next seed, several side by side, on from a token. */
import { signal } from "@preact/signals";
import { told } from "../api/client";
import { emptyReply, generate, snapshot } from "../api/generation";
import { nextSeed } from "../api/lossless";
import type { JsonObject } from "../api/types";
import { bodyOf } from "../request/body";
import { type Conversation, type Given, type Message, type Reply, type Sent, forApi, newId, pathTo, ROOT, withMessage } from "./conversation";
import { current, find, flush, keep } from "./history";
import { chosen, models } from "./models";
import { sameness } from "./sameness";
import { announced } from "./session";
import { set, settings } from "./settings";

/** Replies under way, by the message that each becomes. */
export const running = signal<ReadonlyMap<string, AbortController>>(new Map());
/** What of the settings cannot be sent. */
export const fault = signal("");
/** The message whose replies are shown side by side, or nothing. */
export const beside = signal("");
/** The reply whose tokens, receipt and request the other tabs show. */
export const selected = signal("");

export function stop(id?: string): void {
  for (const [message, controller] of running.value) if (id === undefined || id === message) controller.abort();
}

function track(id: string, controller: AbortController | undefined): void {
  const next = new Map(running.value);
  if (controller) next.set(id, controller);
  else next.delete(id);
  running.value = next;
}

function defaultsOf(id: string): string {
  return models.value.find((one) => one.id === id)?.defaults_fingerprint ?? "";
}

/** Say something in the conversation that is open: under `parent`, or at its end. */
export function say(role: "user" | "tool", content: string, parent: string, callId?: string): Message {
  const message: Message = { id: newId(), parent, role, content, ...(callId ? { callId } : {}) };
  keep(withMessage(current.value, message, Date.now()));
  return message;
}

/** Ask for a reply to the messages up to `parent`. Returns whether it could be sent. */
export function ask(parent: string): boolean {
  const sent = requestFor(current.value, parent);
  if (sent) void reply(current.value.id, parent, sent);
  return sent !== undefined;
}

function requestFor(conversation: Conversation, parent: string): Sent | undefined {
  try {
    const sent = bodyOf(settings.value, chosen.value, pathTo(conversation, parent).map(forApi));
    fault.value = "";
    return sent;
  } catch (error) {
    fault.value = told(error);
    return undefined;
  }
}

/** Ask for `count` replies at once, each with the seed after the one before. */
export function askBeside(parent: string, count: number): void {
  const sent = requestFor(current.value, parent);
  if (!sent) return;
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  const first = sent.seed ?? String((high! & 0xfffff) * 2 ** 32 + low!);
  beside.value = parent;
  for (let i = 0; i < count; i += 1) void reply(current.value.id, parent, { ...sent, seed: nextSeed(first, i) });
}

/** The reply's request once more, with the next seed: another branch. */
export function askNext(message: Message): void {
  const { reply: before } = message;
  if (!before) return;
  const sent = { body: before.sent.body, seed: nextSeed(before.seed || "0") };
  set("seed", sent.seed);
  void reply(current.value.id, message.parent, sent, before.given);
}

/**
 * Go on from a token of a reply, or from one that takes its place: another branch, which begins as the reply does. By the
 * tokens' ids where they are known, and the branch is then the reply itself if nothing else is changed; else by their text.
 */
export function goOn(message: Message, given: Given): void {
  const before = message.reply;
  if (!before) return;
  const { continue_token_ids: _, continue_final_message: byText, ...rest } = before.sent.body;
  const turns = Array.isArray(rest.messages) ? rest.messages : [];
  const history = byText === true ? turns.slice(0, -1) : turns;
  const last: JsonObject = {
    role: "assistant",
    ...(given.content || !given.reasoning ? { content: given.content } : {}),
    ...(given.reasoning ? { reasoning_content: given.reasoning } : {}),
  };
  const body: JsonObject = given.ids
    ? { ...rest, ...shorter(rest, before, given.ids), messages: history, continue_token_ids: given.ids }
    : { ...rest, messages: [...history, last], continue_final_message: true, add_generation_prompt: false };
  void reply(current.value.id, message.parent, before.seed ? { body, seed: before.seed } : { body }, given);
}

/** The limit counts what is new: without the tokens that are given now, the branch ends where the reply did. */
function shorter(body: JsonObject, before: Reply, ids: number[]): JsonObject {
  const most = body.max_completion_tokens;
  if (typeof most !== "number") return {};
  const left = most - (ids.length - (before.given?.ids?.length ?? 0));
  return left > 0 ? { max_completion_tokens: left } : {};
}

async function reply(place: string, parent: string, sent: Sent, given?: Given): Promise<void> {
  const id = newId();
  const controller = new AbortController();
  const grown = emptyReply(sent, defaultsOf(String(sent.body.model)));
  if (given) grown.given = given;
  let frame = 0;
  const show = (): void => {
    frame = 0;
    const conversation = find(place);
    if (!conversation) return;
    const content = (given?.content ?? "") + grown.content;
    const message: Message = { id, parent, role: "assistant", content, reply: snapshot(grown) };
    keep(withMessage(conversation, message, Date.now()));
  };
  track(id, controller);
  show();
  try {
    await generate(grown, controller.signal, () => {
      frame ||= requestAnimationFrame(show);
    });
    announced.value = `The reply is complete: ${grown.tokenIds.length || (grown.usage?.completion_tokens ?? 0)} tokens.`;
  } catch (error) {
    if (controller.signal.aborted) grown.finish ||= "stopped";
    else grown.error = told(error);
    announced.value = controller.signal.aborted ? "Stopped." : told(error);
  }
  cancelAnimationFrame(frame);
  grown.done = true;
  track(id, undefined);
  show();
  flush();
  if (grown.seed && settings.value.draw && beside.value !== parent) set("seed", grown.seed);
}

/** Ask for the same again, and note at the reply whether it is. */
export async function askAgain(message: Message): Promise<void> {
  const before = message.reply;
  if (!before?.seed) return;
  const place = current.value.id;
  const again = emptyReply({ body: before.sent.body, seed: before.seed }, before.defaults);
  const key = `${message.id} again`;
  const controller = new AbortController();
  track(key, controller);
  try {
    await generate(again, controller.signal, () => undefined);
    if (again.error) throw new Error(again.error);
    const found = sameness(before, again);
    note(place, message.id, { sameness: found });
    announced.value = found.same ? "The same, to the bit." : "Not the same.";
  } catch (error) {
    if (!controller.signal.aborted) note(place, message.id, { error: told(error) });
  } finally {
    track(key, undefined);
  }
}

/** Ask once more for the distribution that was drawn from: the same reply, with other numbers beside it. */
export async function askProcessed(message: Message): Promise<string> {
  const before = message.reply;
  if (!before?.seed) return "";
  const place = current.value.id;
  const body: JsonObject = { ...before.sent.body, logprobs_mode: "processed" };
  const again = emptyReply({ body, seed: before.seed }, before.defaults);
  try {
    await generate(again, new AbortController().signal, () => undefined);
  } catch (error) {
    return told(error);
  }
  if (again.error) return again.error;
  const same = again.tokenIds.every((id, i) => id === before.tokenIds[i]) && again.tokenIds.length === before.tokenIds.length;
  if (!same) return "The reply is not the same again, so that its numbers cannot stand beside these.";
  note(place, message.id, { processed: again.tokens });
  return "";
}

function note(place: string, id: string, news: Partial<Reply>): void {
  const conversation = find(place);
  const message = conversation?.messages[id];
  if (!conversation || !message?.reply) return;
  const { error: _, ...rest } = message.reply;
  keep(withMessage(conversation, { ...message, reply: { ...rest, ...news } }, Date.now()));
}

export { ROOT };
