/** A reply: thoughts, answer and calls apart; below, how it came about and what can be done with it. */
import type { JSX } from "preact";
import { Markdown } from "../markdown/markdown";
import { visible } from "../markdown/visible";
import { askAgain, askBeside, askNext, running, selected } from "../state/asking";
import type { Message, Reply } from "../state/conversation";
import { model } from "../state/models";
import { go, type Tab } from "../state/session";
import { settings } from "../state/settings";
import { Copy } from "../ui/copy";
import { Icon, type IconName } from "../ui/icon";
import { Notice } from "../ui/parts";
import { Calls } from "./calls";
import { Branches } from "./message";
import { Same } from "./same";

export function ReplyView({ message, narrow }: { message: Message; narrow?: boolean }): JSX.Element {
  const { reply } = message;
  const live = running.value.has(message.id);
  if (!reply) return <Markdown text={message.content} />;
  const thoughts = (reply.given?.reasoning ?? "") + reply.reasoning;
  return (
    <article class={live ? "reply live" : "reply"} aria-busy={live}>
      {thoughts && (
        <details class="thoughts" open={live && !message.content}>
          <summary>{live && !message.content ? "Thinking …" : "Thoughts"}</summary>
          <Markdown text={thoughts} />
        </details>
      )}
      {message.content && <Markdown text={message.content} />}
      {live && !message.content && !thoughts && <p class="waiting">…</p>}
      {reply.calls.length > 0 && <Calls message={message} calls={reply.calls} />}
      {reply.error && <Notice kind="error">{reply.error}</Notice>}
      {reply.ignored.length > 0 && (
        <Notice kind="warning">
          The server does not know {reply.ignored.length === 1 ? "this field" : "these fields"} and ignored{" "}
          {reply.ignored.length === 1 ? "it" : "them"}: <code>{reply.ignored.join(", ")}</code>
        </Notice>
      )}
      {reply.sameness && <Same found={reply.sameness} />}
      {!live && <Foot message={message} reply={reply} narrow={narrow === true} />}
    </article>
  );
}

function Foot({ message, reply, narrow }: { message: Message; reply: Reply; narrow: boolean }): JSX.Element {
  const again = running.value.has(`${message.id} again`);
  const busy = running.value.size > 0;
  return (
    <footer class="reply-foot">
      <p class="origin">
        {reply.seed && (
          <span>
            seed <b>{reply.seed}</b>
          </span>
        )}
        {reply.fingerprint && <Origin reply={reply} />}
        {!narrow && <Speed reply={reply} />}
        {reply.finish && reply.finish !== "stop" && <span>{ENDS[reply.finish] ?? visible(reply.finish)}</span>}
      </p>
      <div class="actions">
        <Branches message={message} />
        <Copy text={message.content} label="Copy the reply" />
        {reply.seed && reply.finish !== "stopped" && (
          <button type="button" class="quiet" disabled={busy} onClick={() => void askAgain(message)}>
            <Icon name="again" />
            <span>{again ? "Asking …" : "Same again"}</span>
          </button>
        )}
        {reply.seed && (
          <button type="button" class="quiet" disabled={busy} onClick={() => askNext(message)}>
            <Icon name="next" />
            <span>Next seed</span>
          </button>
        )}
        {!narrow && reply.seed && (
          <button
            type="button"
            class="quiet icon-only"
            disabled={busy}
            aria-label="Several side by side"
            title="Several side by side"
            onClick={() => askBeside(message.parent, Math.min(8, Math.max(2, Number(settings.value.beside) || 3)))}
          >
            <Icon name="columns" />
          </button>
        )}
        {!narrow && reply.tokens.length > 0 && <Show message={message} to="tokens" icon="tokens" words="Tokens" />}
        {!narrow && reply.receipt && <Show message={message} to="receipts" icon="receipt" words="Receipt" />}
        {!narrow && <Show message={message} to="request" icon="code" words="Request" />}
      </div>
    </footer>
  );
}

const ENDS: Record<string, string> = {
  length: "cut at its limit",
  tool_calls: "calls a tool",
  stopped: "stopped",
  content_filter: "cut",
};

/** The fingerprint, and whether the server still has it. */
function Origin({ reply }: { reply: Reply }): JSX.Element {
  const now = model.value;
  const changed = now?.id === reply.model && now.system_fingerprint && now.system_fingerprint !== reply.fingerprint;
  return (
    <span title={changed ? `The server now has ${now.system_fingerprint}` : "What the bits depend on beside the request"}>
      {reply.fingerprint}
      {changed && <b> · the server has another one now</b>}
    </span>
  );
}

function Speed({ reply }: { reply: Reply }): JSX.Element | null {
  const tokens = reply.usage?.completion_tokens ?? reply.tokenIds.length;
  if (!tokens) return null;
  return (
    <span>
      {tokens} {tokens === 1 ? "token" : "tokens"}
      {reply.seconds > 0 && ` · ${(tokens / reply.seconds).toFixed(tokens / reply.seconds < 10 ? 1 : 0)}/s`}
    </span>
  );
}

function Show(props: { message: Message; to: Tab; icon: IconName; words: string }): JSX.Element {
  return (
    <button
      type="button"
      class="quiet"
      onClick={() => {
        selected.value = props.message.id;
        go(props.to);
      }}
    >
      <Icon name={props.icon} />
      <span>{props.words}</span>
    </button>
  );
}
