/** The models with their states: choose one, load it, take it out of memory. */
import type { JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import type { Model } from "../api/types";
import { change, chosen, listed, model, models, modelsFault, stateOf } from "../state/models";
import { Icon } from "./icon";
import { bytes } from "./numbers";
import { Notice } from "./parts";

export function ModelMenu(): JSX.Element {
  const [open, setOpen] = useState(false);
  const place = useRef<HTMLDivElement>(null);
  const button = useRef<HTMLButtonElement>(null);
  useEffect(() => {
    if (!open) return undefined;
    const away = (event: Event): void => {
      if (!place.current?.contains(event.target as Node)) setOpen(false);
    };
    const escape = (event: KeyboardEvent): void => {
      if (event.key !== "Escape") return;
      setOpen(false);
      button.current?.focus();
    };
    addEventListener("pointerdown", away);
    addEventListener("keydown", escape);
    return () => {
      removeEventListener("pointerdown", away);
      removeEventListener("keydown", escape);
    };
  }, [open]);
  const now = model.value;
  return (
    <div class="menu" ref={place}>
      <button
        type="button"
        class="model-button"
        ref={button}
        aria-expanded={open}
        aria-label={now ? `Model: ${now.id}, ${stateOf(now)}` : "Models"}
        onClick={() => setOpen(!open)}
      >
        {now && <span class={`light ${now.state}`} />}
        <span class="model-name">{now ? now.id : listed.value ? "no model" : "…"}</span>
        {now && now.state !== "ready" && <span class="muted">{stateOf(now)}</span>}
        <Icon name="down" />
      </button>
      {open && (
        <div class="menu-body" role="group" aria-label="Models">
          {modelsFault.value && <Notice kind="error">{modelsFault.value}</Notice>}
          {models.value.map((one) => (
            <ModelRow key={one.id} one={one} chosen={() => setOpen(false)} />
          ))}
        </div>
      )}
    </div>
  );
}

function ModelRow({ one, chosen: done }: { one: Model; chosen: () => void }): JSX.Element {
  const [fault, setFault] = useState("");
  const [busy, setBusy] = useState(false);
  const active = chosen.value === one.id;
  const act = async (what: "load" | "unload"): Promise<void> => {
    setBusy(true);
    setFault(await change(one.id, what));
    setBusy(false);
  };
  const memory = one.memory_bytes ? ` · ${bytes(one.memory_bytes)}` : "";
  return (
    <div class={active ? "model-row active" : "model-row"}>
      <button
        type="button"
        class="model-choice"
        aria-pressed={active}
        onClick={() => {
          chosen.value = one.id;
          done();
        }}
      >
        <span class={`light ${one.state}`} />
        <span>
          <span class="model-name">{one.id}</span>
          <span class="muted">
            {stateOf(one)}
            {memory}
            {one.state !== "ready" && one.detail && one.detail !== one.state ? ` · ${one.detail}` : ""}
          </span>
        </span>
      </button>
      {one.state === "ready" ? (
        <button type="button" disabled={busy} aria-label={`Unload ${one.id}`} onClick={() => void act("unload")}>
          Unload
        </button>
      ) : (
        ["unloaded", "failed", "dead"].includes(one.state) && (
          <button type="button" disabled={busy} aria-label={`Load ${one.id}`} onClick={() => void act("load")}>
            Load
          </button>
        )
      )}
      {one.progress && one.progress.total_bytes > 0 && (
        <progress
          max={one.progress.total_bytes}
          value={one.progress.bytes}
          aria-label={`${one.id}: bytes that were read`}
        />
      )}
      {fault && <Notice kind="error">{fault}</Notice>}
    </div>
  );
}
