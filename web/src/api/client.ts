/** Requests to the server that sent the page, and to no other: every address here is a path. */
import { key, keyRefused, reachable } from "../state/session";
import type { Json, JsonObject } from "./types";

/** What the server refused, in its own words. `status` 0: it did not answer. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
    readonly code = "",
    readonly param: string | null = null,
  ) {
    super(message);
  }
}

export interface Answer {
  text: string;
  headers: Headers;
}

/** Send a request and return the response with its body unread; refusals and silence are `ApiError`s. */
export async function send(path: string, init: RequestInit = {}): Promise<Response> {
  const headers = new Headers(init.headers);
  if (key.value) headers.set("Authorization", `Bearer ${key.value}`);
  if (init.body !== undefined) headers.set("Content-Type", "application/json");
  headers.set("Accept", "application/json, text/event-stream");
  let response: Response;
  try {
    response = await fetch(path, { ...init, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    reachable.value = false;
    throw new ApiError("The server does not answer.", 0);
  }
  reachable.value = true;
  if (response.ok) {
    if (path.startsWith("/v1/models")) keyRefused.value = null;
    return response;
  }
  throw await refusal(response);
}

async function refusal(response: Response): Promise<ApiError> {
  let told: JsonObject = {};
  try {
    const body = (await response.json()) as { error?: Json };
    if (body.error && typeof body.error === "object" && !Array.isArray(body.error)) told = body.error;
  } catch {
    // not the server's own words: a proxy's
  }
  const message = typeof told.message === "string" ? told.message : `The server answered ${response.status}.`;
  if (response.status === 401) keyRefused.value = message;
  return new ApiError(
    message,
    response.status,
    typeof told.code === "string" ? told.code : "",
    typeof told.param === "string" ? told.param : null,
  );
}

export async function getText(path: string): Promise<Answer> {
  const response = await send(path);
  return { text: await response.text(), headers: response.headers };
}

export async function get<T>(path: string): Promise<T> {
  return JSON.parse((await getText(path)).text) as T;
}

export async function post(path: string, body: string, signal?: AbortSignal): Promise<Answer> {
  const response = await send(path, { method: "POST", body, ...(signal ? { signal } : {}) });
  return { text: await response.text(), headers: response.headers };
}

/** What went wrong, for people. */
export function told(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
