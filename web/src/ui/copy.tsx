/** A button that copies a text, and says that it has. */
import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { announced } from "../state/session";
import { Icon } from "./icon";

export function Copy({ text, label, words }: { text: string; label: string; words?: string }): JSX.Element {
  const [copied, setCopied] = useState(false);
  const copy = async (): Promise<void> => {
    const good = await copyText(text);
    announced.value = good ? "Copied." : "The browser does not allow copying.";
    setCopied(good);
    setTimeout(() => setCopied(false), 1500);
  };
  return (
    <button type="button" class="quiet" aria-label={label} title={label} onClick={() => void copy()}>
      <Icon name={copied ? "check" : "copy"} />
      {words && <span>{copied ? "Copied" : words}</span>}
    </button>
  );
}

/** Outside of loopback and TLS browsers have no clipboard to write to: then by the old command. */
async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "unseen";
    document.body.append(field);
    field.select();
    const good = document.execCommand("copy");
    field.remove();
    return good;
  }
}

/** Have the browser save a text as a file. */
export function download(name: string, text: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
