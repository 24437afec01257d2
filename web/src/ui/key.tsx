/** Asks for a key where the server wants one, and forgets it again. */
import type { JSX } from "preact";
import { useState } from "preact/hooks";
import { key, keyRefused, setKey } from "../state/session";
import { listed, models } from "../state/models";
import { Icon } from "./icon";
import { Field, Notice } from "./parts";

export function KeyForm(): JSX.Element {
  const [typed, setTyped] = useState("");
  const submit = (event: Event): void => {
    event.preventDefault();
    setKey(typed);
  };
  return (
    <form class="key-form" onSubmit={submit}>
      <h1>This server needs a key</h1>
      <p>The key stays in this tab, is sent to this server only, and is forgotten when the tab is closed.</p>
      {key.value && <Notice kind="error">{keyRefused.value}</Notice>}
      <Field label="Key">
        {(id) => (
          <input
            id={id}
            type="password"
            autocomplete="off"
            spellcheck={false}
            autofocus
            value={typed}
            onInput={(event) => setTyped(event.currentTarget.value)}
          />
        )}
      </Field>
      <button class="primary" disabled={!typed.trim()}>
        Use this key
      </button>
    </form>
  );
}

export function KeyMenu(): JSX.Element {
  const forget = (): void => {
    setKey("");
    models.value = [];
    listed.value = false;
    keyRefused.value = "The key was forgotten.";
  };
  return (
    <button type="button" class="quiet" onClick={forget} title="Forget the key" aria-label="Forget the key">
      <Icon name="key" />
    </button>
  );
}
