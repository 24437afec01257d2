/** One receipt: what it says, and what the server finds when it computes it again. */
import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { post, told } from "../api/client";
import type { CheckReport, FirstDifference } from "../api/types";
import { visible } from "../markdown/visible";
import { models } from "../state/models";
import { announced } from "../state/session";
import { Icon } from "../ui/icon";
import { Facts, Notice, Panel } from "../ui/parts";
import { Marked } from "./marked";
import type { Loaded } from "./receipts";

const KINDS = {
  identical: "good",
  reproduced: "good",
  consistent: "warning",
  refuted: "error",
  not_checkable: "warning",
} as const;

export function Inspect({ loaded, close }: { loaded: Loaded; close: () => void }): JSX.Element {
  const [report, setReport] = useState<CheckReport>();
  const [fault, setFault] = useState("");
  const [busy, setBusy] = useState("");
  const check = async (mode: "verify" | "replay"): Promise<void> => {
    setBusy(mode);
    setFault("");
    setReport(undefined);
    try {
      const { text } = await post(`/v1/receipts/verify?mode=${mode}`, loaded.text);
      const found = JSON.parse(text) as CheckReport;
      setReport(found);
      announced.value = `${found.verdict}: ${found.sentence}`;
    } catch (error) {
      setFault(told(error));
    }
    setBusy("");
  };
  const { receipt } = loaded;
  return (
    <Panel
      title={loaded.name}
      actions={
        <button type="button" class="quiet" aria-label={`Close ${loaded.name}`} onClick={close}>
          <Icon name="close" />
        </button>
      }
    >
      <Facts
        rows={[
          ["Id", <code>{visible(receipt.id)}</code>],
          ["Model", visible(receipt.model)],
          ["Fingerprint", <Fingerprint of={receipt.fingerprint} />],
          ["Seed", <code>{visible(seedOf(loaded))}</code>],
          ["Written", receipt.created ? new Date(receipt.created * 1000).toISOString().replace(".000Z", " UTC").replace("T", " ") : "–"],
          ["Tokens", `${receipt.prompt.tokens} of the prompt, ${receipt.choices.map((one) => one.tokens).join(" + ")} of the reply`],
          ["The law", receipt.law.holds ? "held, as its writer says" : `did not hold: ${receipt.law.reason}`],
          ["Signature", receipt.signed ? "signed" : "not signed"],
        ]}
      />
      <div class="actions">
        <button type="button" class="primary" disabled={busy !== ""} onClick={() => void check("verify")}>
          {busy === "verify" ? "Verifying …" : "Verify"}
        </button>
        <button type="button" disabled={busy !== ""} onClick={() => void check("replay")}>
          {busy === "replay" ? "Replaying …" : "Replay"}
        </button>
      </div>
      {fault && <Notice kind="error">{fault}</Notice>}
      {report && <Report report={report} loaded={loaded} />}
    </Panel>
  );
}

function Fingerprint({ of }: { of: string }): JSX.Element {
  const here = models.value.some((one) => one.system_fingerprint === of);
  return (
    <>
      <code>{visible(of)}</code> {here ? <span class="tag good">of this server</span> : <span class="tag">another one</span>}
    </>
  );
}

function seedOf({ receipt }: Loaded): string {
  const sampling = receipt.request.sampling;
  const seed = typeof sampling === "object" && sampling !== null && !Array.isArray(sampling) ? sampling.seed : null;
  return seed === null || seed === undefined ? "not in it" : String(seed);
}

function Report({ report, loaded }: { report: CheckReport; loaded: Loaded }): JSX.Element {
  return (
    <div class="report">
      <Notice kind={KINDS[report.verdict]}>
        <b>{report.verdict.replace("_", " ")}</b>: {visible(report.sentence)}
      </Notice>
      {report.environment.length > 0 && (
        <ul class="environment">
          {report.environment.map((line) => (
            <li key={line}>{visible(line)}</li>
          ))}
        </ul>
      )}
      {report.choices.map((one) => (
        <div key={one.index}>
          <p class="muted">
            choice {one.index}: {one.tokens - one.different}/{one.tokens} tokens are the same
            {one.largest_difference !== null && `, largest difference ${one.largest_difference}`}
          </p>
          {one.first && <First first={one.first} />}
          <Marked
            model={report.model || loaded.receipt.model}
            ids={loaded.receipt.choices[one.index]?.ids ?? []}
            at={one.first?.position}
          />
        </div>
      ))}
    </div>
  );
}

function First({ first }: { first: FirstDifference }): JSX.Element {
  const shown = (text: string | null, id: number | null): string =>
    id === null ? "the end" : text === null ? `token ${id}` : `${JSON.stringify(text)} (${id})`;
  return (
    <p>
      First difference at token {first.position + 1}: the receipt has <b>{visible(shown(first.expected_text, first.expected))}</b>,
      this model draws <b>{visible(shown(first.drawn_text, first.drawn))}</b>.
    </p>
  );
}
