/** A block of code with its language and a button that copies it. */
import type { JSX } from "preact";
import { Copy } from "../ui/copy";
import { visible } from "./visible";

export function CodeBlock({ language, code }: { language: string; code: string }): JSX.Element {
  return (
    <figure class="code" dir="ltr">
      <figcaption>
        <span>{visible(language.slice(0, 40)) || "text"}</span>
        <Copy text={code} label="Copy the code" />
      </figcaption>
      <pre tabIndex={0}>
        <code>{visible(code)}</code>
      </pre>
    </figure>
  );
}
