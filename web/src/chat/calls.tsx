/** A reply's tool calls: name, arguments, and where one writes what the tool answers. */
import type { JSX } from "preact";
import { useState } from "preact/hooks";
import type { ToolCall } from "../api/types";
import { CodeBlock } from "../markdown/code";
import { visible } from "../markdown/visible";
import { ask, running, say } from "../state/asking";
import { childrenOf, type Message } from "../state/conversation";
import { current } from "../state/history";

export function Calls({ message, calls }: { message: Message; calls: ToolCall[] }): JSX.Element {
  const answered = childrenOf(current.value, message.id).length > 0;
  return (
    <div class="calls">
      {calls.map((call, i) => (
        <section class="call" key={call.id || i} aria-label={`Call of ${call.name}`}>
          <p>
            <span class="tag">calls</span> <b>{visible(call.name)}</b>
          </p>
          <CodeBlock language="json" code={pretty(call.arguments)} />
        </section>
      ))}
      {!answered && !running.value.has(message.id) && <Answers message={message} calls={calls} />}
    </div>
  );
}

function Answers({ message, calls }: { message: Message; calls: ToolCall[] }): JSX.Element {
  const [texts, setTexts] = useState<string[]>(() => calls.map(() => ""));
  const send = (event: Event): void => {
    event.preventDefault();
    let parent = message.id;
    calls.forEach((call, i) => {
      parent = say("tool", texts[i] ?? "", parent, call.id).id;
    });
    ask(parent);
  };
  return (
    <form class="answers" onSubmit={send}>
      {calls.map((call, i) => (
        <label key={call.id || i}>
          <span>What {visible(call.name)} answers</span>
          <textarea
            rows={2}
            value={texts[i] ?? ""}
            onInput={(event) => setTexts(texts.map((text, at) => (at === i ? event.currentTarget.value : text)))}
          />
        </label>
      ))}
      <button class="primary">Answer the call</button>
    </form>
  );
}

function pretty(text: string): string {
  try {
    const shown = JSON.stringify(JSON.parse(text), null, 2);
    // numbers that are not the same after reading are shown as they were written
    return shown.replace(/\s/g, "") === text.replace(/\s/g, "") ? shown : text;
  } catch {
    return text;
  }
}
