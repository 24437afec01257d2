/** Which reply of the conversation a tab shows. */
import type { JSX } from "preact";
import { selected } from "../state/asking";
import { type Message, type Reply, titleOf } from "../state/conversation";
import { current, path } from "../state/history";

type Has = (reply: Reply) => boolean;

function candidates(has: Has): Message[] {
  const shown = path.value.filter((one) => one.reply?.done && has(one.reply));
  const other = current.value.messages[selected.value];
  return other?.reply?.done && has(other.reply) && !shown.includes(other) ? [...shown, other] : shown;
}

/** The reply that was asked for, or else the last one of the conversation that has what is needed. */
export function useReply(has: Has): Message | undefined {
  const all = candidates(has);
  return all.find((one) => one.id === selected.value) ?? all.at(-1);
}

export function ReplyChoice({ has }: { has: Has }): JSX.Element {
  const all = candidates(has);
  const now = useReply(has);
  return (
    <label class="reply-choice">
      <span class="unseen">Reply</span>
      <select
        value={now?.id}
        onChange={(event) => {
          selected.value = event.currentTarget.value;
        }}
      >
        {all.map((one, i) => (
          <option key={one.id} value={one.id}>
            {i + 1}: {titleOf(one.content) || "(empty)"}
          </option>
        ))}
      </select>
    </label>
  );
}
