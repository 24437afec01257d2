/** One message: what somebody wrote, with another wording as a branch; what a tool answered; or a reply. */
import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { visible } from "../markdown/visible";
import { ask, beside, say } from "../state/asking";
import { childrenOf, type Message, showing } from "../state/conversation";
import { current, keep } from "../state/history";
import { Copy } from "../ui/copy";
import { Icon } from "../ui/icon";
import { ReplyView } from "./reply";

export function MessageView({ message }: { message: Message }): JSX.Element {
  if (message.role === "assistant") {
    return (
      <li class="message assistant">
        <ReplyView message={message} />
      </li>
    );
  }
  if (message.role === "tool") {
    return (
      <li class="message tool">
        <p class="tool-label">Answer of the tool</p>
        <pre>{visible(message.content)}</pre>
      </li>
    );
  }
  return <Said message={message} />;
}

function Said({ message }: { message: Message }): JSX.Element {
  const [draft, setDraft] = useState<string | null>(null);
  const send = (): void => {
    if (draft === null || !draft.trim()) return;
    beside.value = "";
    ask(say("user", draft, message.parent).id);
    setDraft(null);
  };
  if (draft !== null) {
    return (
      <li class="message user editing">
        <textarea
          aria-label="Another wording"
          dir="auto"
          value={draft}
          ref={(box) => box?.focus()}
          onInput={(event) => setDraft(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Escape") setDraft(null);
            if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
              event.preventDefault();
              send();
            }
          }}
        />
        <div class="actions">
          <button type="button" class="quiet" onClick={() => setDraft(null)}>
            Cancel
          </button>
          <button type="button" class="primary" onClick={send}>
            Send as a branch
          </button>
        </div>
      </li>
    );
  }
  return (
    <li class="message user">
      <div class="said" dir="auto">
        {visible(message.content)}
      </div>
      <div class="message-foot">
        <Branches message={message} />
        <Copy text={message.content} label="Copy the message" />
        <button
          type="button"
          class="quiet"
          aria-label="Edit"
          title="Edit: another wording becomes a branch"
          onClick={() => setDraft(message.content)}
        >
          <Icon name="edit" />
        </button>
      </div>
    </li>
  );
}

/** The other messages that stand in the same place. */
export function Branches({ message }: { message: Message }): JSX.Element | null {
  const all = childrenOf(current.value, message.parent);
  const at = all.findIndex((one) => one.id === message.id);
  if (all.length < 2) return null;
  const step = (by: number): void => {
    const other = all[at + by];
    if (other) keep(showing(current.value, other));
  };
  return (
    <span class="branches" role="group" aria-label="Branches">
      <button type="button" class="quiet" aria-label="Earlier branch" disabled={at === 0} onClick={() => step(-1)}>
        <Icon name="left" />
      </button>
      <span>
        {at + 1}/{all.length}
      </span>
      <button
        type="button"
        class="quiet"
        aria-label="Later branch"
        disabled={at === all.length - 1}
        onClick={() => step(1)}
      >
        <Icon name="right" />
      </button>
    </span>
  );
}
