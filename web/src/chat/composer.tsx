/** Where one writes: the text, the seed, how many replies, send and stop. */
import type { JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { ask, askBeside, beside, fault, ROOT, running, say, stop } from "../state/asking";
import { path } from "../state/history";
import { chosen } from "../state/models";
import { set, settings } from "../state/settings";
import { Icon } from "../ui/icon";
import { Notice } from "../ui/parts";

export function Composer(): JSX.Element {
  const [text, setText] = useState("");
  const field = useRef<HTMLTextAreaElement>(null);
  const busy = running.value.size > 0;
  useEffect(() => {
    const box = field.current;
    if (!box) return;
    box.style.height = "auto";
    box.style.height = `${Math.min(box.scrollHeight, 240)}px`;
  }, [text]);
  useEffect(() => {
    const shortcut = (event: KeyboardEvent): void => {
      const inField = event.target instanceof HTMLElement && event.target.matches("input, textarea, select");
      if (event.key === "Escape" && running.value.size > 0) stop();
      if (event.key === "/" && !inField && !event.ctrlKey && !event.metaKey) {
        event.preventDefault();
        field.current?.focus();
      }
    };
    addEventListener("keydown", shortcut);
    return () => removeEventListener("keydown", shortcut);
  }, []);
  const send = (count = 1): void => {
    if (busy || !text.trim() || !chosen.value) return;
    beside.value = "";
    const message = say("user", text, path.value.at(-1)?.id ?? ROOT);
    if (count > 1) askBeside(message.id, count);
    else ask(message.id);
    setText("");
    field.current?.focus();
  };
  return (
    <form
      class="composer"
      onSubmit={(event) => {
        event.preventDefault();
        send();
      }}
    >
      {fault.value && <Notice kind="error">{fault.value}</Notice>}
      <div class="composer-box">
        <textarea
          ref={field}
          rows={1}
          dir="auto"
          aria-label="Message"
          placeholder={chosen.value ? `Write to ${chosen.value}` : "Write a message"}
          value={text}
          onInput={(event) => setText(event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
            event.preventDefault();
            send();
          }}
        />
        <div class="composer-row">
          <Seed />
          <span class="space" />
          <button
            type="button"
            class="quiet"
            disabled={busy || !text.trim()}
            title="Several replies, each with the next seed"
            onClick={() => send(Math.min(8, Math.max(2, Number(settings.value.beside) || 3)))}
          >
            <Icon name="columns" />
            <span>{Math.min(8, Math.max(2, Number(settings.value.beside) || 3))} side by side</span>
          </button>
          {busy ? (
            <button type="button" class="round stop" aria-label="Stop" title="Stop (Esc)" onClick={() => stop()}>
              <Icon name="stop" />
            </button>
          ) : (
            <button class="round" aria-label="Send" title="Send (Enter)" disabled={!text.trim() || !chosen.value}>
              <Icon name="send" />
            </button>
          )}
        </div>
      </div>
    </form>
  );
}

/** The seed: the one that was drawn fills in; one that is typed is kept. */
function Seed(): JSX.Element {
  const { seed, draw } = settings.value;
  return (
    <div class="seed">
      <label>
        <span>Seed</span>
        <input
          class={draw ? "drawn" : undefined}
          inputMode="numeric"
          autocomplete="off"
          spellcheck={false}
          placeholder="drawn"
          value={seed}
          onInput={(event) => {
            set("seed", event.currentTarget.value);
            set("draw", event.currentTarget.value.trim() === "");
          }}
        />
      </label>
      <button
        type="button"
        class={draw ? "quiet on" : "quiet"}
        aria-pressed={draw}
        aria-label="Draw a new seed for each reply"
        title="Draw a new seed for each reply"
        onClick={() => set("draw", !draw)}
      >
        <Icon name="dice" />
      </button>
    </div>
  );
}
