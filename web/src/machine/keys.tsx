/** What the key of this tab has used and has left; for an admin's key, all keys. */
import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { get, told } from "../api/client";
import type { KeyInfo, KeyUsage } from "../api/types";
import { visible } from "../markdown/visible";
import { key } from "../state/session";
import { count } from "../ui/numbers";
import { Facts, Notice, Panel } from "../ui/parts";

export function Keys({ manage }: { manage: boolean }): JSX.Element {
  const [usage, setUsage] = useState<KeyUsage>();
  const [keys, setKeys] = useState<KeyInfo[]>();
  const [fault, setFault] = useState("");
  useEffect(() => {
    get<KeyUsage>("/v1/usage?by=model").then(setUsage, (error: unknown) => setFault(told(error)));
    if (manage) get<{ data: KeyInfo[] }>("/v1/keys").then(({ data }) => setKeys(data), () => setKeys(undefined));
  }, [manage, key.value]);
  return (
    <>
      {fault && <Notice kind="error">{fault}</Notice>}
      {usage && <Own usage={usage} />}
      {keys && <All keys={keys} />}
    </>
  );
}

function Own({ usage }: { usage: KeyUsage }): JSX.Element {
  const limits = Object.entries(usage.limits).flatMap(([name, value]): [string, string][] =>
    value === null ? [] : [[name.replaceAll("_", " "), count(value)]],
  );
  return (
    <Panel title={`The key ${usage.key}`}>
      <Facts rows={[["Balance", usage.balance === null ? "unlimited" : count(usage.balance)], ...limits]} />
      <Sums rows={usage.data} first="model" />
    </Panel>
  );
}

function All({ keys }: { keys: KeyInfo[] }): JSX.Element {
  const rows = keys.map((one) => ({
    key: one.name,
    state: one.admin ? `${one.state}, admin` : one.state,
    balance: one.balance ?? "unlimited",
    ...one.usage,
  }));
  return (
    <Panel title="All keys">
      <Sums rows={rows} first="key" />
    </Panel>
  );
}

const COLUMNS = ["state", "balance", "requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost"];

function Sums({ rows, first }: { rows: Record<string, number | string>[]; first: string }): JSX.Element {
  const columns = COLUMNS.filter((name) => rows.some((row) => name in row));
  if (rows.length === 0) return <p class="muted">Nothing was used yet.</p>;
  return (
    <div class="table" tabIndex={0} role="region" aria-label="Usage">
      <table class="sums">
        <thead>
          <tr>
            {[first, ...columns].map((name) => (
              <th scope="col" key={name}>
                {name.replaceAll("_", " ")}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((row) => (
            <tr key={String(row[first])}>
              <th scope="row">{visible(String(row[first] ?? ""))}</th>
              {columns.map((name) => {
                const value = row[name];
                return <td key={name}>{typeof value === "number" ? count(value) : visible(String(value ?? ""))}</td>;
              })}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}
