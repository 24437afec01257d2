/** The page's icons, as paths in a square of 20. They only repeat what a label says. */
import type { JSX } from "preact";

const PATHS = {
  copy: "M7 7V4.5h8.5V13H13M4.5 7H13v8.5H4.5z",
  check: "M4.5 10.5l3.5 3.5 7.5-8",
  send: "M10 16V4.5M5 9.5l5-5 5 5",
  stop: "M6 6h8v8H6z",
  plus: "M10 4.5v11M4.5 10h11",
  menu: "M3.5 6h13M3.5 10h13M3.5 14h13",
  sliders: "M3.5 6.5h7M14 6.5h2.5M3.5 13.5H6M9.5 13.5h7M12 4.7v3.6M7.7 11.7v3.6",
  close: "M5.5 5.5l9 9M14.5 5.5l-9 9",
  edit: "M5 15l.8-3.2 7.4-7.4 2.4 2.4-7.4 7.4z",
  again: "M15.5 8A6 6 0 1 0 16 10.5M15.8 4.5V8h-3.5",
  next: "M5 5.5l6 4.5-6 4.5zM14.5 5.5v9",
  columns: "M4 4.5h3.5v11H4zM12.5 4.5H16v11h-3.5zM8.2 4.5h3.6v11H8.2z",
  left: "M12 5.5L7.5 10l4.5 4.5",
  right: "M8 5.5l4.5 4.5L8 14.5",
  down: "M5.5 8l4.5 4.5L14.5 8",
  trash: "M5 6.5h10M8 6.5V4.5h4v2M6 6.5l.7 9h6.6l.7-9",
  sun: "M10 6.7a3.3 3.3 0 1 0 0 6.6 3.3 3.3 0 0 0 0-6.6M10 2.7v1.5M10 15.8v1.5M2.7 10h1.5M15.8 10h1.5M4.9 4.9l1 1M14.1 14.1l1 1M4.9 15.1l1-1M14.1 5.9l1-1",
  moon: "M15.5 11.5A6 6 0 0 1 8.5 4.5a6 6 0 1 0 7 7z",
  auto: "M10 3.5a6.5 6.5 0 1 0 0 13zM10 3.5a6.5 6.5 0 0 1 0 13",
  key: "M12.5 4a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7M10 10l-6 6M6.3 13.7l2 2",
  dice: "M4 4h12v12H4zM7 7h.6v.6H7zM12.4 7h.6v.6h-.6zM7 12.4h.6v.6H7zM12.4 12.4h.6v.6h-.6zM9.7 9.7h.6v.6h-.6z",
  download: "M10 4v8.5M6 9l4 4 4-4M4.5 16h11",
  upload: "M10 13V4.5M6 8l4-4 4 4M4.5 16h11",
  tokens: "M3.5 5.5h5v3.5h-5zM11 5.5h5.5v3.5H11zM3.5 11.5h7.5V15H3.5zM13.5 11.5h3V15h-3z",
  code: "M7 6l-4 4 4 4M13 6l4 4-4 4",
  receipt: "M5.5 3.5h9v13l-2.2-1.4-2.3 1.4-2.3-1.4-2.2 1.4zM8 7.5h4M8 10.5h4",
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name }: { name: IconName }): JSX.Element {
  return (
    <svg class="icon" viewBox="0 0 20 20" aria-hidden="true" focusable="false">
      <path d={PATHS[name]} />
    </svg>
  );
}
