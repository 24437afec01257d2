/** How a reply was asked for: its effective parameters, what was ignored, and the request as a program. */
import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { CodeBlock } from "../markdown/code";
import type { Reply } from "../state/conversation";
import { models } from "../state/models";
import { key } from "../state/session";
import { Empty, Notice, Panel } from "../ui/parts";
import { ReplyChoice, useReply } from "../ui/reply_choice";
import { effective } from "./effective";
import { asCurl, asJavaScript, asJson, asPython } from "./snippets";

const FORMS = { curl: "curl", python: "Python", javascript: "JavaScript", json: "JSON" } as const;
type Form = keyof typeof FORMS;

const SOURCES = {
  request: "the request",
  drawn: "drawn by the server",
  model: "the model's default",
  default: "the API's default",
  receipt: "filled in by the server",
} as const;

export function RequestTab(): JSX.Element {
  const message = useReply(() => true);
  const [replay, setReplay] = useState(true);
  const [form, setForm] = useState<Form>("curl");
  const reply = message?.reply;
  if (!reply) {
    return (
      <Empty title="No request yet">
        <p>What you ask in the chat is shown here as it was sent.</p>
      </Empty>
    );
  }
  return (
    <div class="page">
      <div class="page-head">
        <h1>Request</h1>
        <ReplyChoice has={() => true} />
      </div>
      {reply.ignored.length > 0 && (
        <Notice kind="warning">
          Ignored by the server, which does not know: <code>{reply.ignored.join(", ")}</code>
        </Notice>
      )}
      <div class="two">
        <Parameters reply={reply} />
        <Panel
          title="As a program"
          actions={
            <div class="segments" role="group" aria-label="Language">
              {(Object.keys(FORMS) as Form[]).map((name) => (
                <button key={name} type="button" aria-pressed={form === name} onClick={() => setForm(name)}>
                  {FORMS[name]}
                </button>
              ))}
            </div>
          }
        >
          <label class="check">
            <input type="checkbox" checked={replay} onChange={(event) => setReplay(event.currentTarget.checked)} />
            <span>With the seed of this reply, so that it is the same again</span>
          </label>
          <CodeBlock language={form === "curl" ? "sh" : form} code={program(reply, form, replay)} />
        </Panel>
      </div>
    </div>
  );
}

function Parameters({ reply }: { reply: Reply }): JSX.Element {
  const model = models.value.find((one) => one.id === reply.model);
  return (
    <Panel title="Effective parameters">
      <div class="table" tabIndex={0} role="region" aria-label="Effective parameters">
        <table>
          <thead>
            <tr>
              <th scope="col">parameter</th>
              <th scope="col">value</th>
              <th scope="col">from</th>
            </tr>
          </thead>
          <tbody>
            <tr>
              <th scope="row">model</th>
              <td>
                <code>{reply.model}</code>
              </td>
              <td class="muted">{SOURCES.request}</td>
            </tr>
            {effective(reply, model).map(({ name, value, from }) => (
              <tr key={name}>
                <th scope="row">{name}</th>
                <td>
                  <code>{value.length > 200 ? `${value.slice(0, 200)}…` : value}</code>
                </td>
                <td class="muted">{SOURCES[from]}</td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </Panel>
  );
}

function program(reply: Reply, form: Form, replay: boolean): string {
  const sent = replay && reply.seed ? { body: reply.sent.body, seed: reply.seed } : reply.sent;
  const keyed = key.value !== "";
  if (form === "curl") return asCurl(sent, location.origin, keyed);
  if (form === "python") return asPython(sent, location.origin, keyed);
  if (form === "javascript") return asJavaScript(sent, location.origin, keyed);
  return asJson(sent);
}
