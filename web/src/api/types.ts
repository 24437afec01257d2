/** What the server's API sends, as far as the page reads it. All of it is checked where it is used. */

export type Json = null | boolean | number | string | Json[] | { [name: string]: Json };
export type JsonObject = { [name: string]: Json };

export interface Law {
  holds: boolean;
  reason: string;
  checks: Record<string, boolean>;
}

export interface Model {
  id: string;
  state: string;
  detail?: string;
  progress?: { bytes: number; total_bytes: number } | null;
  load?: string;
  memory_bytes?: number | null;
  architecture?: string;
  context_length?: number;
  device?: string;
  dtype?: string;
  linear?: string;
  runner?: string;
  system_fingerprint?: string;
  defaults_fingerprint?: string;
  reproducible?: Law;
  default_sampling?: JsonObject;
  reasoning?: { open: string; close: string } | null;
  tool_calls?: { form: string | null; source: string } | null;
  fingerprint_parts?: JsonObject;
  default_parts?: JsonObject;
}

export interface ToolCall {
  id: string;
  name: string;
  arguments: string;
}

/** A rival of a token. */
export interface Rival {
  token: string;
  logprob: number;
}

/** One entry of `logprobs.content`. */
export interface TokenEntry extends Rival {
  bytes: number[] | null;
  top: Rival[];
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number };
}

export interface FirstDifference {
  position: number;
  expected: number | null;
  drawn: number | null;
  expected_text: string | null;
  drawn_text: string | null;
  closeness: number | null;
}

/** The answer of `POST /v1/receipts/verify`. */
export interface CheckReport {
  id: string;
  verdict: "identical" | "reproduced" | "consistent" | "refuted" | "not_checkable";
  sentence: string;
  mode: string;
  model: string;
  fingerprint: string;
  environment: string[];
  signed_by: string | null;
  choices: {
    index: number;
    verdict: string;
    sentence: string;
    tokens: number;
    drawn: number;
    different: number;
    largest_difference: number | null;
    score: number | null;
    first: FirstDifference | null;
  }[];
}

export interface MachineModel {
  id: string;
  state: string;
  detail?: string;
  memory_bytes: number | null;
  device?: string | null;
  system_fingerprint: string | null;
  reproducible: { holds: boolean; reason: string } | null;
  running: number | null;
  waiting: number | null;
  preemptions: number | null;
  cache: { usage: number; used_blocks: number; blocks: number; tokens: number | null } | null;
  prompt_tokens_per_second: number;
  generation_tokens_per_second: number;
  prompt_tokens: number;
  cached_tokens: number;
  generation_tokens: number;
}

/** The answer of `GET /v1/machine`. */
export interface Machine {
  version: string;
  uptime_seconds: number;
  may_manage: boolean;
  machine: {
    processor: string;
    cores: number;
    memory_bytes: number;
    free_memory_bytes: number;
    gpus: string[];
  };
  models: MachineModel[];
  server?: {
    requests_active: number;
    requests: number;
    connections: number | null;
    max_connections: number | null;
    refusals: { status: number | string; code: string; count: number }[];
  };
}

/** One of `GET /v1/keys`. */
export interface KeyInfo {
  id: string;
  name: string;
  state: string;
  admin: boolean;
  models: string[];
  balance: number | null;
  usage: Record<string, number>;
}

/** The answer of `GET /v1/usage`. */
export interface KeyUsage {
  key: string;
  balance: number | null;
  limits: Record<string, number | null>;
  data: Record<string, number | string>[];
}
