/** The settings of the next request: what is left empty is the server's to decide, and its default is shown. */
import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { told } from "../api/client";
import { toolsOf } from "../request/body";
import { model } from "../state/models";
import { readObject } from "../state/reading";
import { DEFAULTS, set, type Settings, settings, settingsOpen } from "../state/settings";
import { Icon } from "../ui/icon";
import { Field } from "../ui/parts";

type TextName = { [Name in keyof Settings]: Settings[Name] extends string ? Name : never }[keyof Settings];

const API_DEFAULTS: Partial<Record<TextName, string>> = { temperature: "1", top_p: "1", top_k: "0", min_p: "0" };

const TOOL = `{
  "name": "weather",
  "description": "Tell the weather of a city.",
  "parameters": {
    "type": "object",
    "properties": { "city": { "type": "string" } },
    "required": ["city"]
  }
}`;

export function SettingsPanel(): JSX.Element {
  const close = (): void => {
    settingsOpen.value = false;
  };
  useEffect(() => {
    const escape = (event: KeyboardEvent): void => {
      if (event.key === "Escape") close();
    };
    addEventListener("keydown", escape);
    return () => removeEventListener("keydown", escape);
  }, []);
  return (
    <aside class="settings" aria-label="Settings">
      <header>
        <h2>Settings</h2>
        <button type="button" class="quiet" aria-label="Close the settings" onClick={close}>
          <Icon name="close" />
        </button>
      </header>
      <div class="settings-body">
        <Long name="system" label="System message" rows={3} />
        <div class="pairs">
          <Short name="temperature" label="Temperature" />
          <Short name="max_completion_tokens" label="Most tokens" />
          <Short name="top_p" label="top_p" />
          <Short name="top_k" label="top_k" />
          <Short name="min_p" label="min_p" />
          <Effort />
        </div>
        <Long name="stop" label="Stop before" rows={2} hint="A text per line." />
        <Tools />
        <Long
          name="more"
          label="Further fields"
          rows={3}
          hint="A JSON object that is added to the request."
          fault={problem(settings.value.more, (text) => {
            const read = readObject(text);
            return typeof read === "string" ? read : "";
          })}
        />
        <Recording />
        <button
          type="button"
          class="quiet"
          onClick={() => {
            settings.value = { ...DEFAULTS, seed: settings.value.seed, draw: settings.value.draw };
          }}
        >
          Reset
        </button>
      </div>
    </aside>
  );
}

function Short({ name, label }: { name: TextName; label: string }): JSX.Element {
  const default_ = model.value?.default_sampling?.[name] ?? API_DEFAULTS[name];
  return (
    <Field label={label}>
      {(id) => (
        <input
          id={id}
          inputMode="decimal"
          autocomplete="off"
          placeholder={default_ === undefined || default_ === null ? "" : String(default_)}
          value={settings.value[name]}
          onInput={(event) => set(name, event.currentTarget.value)}
        />
      )}
    </Field>
  );
}

function Long(props: { name: TextName; label: string; rows: number; hint?: string; fault?: string }): JSX.Element {
  return (
    <Field label={props.label} hint={props.fault || props.hint || ""}>
      {(id) => (
        <textarea
          id={id}
          dir="auto"
          rows={props.rows}
          spellcheck={false}
          aria-invalid={props.fault ? true : undefined}
          value={settings.value[props.name]}
          onInput={(event) => set(props.name, event.currentTarget.value)}
        />
      )}
    </Field>
  );
}

function Effort(): JSX.Element {
  return (
    <Field label="Reasoning">
      {(id) => (
        <select
          id={id}
          value={settings.value.reasoning_effort}
          onChange={(event) => set("reasoning_effort", event.currentTarget.value)}
        >
          <option value="">default</option>
          {["none", "minimal", "low", "medium", "high", "xhigh"].map((effort) => (
            <option key={effort}>{effort}</option>
          ))}
        </select>
      )}
    </Field>
  );
}

function Tools(): JSX.Element {
  const [example] = useState(TOOL);
  const { tools } = settings.value;
  const fault = problem(tools, (text) => {
    try {
      toolsOf(text);
      return "";
    } catch (error) {
      return told(error);
    }
  });
  return (
    <>
      <Long
        name="tools"
        label="Tools"
        rows={tools ? 8 : 2}
        hint="Functions as JSON: one, or a list. You answer the calls yourself."
        fault={fault}
      />
      {!tools && (
        <button type="button" class="quiet" onClick={() => set("tools", example)}>
          Put in an example
        </button>
      )}
    </>
  );
}

function Recording(): JSX.Element {
  const { record } = settings.value;
  return (
    <fieldset>
      <legend>Replies</legend>
      <label class="check">
        <input type="checkbox" checked={record} onChange={(event) => set("record", event.currentTarget.checked)} />
        <span>With tokens, margins and a receipt</span>
      </label>
      <div class="pairs">
        <Short name="rivals" label="Rivals per token" />
        <Short name="beside" label="Side by side" />
      </div>
    </fieldset>
  );
}

function problem(text: string, check: (text: string) => string): string {
  return text.trim() ? check(text) : "";
}
