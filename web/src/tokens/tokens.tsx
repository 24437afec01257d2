/** A reply token by token: shaded by probability, each with its rivals, and a place to go on from. */
import type { JSX } from "preact";
import { useLayoutEffect, useMemo, useRef, useState } from "preact/hooks";
import { visibleToken } from "../markdown/visible";
import { askProcessed } from "../state/asking";
import type { Message, Reply } from "../state/conversation";
import { Empty, Notice } from "../ui/parts";
import { percent } from "../ui/numbers";
import { ReplyChoice, useReply } from "../ui/reply_choice";
import { Detail } from "./detail";
import { type Piece, piecesOf, surprise } from "./pieces";

export function TokensTab(): JSX.Element {
  const message = useReply((reply) => reply.tokens.length > 0);
  if (!message?.reply) {
    return (
      <Empty title="No tokens yet">
        <p>Ask for a reply in the chat, with tokens and margins switched on in its settings.</p>
      </Empty>
    );
  }
  return <TokensOf key={message.id} message={message} reply={message.reply} />;
}

function TokensOf({ message, reply }: { message: Message; reply: Reply }): JSX.Element {
  const pieces = useMemo(() => piecesOf(reply), [reply]);
  const [at, setAt] = useState(() => firstDrawn(pieces));
  const [fault, setFault] = useState("");
  const [busy, setBusy] = useState(false);
  const piece = pieces[at];
  const ask = async (): Promise<void> => {
    setBusy(true);
    setFault(await askProcessed(message));
    setBusy(false);
  };
  return (
    <div class="page tokens-page">
      <div class="page-head">
        <h1>Tokens</h1>
        <ReplyChoice has={(one) => one.tokens.length > 0} />
        <button type="button" disabled={busy || reply.processed !== undefined} onClick={() => void ask()}>
          {reply.processed ? "Raw and processed" : busy ? "Asking …" : "Add processed probabilities"}
        </button>
      </div>
      {fault && <Notice kind="error">{fault}</Notice>}
      <Summary reply={reply} />
      <div class="tokens-columns">
        <Flow pieces={pieces} at={at} choose={setAt} />
        <aside class="token-detail" aria-live="polite" aria-label="The token">
          {piece && <Detail key={at} message={message} reply={reply} piece={piece} />}
        </aside>
      </div>
    </div>
  );
}

function firstDrawn(pieces: Piece[]): number {
  return Math.max(0, pieces.findIndex((piece) => !piece.given));
}

function Flow(props: { pieces: Piece[]; at: number; choose: (at: number) => void }): JSX.Element {
  const { pieces, at, choose } = props;
  const place = useRef<HTMLDivElement>(null);
  const moved = useRef(false);
  // before the next key: a focus that comes late would choose its token again
  useLayoutEffect(() => {
    if (moved.current) place.current?.querySelector<HTMLElement>(`[data-at="${at}"]`)?.focus();
    moved.current = false;
  }, [at]);
  const keys = (event: KeyboardEvent): void => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    moved.current = true;
    choose(Math.min(pieces.length - 1, Math.max(0, at + step)));
  };
  return (
    <div class="token-flow" ref={place} role="listbox" aria-label="Tokens of the reply" onKeyDown={keys}>
      {pieces.map((piece, i) => (
        <Token key={i} piece={piece} i={i} active={i === at} choose={choose} />
      ))}
    </div>
  );
}

function Token(props: { piece: Piece; i: number; active: boolean; choose: (at: number) => void }): JSX.Element {
  const { piece, i, active, choose } = props;
  const { token, logprob } = piece.entry;
  const breaks = token.split("\n").length - 1;
  return (
    <>
      <button
        type="button"
        role="option"
        aria-selected={active}
        data-at={i}
        tabIndex={active ? 0 : -1}
        class={piece.given ? "token given" : active ? "token active" : "token"}
        style={{ "--surprise": piece.given ? "0" : surprise(logprob).toFixed(3) }}
        aria-label={piece.given ? `${JSON.stringify(token)}, given` : `${JSON.stringify(token)}, ${percent(Math.exp(logprob))}`}
        onMouseEnter={() => choose(i)}
        onFocus={() => choose(i)}
        onClick={() => choose(i)}
      >
        <bdi>{visibleToken(token)}</bdi>
      </button>
      {Array.from({ length: Math.min(breaks, 4) }, (_, n) => (
        <br key={n} />
      ))}
    </>
  );
}

function Summary({ reply }: { reply: Reply }): JSX.Element {
  const total = reply.tokens.reduce((sum, entry) => sum + entry.logprob, 0);
  const known = reply.margins.flatMap((margin, at) => (margin === null ? [] : [{ margin, at }]));
  const least = known.reduce((a, b) => (b.margin < a.margin ? b : a), known[0] ?? { margin: Infinity, at: 0 });
  return (
    <p class="summary">
      <span>
        {reply.tokens.length} {reply.tokens.length === 1 ? "token" : "tokens"}
        {reply.given && ` after ${reply.given.tokens.length} that were given`}
      </span>
      <span>mean probability {percent(Math.exp(total / Math.max(1, reply.tokens.length)))}</span>
      {known.length > 0 && (
        <span>
          smallest margin {least.margin.toPrecision(3)} at token {least.at + 1}
        </span>
      )}
      <span class="scale" aria-hidden="true">
        certain <i /> surprising
      </span>
    </p>
  );
}
