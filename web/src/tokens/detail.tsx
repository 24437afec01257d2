/** One token: its numbers, its rivals under the raw and the processed distribution, and going on from it. */
import type { JSX } from "preact";
import type { Rival } from "../api/types";
import { visibleToken } from "../markdown/visible";
import { goOn } from "../state/asking";
import type { Message, Reply } from "../state/conversation";
import { models } from "../state/models";
import { go } from "../state/session";
import { Facts } from "../ui/parts";
import { percent } from "../ui/numbers";
import { parted, type Piece } from "./pieces";

export function Detail(props: { message: Message; reply: Reply; piece: Piece }): JSX.Element {
  const { message, reply, piece } = props;
  const { entry } = piece;
  const ends = reply.finish === "stop" && piece.at === reply.tokens.length - 1;
  return (
    <>
      <p class="token-name">
        <bdi>{visibleToken(entry.token)}</bdi>
      </p>
      {piece.given ? (
        <p class="muted">The reply was begun with this token; it was not drawn.</p>
      ) : (
        <>
          <Facts
            rows={[
              ["Token", `${piece.at + 1}${piece.id === undefined ? "" : ` · id ${piece.id}`}`],
              ["Probability", percent(Math.exp(entry.logprob))],
              ["Log-probability", String(entry.logprob)],
              ...(piece.margin === undefined ? [] : ([["Margin", marginOf(piece.margin)]] as [string, string][])),
            ]}
          />
          <Rivals message={message} reply={reply} piece={piece} />
          <button type="button" class="primary wide" disabled={ends} onClick={() => goOnFrom(message, reply, piece)}>
            Go on from here
          </button>
          <p class="hint">
            {ends
              ? "The reply ends with this token: take a rival to go on."
              : "A branch that begins as this reply does, this token included, with the same seed."}
          </p>
        </>
      )}
    </>
  );
}

function marginOf(margin: number | null): string {
  return margin === null ? "no rival" : margin.toPrecision(6);
}

function Rivals({ message, reply, piece }: { message: Message; reply: Reply; piece: Piece }): JSX.Element | null {
  const rows = rowsOf(piece);
  if (rows.length === 0) return null;
  const both = piece.processed !== undefined;
  return (
    <table class="rivals">
      <caption>Rivals</caption>
      <thead>
        <tr>
          <th scope="col">token</th>
          <th scope="col">{both ? "raw" : "probability"}</th>
          {both && <th scope="col">processed</th>}
          <td />
        </tr>
      </thead>
      <tbody>
        {rows.map((row) => (
          <tr key={row.token} class={row.token === piece.entry.token ? "chosen" : undefined}>
            <th scope="row">
              <bdi>{visibleToken(row.token)}</bdi>
            </th>
            <Share logprob={row.raw} />
            {both && <Share logprob={row.processed} />}
            <td>
              {row.token !== piece.entry.token && (
                <button
                  type="button"
                  class="quiet"
                  aria-label={`Take ${JSON.stringify(row.token)} instead and go on`}
                  title="Take this one instead and go on"
                  onClick={() => goOnFrom(message, reply, piece, row.token)}
                >
                  take
                </button>
              )}
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

interface Row {
  token: string;
  raw: number | undefined;
  processed: number | undefined;
}

/** The token and its rivals under either distribution, the likeliest first. */
function rowsOf(piece: Piece): Row[] {
  const rows = new Map<string, Row>();
  const add = (rival: Rival, name: "raw" | "processed"): void => {
    const row = rows.get(rival.token) ?? { token: rival.token, raw: undefined, processed: undefined };
    row[name] ??= rival.logprob;
    rows.set(rival.token, row);
  };
  const both: ["raw" | "processed", Piece["processed"]][] = [
    ["raw", piece.entry],
    ["processed", piece.processed],
  ];
  for (const [name, entry] of both) for (const rival of entry ? [...entry.top, entry] : []) add(rival, name);
  const order = (row: Row): number => row.raw ?? row.processed ?? -Infinity;
  return [...rows.values()].sort((a, b) => order(b) - order(a));
}

function Share({ logprob }: { logprob: number | undefined }): JSX.Element {
  const share = logprob === undefined ? undefined : Math.exp(logprob);
  return (
    <td class="share" style={{ "--share": share === undefined ? "0" : share.toFixed(4) }}>
      {share === undefined ? "–" : percent(share)}
    </td>
  );
}

function goOnFrom(message: Message, reply: Reply, piece: Piece, instead?: string): void {
  const drawn = reply.tokens.slice(0, piece.at);
  const last = instead === undefined ? piece.entry : { token: instead, logprob: 0, bytes: null, top: [] };
  const tokens = [...(reply.given?.tokens ?? []), ...drawn, last];
  const marks = models.value.find((one) => one.id === reply.model)?.reasoning;
  const text = parted(tokens, marks, reply.reasoning !== "" || (reply.given?.reasoning ?? "") !== "");
  const ids = instead === undefined ? [...(reply.given?.ids ?? []), ...reply.tokenIds.slice(0, piece.at + 1)] : undefined;
  goOn(message, { ...text, tokens, ...(ids && ids.length === tokens.length ? { ids } : {}) });
  go("chat");
}
