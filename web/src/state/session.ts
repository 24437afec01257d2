/** What lasts as long as this tab: the key, the place on the page, whether the server answers. And the theme. */
import { effect, signal } from "@preact/signals";

export const TABS = ["chat", "tokens", "receipts", "fingerprint", "request", "machine"] as const;
export type Tab = (typeof TABS)[number];

const KEY = "verbatim-key";
const THEME = "verbatim-theme";

/** The key of this tab; in the session's storage only, which ends with the tab. */
export const key = signal(stored(() => sessionStorage.getItem(KEY)) ?? "");
/** Why the server wants a key, or another one. Null: it does not. */
export const keyRefused = signal<string | null>(null);
/** Whether the last request was answered. */
export const reachable = signal(true);
export const tab = signal<Tab>(tabOf(location.hash));

export type Theme = "auto" | "light" | "dark";
export const theme = signal<Theme>(themeOf(stored(() => localStorage.getItem(THEME))));

/** The last thing that was done, for those who listen to the page. */
export const announced = signal("");

function stored(read: () => string | null): string | null {
  try {
    return read();
  } catch {
    return null; // the browser keeps nothing for this page
  }
}

function themeOf(text: string | null): Theme {
  return text === "light" || text === "dark" ? text : "auto";
}

function tabOf(hash: string): Tab {
  const name = hash.replace(/^#\/?/, "");
  return TABS.find((one) => one === name) ?? "chat";
}

export function go(to: Tab): void {
  location.hash = `#/${to}`;
}

export function setKey(value: string): void {
  key.value = value.trim();
  stored(() => {
    if (key.value) sessionStorage.setItem(KEY, key.value);
    else sessionStorage.removeItem(KEY);
    return null;
  });
}

export function startSession(): void {
  addEventListener("hashchange", () => {
    tab.value = tabOf(location.hash);
  });
  effect(() => {
    if (theme.value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme.value;
    stored(() => {
      localStorage.setItem(THEME, theme.value);
      return null;
    });
  });
}
