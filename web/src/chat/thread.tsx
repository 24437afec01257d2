/** The messages that are shown, one below the other; replies side by side where several were asked for. */
import type { JSX } from "preact";
import { useEffect, useLayoutEffect, useRef } from "preact/hooks";
import { beside, running } from "../state/asking";
import { childrenOf, showing } from "../state/conversation";
import { current, keep, path } from "../state/history";
import { listed, model, models } from "../state/models";
import { Empty } from "../ui/parts";
import { MessageView } from "./message";
import { ReplyView } from "./reply";

export function Thread(): JSX.Element {
  const place = useRef<HTMLDivElement>(null);
  const follows = useRef(true);
  useLayoutEffect(() => {
    const box = place.current;
    if (box && follows.current) box.scrollTop = box.scrollHeight;
  }, [current.value]);
  useEffect(() => {
    follows.current = true;
  }, [current.value.id, running.value.size]);
  const shown = path.value;
  return (
    <div
      class="thread"
      ref={place}
      onScroll={(event) => {
        const box = event.currentTarget;
        follows.current = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
      }}
    >
      {shown.length === 0 ? (
        <Welcome />
      ) : (
        <ol class="messages">
          {shown.map((message) =>
            message.role === "assistant" && beside.value === message.parent ? (
              <SideBySide key={`${message.parent} beside`} parent={message.parent} />
            ) : (
              <MessageView key={message.id} message={message} />
            ),
          )}
        </ol>
      )}
    </div>
  );
}

function SideBySide({ parent }: { parent: string }): JSX.Element {
  const replies = childrenOf(current.value, parent).filter((one) => one.role === "assistant");
  return (
    <li class="beside">
      {replies.map((one) => (
        <div class="beside-one" key={one.id}>
          <ReplyView message={one} narrow />
          <button
            type="button"
            onClick={() => {
              keep(showing(current.value, one));
              beside.value = "";
            }}
          >
            Go on with this one
          </button>
        </div>
      ))}
    </li>
  );
}

function Welcome(): JSX.Element {
  const now = model.value;
  return (
    <Empty title={listed.value && models.value.length === 0 ? "No model is served" : "Say something twice"}>
      <p>
        The bits of a reply depend on the model, the prompt, the parameters and the seed, and on nothing else. Every reply
        here names its seed, and <em>Same again</em> checks it to the bit.
      </p>
      {now?.reproducible && (
        <p class={now.reproducible.holds ? "law good" : "law bad"}>
          {now.reproducible.holds ? "Reproducible on this machine" : `Not reproducible here: ${now.reproducible.reason}`}
          {now.system_fingerprint && <code>{now.system_fingerprint}</code>}
        </p>
      )}
    </Empty>
  );
}
