/** Shows characters that cannot be seen, or that turn the text around them, as what they are. */
import type { ComponentChildren, JSX } from "preact";

/** Controls but tab and line feed; those that embed, override or isolate a direction; zero width; byte order mark. */
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]/;
/** The same, and what a token's text hides beside: its spaces and its ends of lines. */
const IN_TOKENS = new RegExp(`${HIDDEN.source}|[\\n\\t]`);

function nameOf(character: string): string {
  return `U+${(character.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, "0")}`;
}

function Hidden({ character }: { character: string }): JSX.Element {
  const sign = character === "\n" ? "↵" : character === "\t" ? "⇥" : nameOf(character);
  return (
    <span class="hidden-character" title={nameOf(character)}>
      {sign}
    </span>
  );
}

/** A text with its hidden characters shown. Two code points that stand for one sign are left alone. */
export function visible(text: string): ComponentChildren {
  return split(text, HIDDEN);
}

export function visibleToken(text: string): ComponentChildren {
  return split(text, IN_TOKENS);
}

function split(text: string, expression: RegExp): ComponentChildren {
  if (!expression.test(text)) return text;
  const parts: ComponentChildren[] = [];
  let plain = "";
  for (const character of text) {
    if (!expression.test(character)) {
      plain += character;
      continue;
    }
    if (plain) parts.push(plain);
    plain = "";
    parts.push(<Hidden character={character} />);
  }
  return plain ? [...parts, plain] : parts;
}
