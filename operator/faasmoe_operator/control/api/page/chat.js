// A chat over the model's own OpenAI API, which says what the request waited for.

import { element, seconds, showPairs } from "./figures.js";
import { bearer, eventsOf } from "./stream.js";

const MAX_TOKENS = 200;

/** Says whether the page's server is an OpenAI API too; the operator's is not. */
export async function hasChat() {
  return (await fetch("/v1/models", { method: "HEAD" })).status !== 404;
}

export function connectChat({ form, message, apiKey, answer, waits, tenant, model }) {
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = form.querySelector("button");
    button.disabled = true;
    answer.replaceChildren();
    waits.replaceChildren();
    try {
      await chat({ text: message.value, key: apiKey.value, name: model(), answer, waits });
      if (apiKey.value) await showUsage(tenant, apiKey.value);
    } catch (error) {
      answer.replaceChildren(element("strong", String(error.message ?? error)));
    } finally {
      button.disabled = false;
    }
  });
}

async function chat({ text, key, name, answer, waits }) {
  const started = performance.now();
  const body = {
    model: name, stream: true, max_tokens: MAX_TOKENS, stream_options: { include_usage: true },
    messages: [{ role: "user", content: text }],
  };
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json", ...bearer(key) }, body: JSON.stringify(body),
  });
  if (!response.ok) throw new Error((await response.json()).error?.message ?? `HTTP ${response.status}`);
  const coldStart = Number(response.headers.get("X-FaaSMoE-Cold-Start") ?? 0);
  let first = null, usage = null;
  for await (const data of eventsOf(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    usage = chunk.usage ?? usage;
    const delta = chunk.choices?.[0]?.delta?.content;
    if (!delta) continue;
    first ??= performance.now();
    answer.append(delta);
  }
  showWaits(waits, { started, first, coldStart, usage });
}

function showWaits(waits, { started, first, coldStart, usage }) {
  const end = performance.now();
  const firstS = first === null ? null : (first - started) / 1000;
  const tokens = usage?.completion_tokens ?? 0;
  showPairs(waits, [
    ["Waited for functions", seconds(coldStart)],
    ["First token after", firstS === null ? "no text" : seconds(firstS)],
    ["Tokens", `${tokens}, of a prompt of ${usage?.prompt_tokens ?? 0}`],
    ["Tokens per second", first === null || tokens < 2 ? "–" : ((tokens - 1) / ((end - first) / 1000)).toFixed(1)],
  ]);
}

/** Shows the use of the tenant whose key was given: its own row only. */
async function showUsage(list, key) {
  const response = await fetch("/v1/usage", { headers: bearer(key) });
  if (!response.ok) return;
  const usage = await response.json();
  showPairs(list, [
    ["Tenant", String(usage.tenant ?? "–")],
    ["Requests completed", String(usage.requests?.completed ?? 0)],
    ["Expert GB-seconds", String(usage.expert_gb_seconds ?? 0)],
    ["Tokens generated", String(usage.completion_tokens ?? 0)],
  ]);
}
