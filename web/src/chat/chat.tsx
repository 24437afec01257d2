/** The chat: what was said before, the conversation, and the settings of the next request. */
import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { current } from "../state/history";
import { settingsOpen } from "../state/settings";
import { Icon } from "../ui/icon";
import { Composer } from "./composer";
import { History } from "./history";
import { SettingsPanel } from "./settings";
import { Thread } from "./thread";

export function Chat(): JSX.Element {
  const [historyOpen, setHistoryOpen] = useState(false);
  return (
    <div class={settingsOpen.value ? "chat with-settings" : "chat"}>
      <aside class={historyOpen ? "history open" : "history"} aria-label="Conversations">
        <History close={() => setHistoryOpen(false)} />
      </aside>
      {historyOpen && <div class="shade" onClick={() => setHistoryOpen(false)} />}
      <section class="conversation" aria-label="Conversation">
        <div class="conversation-bar">
          <button
            type="button"
            class="quiet only-narrow"
            aria-label="Conversations"
            aria-expanded={historyOpen}
            onClick={() => setHistoryOpen(!historyOpen)}
          >
            <Icon name="menu" />
          </button>
          <h1 dir="auto">{current.value.title || "New conversation"}</h1>
          <button
            type="button"
            class="quiet"
            aria-expanded={settingsOpen.value}
            onClick={() => {
              settingsOpen.value = !settingsOpen.value;
            }}
          >
            <Icon name="sliders" />
            <span>Settings</span>
          </button>
        </div>
        <Thread />
        <Composer />
      </section>
      {settingsOpen.value && <SettingsPanel />}
    </div>
  );
}
