/** The frame: the bar with the tabs, what went wrong with the connection or the key, and the tab that is open. */
import type { JSX } from "preact";
import { Chat } from "./chat/chat";
import { FingerprintTab } from "./fingerprint/fingerprint";
import { MachineTab } from "./machine/machine";
import { ReceiptsTab } from "./receipts/receipts";
import { RequestTab } from "./request/request";
import { announced, key, keyRefused, reachable, tab, TABS, type Tab } from "./state/session";
import { TokensTab } from "./tokens/tokens";
import { KeyForm, KeyMenu } from "./ui/key";
import { ModelMenu } from "./ui/model_menu";
import { ThemeSwitch } from "./ui/theme";
import { onlyDemo } from "./state/models";
import { Copy } from "./ui/copy";

const NAMES: Record<Tab, string> = {
  chat: "Chat",
  tokens: "Tokens",
  receipts: "Receipts",
  fingerprint: "Fingerprint",
  request: "Request",
  machine: "Machine",
};

const BODIES: Record<Tab, () => JSX.Element> = {
  chat: Chat,
  tokens: TokensTab,
  receipts: ReceiptsTab,
  fingerprint: FingerprintTab,
  request: RequestTab,
  machine: MachineTab,
};

export function App(): JSX.Element {
  const Body = BODIES[tab.value];
  const locked = keyRefused.value !== null;
  return (
    <>
      <a class="skip" href="#main" onClick={skip}>
        Skip to the content
      </a>
      <header class="bar">
        <span class="brand">
          verbatim<span class="dot">.</span>
        </span>
        <nav aria-label="Parts of the page">
          {TABS.map((name) => (
            <a key={name} href={`#/${name}`} aria-current={tab.value === name ? "page" : undefined}>
              {NAMES[name]}
            </a>
          ))}
        </nav>
        <div class="bar-end">
          {!locked && <ModelMenu />}
          {key.value && !locked && <KeyMenu />}
          <ThemeSwitch />
        </div>
      </header>
      {!reachable.value && (
        <div class="strip error" role="alert">
          The server does not answer. Trying again …
        </div>
      )}
      {!locked && onlyDemo.value && <Offer />}
      <main id="main" tabIndex={-1} class={`tab-${tab.value}`}>
        {locked ? <KeyForm /> : <Body />}
      </main>
      <div class="unseen" role="status" aria-live="polite">
        {announced.value}
      </div>
    </>
  );
}

/** Only the demo model is served: a real one is one command away. */
function Offer(): JSX.Element {
  const command = "verbatim models get smollm2";
  return (
    <div class="strip">
      <span>This is the demo model; it knows little. A real one in one command:</span>
      <code>{command}</code>
      <Copy text={command} label="Copy the command" />
    </div>
  );
}

function skip(event: Event): void {
  event.preventDefault(); // the address names the tab
  document.getElementById("main")?.focus();
}
