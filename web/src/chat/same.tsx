/** What came of asking for the same again. */
import type { JSX } from "preact";
import { visible } from "../markdown/visible";
import type { Sameness } from "../state/sameness";
import { Icon } from "../ui/icon";
import { Notice } from "../ui/parts";

export function Same({ found }: { found: Sameness }): JSX.Element {
  if (found.same) {
    return (
      <Notice kind="good">
        <Icon name="check" /> The same again, to the bit
        {found.tokens > 0 && `: ${found.tokens} tokens, ${found.numbers} numbers`}
      </Notice>
    );
  }
  return (
    <Notice kind="warning">
      Not the same. First difference at token {found.at + 1}, its {found.what}: <b>{visible(found.before)}</b> →{" "}
      <b>{visible(found.after)}</b>. {found.environment}
    </Notice>
  );
}
