/** What the machine and its models are doing now, and keys and usage for whom they concern. */
import type { JSX } from "preact";
import { useEffect, useState } from "preact/hooks";
import { ApiError, get, told } from "../api/client";
import type { Machine, MachineModel } from "../api/types";
import { key, reachable } from "../state/session";
import { models, stateOf } from "../state/models";
import { bytes, count, duration, percent } from "../ui/numbers";
import { Empty, Facts, Notice, Panel } from "../ui/parts";
import { Keys } from "./keys";

const EVERY = 2000;

export function MachineTab(): JSX.Element {
  const [machine, setMachine] = useState<Machine>();
  const [fault, setFault] = useState("");
  useEffect(() => {
    let timer = 0;
    let open = true;
    const ask = async (): Promise<void> => {
      try {
        if (!document.hidden) setMachine(await get<Machine>("/v1/machine"));
        setFault("");
      } catch (error) {
        const missing = error instanceof ApiError && error.status === 404;
        setFault(missing ? "This server has no /v1/machine, so that it does not tell what it is doing." : told(error));
        if (missing) open = false;
      }
      if (open) timer = window.setTimeout(() => void ask(), EVERY);
    };
    void ask();
    return () => {
      open = false;
      clearTimeout(timer);
    };
  }, [key.value]);
  if (!machine) {
    return fault ? (
      <div class="page">
        <div class="page-head">
          <h1>Machine</h1>
        </div>
        <Notice kind="info">{fault}</Notice>
        <States />
        {key.value && <Keys manage={false} />}
      </div>
    ) : (
      <Empty title="Asking …" />
    );
  }
  return (
    <div class="page">
      <div class="page-head">
        <h1>Machine</h1>
        <span class="muted">
          verbatim {machine.version} · up {duration(machine.uptime_seconds)}
        </span>
      </div>
      {fault && reachable.value && <Notice kind="error">{fault}</Notice>}
      <Host machine={machine} />
      {machine.models.map((one) => (
        <ModelPanel key={one.id} one={one} />
      ))}
      {machine.server && <Server server={machine.server} />}
      {key.value && <Keys manage={machine.may_manage} />}
    </div>
  );
}

/** What is known of the models without the endpoint. */
function States(): JSX.Element {
  return (
    <Panel title="Models">
      <Facts rows={models.value.map((one) => [one.id, stateOf(one)])} />
    </Panel>
  );
}

function Host({ machine }: { machine: Machine }): JSX.Element {
  const { machine: host } = machine;
  const used = host.memory_bytes - host.free_memory_bytes;
  return (
    <Panel title={host.processor || "This machine"}>
      <div class="tiles">
        <Tile name="Cores" value={count(host.cores)} />
        <Tile
          name="Memory in use"
          value={bytes(used)}
          note={`of ${bytes(host.memory_bytes)}`}
          share={host.memory_bytes ? used / host.memory_bytes : 0}
        />
        {host.gpus.map((gpu, i) => (
          <Tile key={i} name={`GPU ${i}`} value={String(gpu)} />
        ))}
      </div>
    </Panel>
  );
}

function ModelPanel({ one }: { one: MachineModel }): JSX.Element {
  const { cache } = one;
  const read = one.prompt_tokens;
  return (
    <Panel
      title={one.id}
      actions={
        <span class="state">
          <span class={`light ${one.state}`} /> {one.state}
        </span>
      }
    >
      <div class="tiles">
        <Tile name="Running" value={one.running === null ? "–" : count(one.running)} />
        <Tile name="Waiting" value={one.waiting === null ? "–" : count(one.waiting)} />
        <Tile name="Tokens/s" value={one.generation_tokens_per_second.toFixed(1)} note={`prompt ${one.prompt_tokens_per_second.toFixed(1)}/s`} />
        <Tile
          name="Cache"
          value={cache ? percent(cache.usage) : "–"}
          note={read ? `${percent(one.cached_tokens / read)} of prompts found` : undefined}
          share={cache?.usage}
        />
        <Tile name="Memory" value={bytes(one.memory_bytes)} note={one.device ?? undefined} />
        <Tile name="Generated" value={count(one.generation_tokens)} note="tokens" />
      </div>
      <p class="origin">
        {one.system_fingerprint && <span>{one.system_fingerprint}</span>}
        {one.reproducible && (
          <span>{one.reproducible.holds ? "reproducible" : `not reproducible: ${one.reproducible.reason}`}</span>
        )}
        {one.state !== "ready" && one.detail && <span>{one.detail}</span>}
      </p>
    </Panel>
  );
}

function Server({ server }: { server: NonNullable<Machine["server"]> }): JSX.Element {
  return (
    <Panel title="Server">
      <div class="tiles">
        <Tile name="Requests now" value={count(server.requests_active)} note={`${count(server.requests)} in all`} />
        <Tile
          name="Connections"
          value={server.connections === null ? "–" : count(server.connections)}
          note={server.max_connections === null ? undefined : `of ${count(server.max_connections)}`}
        />
        <Tile name="Refusals" value={count(server.refusals.reduce((sum, one) => sum + one.count, 0))} />
      </div>
      {server.refusals.length > 0 && (
        <Facts rows={server.refusals.map((one) => [`${one.status} ${one.code}`, count(one.count)])} />
      )}
    </Panel>
  );
}

function Tile(props: {
  name: string;
  value: string;
  note?: string | undefined;
  share?: number | undefined;
}): JSX.Element {
  return (
    <div class="tile">
      <span class="tile-name">{props.name}</span>
      <span class="tile-value">{props.value}</span>
      {props.share !== undefined && <meter min={0} max={1} value={props.share} aria-label={props.name} />}
      {props.note && <span class="tile-note">{props.note}</span>}
    </div>
  );
}
