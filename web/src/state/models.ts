/** The server's models and their states, asked for again and again while the page is seen. */
import { computed, effect, signal } from "@preact/signals";
import { ApiError, get, post, told } from "../api/client";
import type { Model } from "../api/types";
import { key, keyRefused, reachable } from "./session";

const QUIET = 5000;
const BUSY = 1000;

export const models = signal<Model[]>([]);
/** Whether the list has come at least once. */
export const listed = signal(false);
export const chosen = signal("");
export const modelsFault = signal("");

export const model = computed(() => models.value.find((one) => one.id === chosen.value));
export const onlyDemo = computed(
  () => models.value.length > 0 && models.value.every((one) => one.id === "demo" || one.id.startsWith("demo:")),
);

const TOLD: Record<string, string> = {
  ready: "ready",
  loading: "loading",
  waiting: "waiting to load",
  unloaded: "not loaded",
  failed: "failed",
  dead: "stopped",
};

/** A model's state in a few words. */
export function stateOf(one: Model): string {
  const words = TOLD[one.state] ?? one.state;
  const { progress } = one;
  if (one.state === "loading" && progress && progress.total_bytes > 0) {
    return `${words}, ${Math.floor((100 * progress.bytes) / progress.total_bytes)} %`;
  }
  return words;
}

export async function refresh(): Promise<void> {
  try {
    const { data } = await get<{ data: Model[] }>("/v1/models");
    models.value = data;
    listed.value = true;
    modelsFault.value = "";
    if (!data.some((one) => one.id === chosen.value)) {
      chosen.value = (data.find((one) => one.state === "ready") ?? data[0])?.id ?? "";
    }
  } catch (error) {
    if (error instanceof ApiError && error.status !== 0 && error.status !== 401) modelsFault.value = told(error);
  }
}

/** Load a model into memory, or take it out. Returns what went wrong, or nothing. */
export async function change(id: string, what: "load" | "unload"): Promise<string> {
  try {
    await post(`/v1/models/${encodeURIComponent(id)}/${what}`, "{}");
    return "";
  } catch (error) {
    if (error instanceof ApiError && (error.status === 404 || error.status === 405) && error.code !== "model_not_found") {
      return `This server cannot ${what} models while it runs.`;
    }
    return told(error);
  } finally {
    await refresh();
  }
}

/** Ask for the list now, and then for as long as the page is open. */
export function watchModels(): void {
  let timer = 0;
  const again = async (): Promise<void> => {
    clearTimeout(timer);
    if (!document.hidden && (keyRefused.value === null || key.value)) await refresh();
    const busy = !reachable.value || models.value.some((one) => ["loading", "waiting", "unloading"].includes(one.state));
    timer = window.setTimeout(() => void again(), busy ? BUSY : QUIET);
  };
  document.addEventListener("visibilitychange", () => void again());
  effect(() => {
    void key.value;
    queueMicrotask(() => void again());
  });
}
