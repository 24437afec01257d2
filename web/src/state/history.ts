/** Conversations in this browser, and nowhere else: IndexedDB, or memory where the browser keeps nothing. */
import { computed, signal } from "@preact/signals";
import { type Conversation, emptyConversation, pathOf } from "./conversation";
import { readConversations } from "./reading";

const STORE = "conversations";

export const conversations = signal<Conversation[]>([]);
export const current = signal<Conversation>(emptyConversation(Date.now()));
export const kept = signal(true);
export const path = computed(() => pathOf(current.value));

let database: IDBDatabase | undefined;
const pending = new Map<string, number>();

function opened(): Promise<IDBDatabase> {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("verbatim", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error ?? new Error("no database"));
    request.onblocked = () => reject(new Error("the database is in use"));
  });
}

function done<T>(request: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error ?? new Error("the database has failed"));
  });
}

export async function openHistory(): Promise<void> {
  try {
    database = await opened();
    const found: unknown = await done(database.transaction(STORE).objectStore(STORE).getAll());
    conversations.value = newestFirst(readConversations(found));
  } catch {
    kept.value = false;
  }
}

function newestFirst(all: Conversation[]): Conversation[] {
  return [...all].sort((a, b) => b.updated - a.updated);
}

/** Put a changed conversation into the list, and write it soon: a reply changes many times a second. */
export function keep(changed: Conversation): void {
  if (current.value.id === changed.id) current.value = changed;
  const rest = conversations.value.filter((one) => one.id !== changed.id);
  conversations.value = newestFirst([changed, ...rest]);
  if (pending.has(changed.id)) return;
  pending.set(changed.id, window.setTimeout(() => void written(changed.id), 400));
}

async function written(id: string): Promise<void> {
  clearTimeout(pending.get(id));
  pending.delete(id);
  const found = conversations.value.find((one) => one.id === id);
  if (!database || !found) return;
  try {
    await done(database.transaction(STORE, "readwrite").objectStore(STORE).put(found));
  } catch {
    kept.value = false;
  }
}

/** Write what has not been written. */
export function flush(): void {
  for (const id of [...pending.keys()]) void written(id);
}

export function find(id: string): Conversation | undefined {
  return conversations.value.find((one) => one.id === id) ?? (current.value.id === id ? current.value : undefined);
}

export function startNew(): void {
  current.value = emptyConversation(Date.now());
}

export function open(conversation: Conversation): void {
  current.value = conversation;
}

export async function remove(ids: string[]): Promise<void> {
  const gone = new Set(ids);
  conversations.value = conversations.value.filter((one) => !gone.has(one.id));
  if (gone.has(current.value.id)) startNew();
  if (!database) return;
  const store = database.transaction(STORE, "readwrite").objectStore(STORE);
  await Promise.all(ids.map((id) => done(store.delete(id)))).catch(() => undefined);
}

const FORMAT = "verbatim-conversations";

export function exported(): string {
  return JSON.stringify({ format: FORMAT, version: 1, conversations: conversations.value }, null, 1);
}

/** Take in what `exported` wrote, here or elsewhere. Returns how many; throws if it is no such file. */
export function imported(text: string): number {
  const data: unknown = JSON.parse(text);
  if (typeof data !== "object" || data === null || !("format" in data) || data.format !== FORMAT) {
    throw new Error("This is no file of conversations that this page has written.");
  }
  const found = readConversations("conversations" in data ? data.conversations : []);
  for (const one of found) keep(one);
  return found.length;
}
