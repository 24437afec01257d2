/** A model's fingerprint, part by part, the self-test's checks, and what differs from another one. */
import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { get, told } from "../api/client";
import type { JsonObject, Law, Model } from "../api/types";
import { visible } from "../markdown/visible";
import { chosen, model } from "../state/models";
import { Copy } from "../ui/copy";
import { Icon } from "../ui/icon";
import { Empty, Field, Notice, Panel } from "../ui/parts";
import { texts } from "../receipts/document";
import { differences, type Pasted, readPasted } from "./compare";

export function FingerprintTab(): JSX.Element {
  const [found, setFound] = useState<Model | undefined>();
  const [fault, setFault] = useState("");
  const [id, state] = [chosen.value, model.value?.state];
  useEffect(() => {
    let open = true;
    if (!id) return undefined;
    get<Model>(`/v1/models/${encodeURIComponent(id)}`).then(
      (one) => {
        if (!open) return;
        setFound(one);
        setFault("");
      },
      (error: unknown) => open && setFault(told(error)),
    );
    return () => {
      open = false;
    };
  }, [id, state]);
  if (fault) return <Empty title="No fingerprint">{<p>{fault}</p>}</Empty>;
  if (!found?.fingerprint_parts) {
    return (
      <Empty title="No fingerprint yet">
        <p>{found ? `${found.id} is ${found.state}: its fingerprint is known once it is loaded.` : "…"}</p>
      </Empty>
    );
  }
  return (
    <div class="page">
      <div class="page-head">
        <h1>Fingerprint</h1>
        <code class="fingerprint">{found.system_fingerprint}</code>
        <Copy text={JSON.stringify(found, null, 1)} label="Copy the fingerprint as JSON" words="Copy as JSON" />
      </div>
      <p class="lead">
        What the bits of a reply depend on besides the request. The same fingerprint and the same request give the same
        reply, to the bit.
      </p>
      {found.reproducible && <SelfTest law={found.reproducible} />}
      <Other model={found} />
      <div class="two">
        <Parts title="Parts" digest={found.system_fingerprint} parts={found.fingerprint_parts} />
        {found.default_parts && (
          <Parts title="Defaults" digest={found.defaults_fingerprint} parts={found.default_parts} />
        )}
      </div>
    </div>
  );
}

function SelfTest({ law }: { law: Law }): JSX.Element {
  return (
    <Panel title="Self-test">
      <Notice kind={law.holds ? "good" : "warning"}>
        {law.holds && <Icon name="check" />} {law.holds ? "The law holds on this machine" : "The law does not hold"}:{" "}
        {visible(law.reason)}
      </Notice>
      <ul class="checks">
        {Object.entries(law.checks).map(([name, holds]) => (
          <li key={name} class={holds ? "good" : "bad"}>
            <Icon name={holds ? "check" : "close"} />
            <span>{visible(name)}</span>
            <span class="unseen">{holds ? "holds" : "fails"}</span>
          </li>
        ))}
      </ul>
    </Panel>
  );
}

function Parts(props: { title: string; digest: string | undefined; parts: JsonObject }): JSX.Element {
  return (
    <Panel title={props.title} actions={<code>{props.digest}</code>}>
      <div class="table" tabIndex={0} role="region" aria-label={props.title}>
        <table class="parts">
          <tbody>
            {Object.entries(texts(props.parts)).map(([name, value]) => (
              <tr key={name}>
                <th scope="row">{visible(name)}</th>
                <td>
                  <code>{visible(value)}</code>
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      </div>
    </Panel>
  );
}

function Other({ model: mine }: { model: Model }): JSX.Element {
  const [text, setText] = useState("");
  const read = text.trim() ? readPasted(text, mine.id) : undefined;
  return (
    <Panel title="Compare with another">
      <Field label="Another fingerprint" hint="What the command verbatim fingerprint --json prints, or GET /v1/models/ID answers.">
        {(id) => (
          <textarea
            id={id}
            rows={2}
            spellcheck={false}
            placeholder='{"system_fingerprint": …, "fingerprint_parts": …}'
            value={text}
            onInput={(event) => setText(event.currentTarget.value)}
          />
        )}
      </Field>
      {typeof read === "string" && <Notice kind="error">{read}</Notice>}
      {typeof read === "object" && <Compared mine={mine} other={read} />}
    </Panel>
  );
}

function Compared({ mine, other }: { mine: Model; other: Pasted }): JSX.Element {
  const rows = [
    ...differences(texts(mine.fingerprint_parts), other.parts),
    ...(Object.keys(other.defaultParts).length ? differences(texts(mine.default_parts), other.defaultParts) : []),
  ];
  if (rows.length === 0) {
    return (
      <Notice kind="good">
        <Icon name="check" /> All parts are the same.
      </Notice>
    );
  }
  return (
    <div class="table" tabIndex={0} role="region" aria-label="Differences">
      <table class="differences">
        <thead>
          <tr>
            <th scope="col">part</th>
            <th scope="col">here</th>
            <th scope="col">{other.fingerprint || "there"}</th>
          </tr>
        </thead>
        <tbody>
          {rows.map((row) => (
            <tr key={row.name}>
              <th scope="row">{visible(row.name)}</th>
              <td>
                <code>{visible(row.before)}</code>
              </td>
              <td>
                <code>{visible(row.after)}</code>
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
