/**
 * Markdown as elements. What a model wrote is never parsed as HTML: `marked` only finds the parts of the text, and each
 * part becomes an element of this file's choosing, with text inside. HTML in the text is shown as it was written.
 */
import { lexer, type Token, type Tokens } from "marked";
import type { ComponentChildren, JSX } from "preact";
import { useMemo } from "preact/hooks";
import { CodeBlock } from "./code";
import { decoded } from "./entities";
import { visible } from "./visible";

/** Characters beyond which a text is shown as it is: no answer is so long, and finding its parts takes time. */
const MOST = 100_000;
/** Levels of quotes and lists; what is deeper is shown as it was written. */
const DEEPEST = 24;

export function Markdown({ text }: { text: string }): JSX.Element {
  return useMemo(() => <div class="prose" dir="auto">{parts(text)}</div>, [text]);
}

function parts(text: string): ComponentChildren {
  if (text.length > MOST || /(^|\n)(?:[ \t]*(?:>|[-*+]|\d+[.)])){40}/.test(text)) {
    return <pre class="plain">{visible(text)}</pre>;
  }
  try {
    return blocks(lexer(text, { gfm: true }), 0);
  } catch {
    return <pre class="plain">{visible(text)}</pre>;
  }
}

function blocks(tokens: Token[], depth: number): ComponentChildren {
  return tokens.map((token) => block(token, depth));
}

function block(token: Token, depth: number): ComponentChildren {
  if (depth > DEEPEST) return visible(token.raw);
  switch (token.type) {
    case "space":
    case "def":
      return null;
    case "hr":
      return <hr />;
    case "heading": {
      const { depth: level } = token as Tokens.Heading;
      const Level = `h${Math.min(6, level + 2)}` as "h3"; // the page has its own headings above
      return <Level>{inside(token, depth)}</Level>;
    }
    case "code": {
      const { lang, text } = token as Tokens.Code;
      return <CodeBlock language={(lang ?? "").split(/\s/, 1)[0] ?? ""} code={text} />;
    }
    case "blockquote":
      return <blockquote>{blocks((token as Tokens.Blockquote).tokens, depth + 1)}</blockquote>;
    case "list":
      return list(token as Tokens.List, depth);
    case "table":
      return table(token as Tokens.Table, depth);
    case "paragraph":
      return <p>{inside(token, depth)}</p>;
    case "text":
      return "tokens" in token && token.tokens ? inside(token, depth) : visible(decoded((token as Tokens.Text).text));
    default:
      return inline(token, depth);
  }
}

function list(token: Tokens.List, depth: number): JSX.Element {
  const items = token.items.map((item) => (
    <li class={item.task ? "task" : undefined}>
      {item.task && <input type="checkbox" checked={item.checked === true} disabled aria-label="task" />}
      {blocks(item.tokens.filter((one) => one.type !== "checkbox"), depth + 1)}
    </li>
  ));
  return token.ordered ? <ol start={Number(token.start) || 1}>{items}</ol> : <ul>{items}</ul>;
}

function table(token: Tokens.Table, depth: number): JSX.Element {
  return (
    <div class="table" tabIndex={0} role="region" aria-label="table">
      <table>
        <thead>
          <tr>{token.header.map((cell) => <th scope="col">{inlines(cell.tokens, depth + 1)}</th>)}</tr>
        </thead>
        <tbody>
          {token.rows.map((row) => <tr>{row.map((cell) => <td>{inlines(cell.tokens, depth + 1)}</td>)}</tr>)}
        </tbody>
      </table>
    </div>
  );
}

function inside(token: Token, depth: number): ComponentChildren {
  return "tokens" in token && token.tokens ? inlines(token.tokens, depth + 1) : visible(token.raw);
}

function inlines(tokens: Token[], depth: number): ComponentChildren {
  return tokens.map((token) => inline(token, depth));
}

function inline(token: Token, depth: number): ComponentChildren {
  if (depth > DEEPEST) return visible(token.raw);
  switch (token.type) {
    case "strong":
      return <strong>{inside(token, depth)}</strong>;
    case "em":
      return <em>{inside(token, depth)}</em>;
    case "del":
      return <del>{inside(token, depth)}</del>;
    case "codespan":
      return <code>{visible((token as Tokens.Codespan).text)}</code>;
    case "br":
      return <br />;
    case "escape":
      return visible((token as Tokens.Escape).text);
    case "link":
      return link(token as Tokens.Link, depth);
    case "image": {
      const { text, href } = token as Tokens.Image;
      return <span class="image">{visible(`image: ${decoded(text) || href}`)}</span>;
    }
    case "html":
      return /^<br\s*\/?>$/i.test(token.raw.trim()) ? <br /> : visible(token.raw);
    case "text":
      return "tokens" in token && token.tokens ? inside(token, depth) : visible(decoded((token as Tokens.Text).text));
    default:
      return visible(token.raw);
  }
}

/** Only addresses of the web become links; of any other one sees what was written. */
function link(token: Tokens.Link, depth: number): ComponentChildren {
  const address = webAddress(decoded(token.href));
  if (address === undefined) return visible(token.raw);
  return (
    <a href={address} target="_blank" rel="noopener noreferrer nofollow" title={address}>
      {inside(token, depth)}
    </a>
  );
}

export function webAddress(text: string): string | undefined {
  if (!/^https?:\/\//i.test(text)) return undefined;
  try {
    const url = new URL(text);
    return url.protocol === "https:" || url.protocol === "http:" ? url.href : undefined;
  } catch {
    return undefined;
  }
}
