/** Small parts that several places use: a named field, a notice, a list of names and values, a tag. */
import type { ComponentChildren, JSX } from "preact";
import { useId } from "preact/hooks";

/** A label above what it names. */
export function Field(props: { label: string; hint?: string; children: (id: string) => ComponentChildren }): JSX.Element {
  const id = useId();
  return (
    <div class="field">
      <label for={id}>{props.label}</label>
      {props.children(id)}
      {props.hint && <p class="hint">{props.hint}</p>}
    </div>
  );
}

export function Notice(props: { kind: "info" | "warning" | "error" | "good"; children: ComponentChildren }): JSX.Element {
  return (
    <div class={`notice ${props.kind}`} role={props.kind === "error" ? "alert" : "note"}>
      {props.children}
    </div>
  );
}

/** Names and values, one beside the other. */
export function Facts({ rows }: { rows: [string, ComponentChildren][] }): JSX.Element {
  return (
    <dl class="facts">
      {rows.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

/** What a part of the page says while it has nothing to show. */
export function Empty({ title, children }: { title: string; children?: ComponentChildren }): JSX.Element {
  return (
    <div class="empty">
      <h2>{title}</h2>
      {children}
    </div>
  );
}

export function Panel(props: { title: string; actions?: ComponentChildren; children: ComponentChildren }): JSX.Element {
  const id = useId();
  return (
    <section class="panel" aria-labelledby={id}>
      <header>
        <h2 id={id}>{props.title}</h2>
        {props.actions && <div class="actions">{props.actions}</div>}
      </header>
      {props.children}
    </section>
  );
}
