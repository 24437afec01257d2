/** Receipts: save a reply's, drop a file to have it verified or replayed, compare two. */
import type { JSX } from "preact";
import { useRef, useState } from "preact/hooks";
import type { Reply } from "../state/conversation";
import { announced } from "../state/session";
import { download } from "../ui/copy";
import { Icon } from "../ui/icon";
import { Notice, Panel } from "../ui/parts";
import { ReplyChoice, useReply } from "../ui/reply_choice";
import { Comparison } from "./comparison";
import { type Receipt, receiptOf } from "./document";
import { Inspect } from "./inspect";

/** A receipt with the text that it came as: that text, and no other, is checked. */
export interface Loaded {
  name: string;
  text: string;
  receipt: Receipt;
}

const MOST_BYTES = 8 << 20;

export function ReceiptsTab(): JSX.Element {
  const [loaded, setLoaded] = useState<Loaded[]>([]);
  const [fault, setFault] = useState("");
  const take = async (files: File[]): Promise<void> => {
    const read = await Promise.all(files.slice(0, 2).map(readFile));
    const bad = read.find((one) => typeof one === "string");
    setFault(typeof bad === "string" ? bad : "");
    const good = read.filter((one) => typeof one !== "string");
    setLoaded((before) => [...before, ...good].slice(-2));
    announced.value = typeof bad === "string" ? bad : `${good.length} receipts were read.`;
  };
  const [first, second] = loaded;
  return (
    <div class="page">
      <div class="page-head">
        <h1>Receipts</h1>
      </div>
      <p class="lead">A receipt says all that is needed to compute a reply again. Checking one takes as long as reading it.</p>
      <div class="receipt-sources">
        <OfReply put={(one) => setLoaded((before) => [...before, one].slice(-2))} />
        <Drop take={(files) => void take(files)} />
      </div>
      {fault && <Notice kind="error">{fault}</Notice>}
      {first && second && <Comparison a={first} b={second} />}
      <div class={second ? "two" : undefined}>
        {loaded.map((one, i) => (
          <Inspect
            key={`${i} ${one.receipt.digest} ${one.name}`}
            loaded={one}
            close={() => setLoaded((before) => before.filter((other) => other !== one))}
          />
        ))}
      </div>
    </div>
  );
}

async function readFile(file: File): Promise<Loaded | string> {
  if (file.size > MOST_BYTES) return `${file.name} is larger than any receipt.`;
  const text = await file.text();
  const receipt = receiptOf(text);
  return receipt ? { name: file.name, text, receipt } : `${file.name} is no receipt, and no reply with one in it.`;
}

function OfReply({ put }: { put: (loaded: Loaded) => void }): JSX.Element | null {
  const has = (one: Reply): boolean => one.receipt !== undefined;
  const reply = useReply(has)?.reply;
  const receipt = reply?.receipt === undefined ? undefined : receiptOf(reply.receipt);
  if (!reply?.receipt || !receipt) return null;
  const { receipt: text } = reply;
  return (
    <Panel title="Of this conversation">
      <ReplyChoice has={has} />
      <div class="actions">
        <button type="button" onClick={() => download(`${reply.id || "receipt"}.json`, text)}>
          <Icon name="download" />
          <span>Download</span>
        </button>
        <button type="button" onClick={() => put({ name: "the reply above", text, receipt })}>
          <Icon name="receipt" />
          <span>Inspect and check</span>
        </button>
      </div>
    </Panel>
  );
}

function Drop({ take }: { take: (files: File[]) => void }): JSX.Element {
  const input = useRef<HTMLInputElement>(null);
  const [over, setOver] = useState(false);
  return (
    <div
      class={over ? "drop over" : "drop"}
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        event.preventDefault();
        setOver(false);
        take([...(event.dataTransfer?.files ?? [])]);
      }}
    >
      <p>Drop a receipt here: to verify it, to replay it, or two to compare them.</p>
      <button type="button" onClick={() => input.current?.click()}>
        <Icon name="upload" />
        <span>Choose a file</span>
      </button>
      <input
        ref={input}
        type="file"
        multiple
        accept="application/json,.json"
        class="unseen"
        tabIndex={-1}
        aria-label="A receipt's file"
        onChange={(event) => {
          take([...(event.currentTarget.files ?? [])]);
          event.currentTarget.value = "";
        }}
      />
    </div>
  );
}
