/** Two receipts side by side: what differs, causes first, and the first other token. */
import type { JSX } from "preact";
import { visible } from "../markdown/visible";
import { models } from "../state/models";
import { Icon } from "../ui/icon";
import { Notice, Panel } from "../ui/parts";
import { receiptDifferences } from "./compare";
import { Marked } from "./marked";
import type { Loaded } from "./receipts";

export function Comparison({ a, b }: { a: Loaded; b: Loaded }): JSX.Element {
  const rows = receiptDifferences(a.receipt, b.receipt);
  const token = rows.find((one) => one.place !== undefined);
  const known = (name: string): string => (models.value.some((one) => one.id === name) ? name : (models.value[0]?.id ?? name));
  return (
    <Panel title="Compared">
      {rows.length === 0 ? (
        <Notice kind="good">
          <Icon name="check" /> Both record the same reply to the same request, to the bit.
        </Notice>
      ) : (
        <div class="table" tabIndex={0} role="region" aria-label="Differences">
          <table class="differences">
            <thead>
              <tr>
                <th scope="col">what</th>
                <th scope="col">{visible(a.name)}</th>
                <th scope="col">{visible(b.name)}</th>
              </tr>
            </thead>
            <tbody>
              {rows.map((one, i) => (
                <tr key={i}>
                  <th scope="row">
                    {one.part} <span class="muted">{visible(one.where)}</span>
                  </th>
                  <td>
                    <code>{visible(one.before)}</code>
                  </td>
                  <td>
                    <code>{visible(one.after)}</code>
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
      {token?.place && (
        <div class="two">
          {[a, b].map((one, i) => (
            <Marked
              key={i}
              model={known(one.receipt.model)}
              ids={one.receipt.choices[token.place?.choice ?? 0]?.ids ?? []}
              at={token.place?.at}
            />
          ))}
        </div>
      )}
    </Panel>
  );
}
