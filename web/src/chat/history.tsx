/** Conversations of this browser: open, delete, export, import. */
import type { JSX } from "preact";
import { useRef, useState } from "preact/hooks";
import { told } from "../api/client";
import { conversations, current, exported, imported, kept, open, remove, startNew } from "../state/history";
import { announced } from "../state/session";
import { download } from "../ui/copy";
import { Icon } from "../ui/icon";
import { Notice } from "../ui/parts";

export function History({ close }: { close: () => void }): JSX.Element {
  const [fault, setFault] = useState("");
  return (
    <>
      <div class="history-head">
        <button
          type="button"
          class="wide"
          onClick={() => {
            startNew();
            close();
          }}
        >
          <Icon name="plus" />
          <span>New conversation</span>
        </button>
      </div>
      <ul class="history-list">
        {conversations.value.map((one) => (
          <li key={one.id} class={one.id === current.value.id ? "active" : undefined}>
            <button
              type="button"
              class="history-item"
              dir="auto"
              aria-current={one.id === current.value.id ? "true" : undefined}
              onClick={() => {
                open(one);
                close();
              }}
            >
              {one.title || "Untitled"}
            </button>
            <button
              type="button"
              class="quiet"
              aria-label={`Delete ${one.title || "Untitled"}`}
              onClick={() => void remove([one.id])}
            >
              <Icon name="trash" />
            </button>
          </li>
        ))}
      </ul>
      {!kept.value && (
        <Notice kind="warning">This browser keeps nothing for this page: export what you want to keep.</Notice>
      )}
      {fault && <Notice kind="error">{fault}</Notice>}
      <Files setFault={setFault} />
    </>
  );
}

function Files({ setFault }: { setFault: (fault: string) => void }): JSX.Element {
  const file = useRef<HTMLInputElement>(null);
  const [sure, setSure] = useState(false);
  const take = async (): Promise<void> => {
    const [chosen] = file.current?.files ?? [];
    if (!chosen) return;
    try {
      announced.value = `${imported(await chosen.text())} conversations were imported.`;
      setFault("");
    } catch (error) {
      setFault(told(error));
    }
    if (file.current) file.current.value = "";
  };
  return (
    <div class="history-foot">
      <p class="hint">Kept in this browser only.</p>
      <div class="actions">
        <button
          type="button"
          class="quiet"
          disabled={conversations.value.length === 0}
          onClick={() => download("verbatim-conversations.json", exported())}
        >
          <Icon name="download" />
          <span>Export</span>
        </button>
        <button type="button" class="quiet" onClick={() => file.current?.click()}>
          <Icon name="upload" />
          <span>Import</span>
        </button>
        <input
          ref={file}
          type="file"
          accept="application/json,.json"
          class="unseen"
          tabIndex={-1}
          aria-label="A file of conversations"
          onChange={() => void take()}
        />
        <button
          type="button"
          class={sure ? "danger" : "quiet"}
          disabled={conversations.value.length === 0}
          onBlur={() => setSure(false)}
          onClick={() => {
            if (sure) void remove(conversations.value.map((one) => one.id));
            setSure(!sure);
          }}
        >
          {sure ? "Delete all for good" : "Delete all"}
        </button>
      </div>
    </div>
  );
}
