/** The text of a receipt's tokens, with the first one that differs marked. The server spells the tokens. */
import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { post, told } from "../api/client";
import { visible, visibleToken } from "../markdown/visible";

type Spelled = [before: string, marked: string, after: string];

export function Marked({ model, ids, at }: { model: string; ids: number[]; at?: number | undefined }): JSX.Element | null {
  const [parts, setParts] = useState<Spelled>();
  const [fault, setFault] = useState("");
  useEffect(() => {
    let open = true;
    const place = at ?? ids.length;
    const slices = [ids.slice(0, place), ids.slice(place, place + 1), ids.slice(place + 1)];
    Promise.all(slices.map((slice) => spelled(model, slice))).then(
      (found) => open && setParts(found as Spelled),
      (error: unknown) => open && setFault(told(error)),
    );
    return () => {
      open = false;
    };
  }, [model, ids, at]);
  if (fault) return <p class="hint">{fault}</p>;
  if (!parts || ids.length === 0) return null;
  const [before, marked, after] = parts;
  return (
    <p class="spelled" dir="auto">
      {visible(before)}
      {marked && <mark>{visibleToken(marked)}</mark>}
      {visible(after)}
    </p>
  );
}

async function spelled(model: string, tokens: number[]): Promise<string> {
  if (tokens.length === 0) return "";
  const { text } = await post("/detokenize", JSON.stringify({ model, tokens }));
  const { prompt } = JSON.parse(text) as { prompt?: unknown };
  return typeof prompt === "string" ? prompt : "";
}
