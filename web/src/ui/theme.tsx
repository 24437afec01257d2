/** Light, dark, or as the system has it. */
import type { JSX } from "preact";
import { theme, type Theme } from "../state/session";
import { Icon, type IconName } from "./icon";

const NEXT: Record<Theme, Theme> = { auto: "light", light: "dark", dark: "auto" };
const ICONS: Record<Theme, IconName> = { auto: "auto", light: "sun", dark: "moon" };
const WORDS: Record<Theme, string> = { auto: "as the system", light: "light", dark: "dark" };

export function ThemeSwitch(): JSX.Element {
  const label = `Colours: ${WORDS[theme.value]}`;
  return (
    <button
      type="button"
      class="quiet"
      aria-label={label}
      title={label}
      onClick={() => {
        theme.value = NEXT[theme.value];
      }}
    >
      <Icon name={ICONS[theme.value]} />
    </button>
  );
}
