/** A conversation as a tree: each message has the answers and the other wordings that followed it. Pure. */
import type { JsonObject, TokenEntry, ToolCall, Usage } from "../api/types";
import type { Sameness } from "./sameness";

/** What was sent, without the seed: that one may have more digits than a number here. */
export interface Sent {
  body: JsonObject;
  seed?: string;
}

/** The beginning of a reply: its text, its tokens, and their ids where all are known. */
export interface Given {
  content: string;
  reasoning: string;
  tokens: TokenEntry[];
  ids?: number[];
}

/** A reply and what is known of how it came about. */
export interface Reply {
  id: string;
  model: string;
  fingerprint: string;
  defaults: string;
  seed: string;
  content: string;
  reasoning: string;
  calls: ToolCall[];
  tokens: TokenEntry[];
  tokenIds: number[];
  margins: (number | null)[];
  finish: string;
  usage?: Usage;
  ignored: string[];
  receipt?: string;
  error?: string;
  sent: Sent;
  /** Of a reply that goes on from another's token: the text and the tokens that it was given. */
  given?: Given;
  /** The rivals under the distribution that was drawn from, once they were asked for. */
  processed?: TokenEntry[];
  sameness?: Sameness;
  seconds: number;
  done: boolean;
}

export interface Message {
  id: string;
  parent: string;
  role: "user" | "assistant" | "tool";
  content: string;
  callId?: string;
  reply?: Reply;
}

export interface Conversation {
  id: string;
  title: string;
  created: number;
  updated: number;
  messages: Record<string, Message>;
  /** For each message, and for the root "", the one after it that is shown. */
  shown: Record<string, string>;
}

export const ROOT = "";

export function newId(): string {
  return crypto.getRandomValues(new Uint32Array(3)).reduce((text, part) => text + part.toString(36), "");
}

export function emptyConversation(now: number): Conversation {
  return { id: newId(), title: "", created: now, updated: now, messages: {}, shown: {} };
}

/** The messages after one, in the order in which they were written. */
export function childrenOf(conversation: Conversation, parent: string): Message[] {
  return Object.values(conversation.messages).filter((one) => one.parent === parent);
}

/** The messages that are shown, from the first one. */
export function pathOf(conversation: Conversation): Message[] {
  const path: Message[] = [];
  for (let at = ROOT; path.length < 100_000; ) {
    const next = conversation.messages[conversation.shown[at] ?? ""];
    if (!next || next.parent !== at) return path;
    path.push(next);
    at = next.id;
  }
  return path;
}

/** The messages from the first one up to one of them, which is included. */
export function pathTo(conversation: Conversation, id: string): Message[] {
  const path: Message[] = [];
  for (let at: Message | undefined = conversation.messages[id]; at; at = conversation.messages[at.parent]) {
    path.unshift(at);
    if (path.length > 100_000) break;
  }
  return path;
}

/** Add a message, or put another in its place, and show it. */
export function withMessage(conversation: Conversation, message: Message, now: number): Conversation {
  const first = conversation.title === "" && message.role === "user";
  return {
    ...conversation,
    title: first ? titleOf(message.content) : conversation.title,
    updated: now,
    messages: { ...conversation.messages, [message.id]: message },
    shown: conversation.messages[message.id]
      ? conversation.shown
      : { ...conversation.shown, [message.parent]: message.id },
  };
}

export function showing(conversation: Conversation, message: Message): Conversation {
  return { ...conversation, shown: { ...conversation.shown, [message.parent]: message.id } };
}

export function titleOf(text: string): string {
  const line = text.trim().split("\n", 1)[0] ?? "";
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

/** A message as the API takes it. */
export function forApi(message: Message): JsonObject {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.callId ?? "", content: message.content };
  if (message.role === "user") return { role: "user", content: message.content };
  const { reply } = message;
  return {
    role: "assistant",
    content: message.content,
    ...(reply?.reasoning ? { reasoning_content: reply.reasoning } : {}),
    ...(reply?.calls.length
      ? {
          tool_calls: reply.calls.map((call) => ({
            id: call.id,
            type: "function",
            function: { name: call.name, arguments: call.arguments },
          })),
        }
      : {}),
  };
}
