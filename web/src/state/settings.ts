/** The parameters that the next request will have, as they were typed; kept in this browser. */
import { effect, signal } from "@preact/signals";

export interface Settings {
  system: string;
  temperature: string;
  top_p: string;
  top_k: string;
  min_p: string;
  max_completion_tokens: string;
  stop: string;
  reasoning_effort: string;
  tools: string;
  more: string;
  /** The seed that is typed or was drawn last. */
  seed: string;
  /** Whether the server draws a new seed for each reply. */
  draw: boolean;
  /** Whether replies come with their tokens, margins and receipts. */
  record: boolean;
  rivals: string;
  /** How many replies stand side by side. */
  beside: string;
}

export const DEFAULTS: Settings = {
  system: "",
  temperature: "",
  top_p: "",
  top_k: "",
  min_p: "",
  max_completion_tokens: "",
  stop: "",
  reasoning_effort: "",
  tools: "",
  more: "",
  seed: "",
  draw: true,
  record: true,
  rivals: "5",
  beside: "3",
};

const STORED = "verbatim-settings";

export const settings = signal<Settings>(read());
export const settingsOpen = signal(false);

export function set<Name extends keyof Settings>(name: Name, value: Settings[Name]): void {
  settings.value = { ...settings.value, [name]: value };
}

function read(): Settings {
  try {
    const given = JSON.parse(localStorage.getItem(STORED) ?? "{}") as Record<string, unknown>;
    const known = Object.entries(DEFAULTS).map(([name, value]) => [
      name,
      typeof given[name] === typeof value ? given[name] : value,
    ]);
    return Object.fromEntries(known) as Settings;
  } catch {
    return { ...DEFAULTS };
  }
}

export function keepSettings(): void {
  effect(() => {
    try {
      localStorage.setItem(STORED, JSON.stringify(settings.value));
    } catch {
      // the browser keeps nothing for this page
    }
  });
}
