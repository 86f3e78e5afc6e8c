// The live page: follows one model's events and draws them.

import { connectChat, hasChat } from "./chat.js";
import { costPairs, showPairs, showRows, clock } from "./figures.js";
import { HeatMap } from "./heatmap.js";
import { bearer, eventsOf } from "./stream.js";
import { showTimeline } from "./timeline.js";

const RETRY_MS = 2000;
const byId = (id) => document.getElementById(id);
const map = new HeatMap(byId("map"), byId("map-label"), byId("cell"));
const keyHeaders = () => bearer(sessionStorage.getItem("faasmoe-page-key"));
let view = null;
let received = 0;
let following = null;

async function follow(name) {
  following?.abort();
  const abort = (following = new AbortController());
  while (!abort.signal.aborted) {
    try {
      const response = await fetch(`events?model=${encodeURIComponent(name)}`, {
        headers: keyHeaders(), signal: abort.signal,
      });
      if (!response.ok) throw new Error((await response.json()).error.message);
      byId("connection").textContent = "live";
      for await (const data of eventsOf(response)) show(JSON.parse(data));
      throw new Error("the stream ended");
    } catch (error) {
      if (abort.signal.aborted) return;
      byId("connection").textContent = `not connected: ${error.message}`;
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }
}

function show(next) {
  view = next;
  received = performance.now();
  const { shown_at: at, min_tokens: tokens } = view.functions;
  byId("failure").hidden = !view.failure;
  byId("failure").textContent = view.failure;
  byId("window").textContent =
    `${at === null ? "Nothing shown yet" : `As of ${clock(at)}`}: shown as sums of at least ${tokens} ` +
    "tokens of all tenants, with noise, so that they tell nothing of single tokens.";
  map.show(view.functions);
  showTimeline(byId("timeline"), byId("events"), view.events);
  showRows(byId("sandboxes"), view.sandboxes.map(
    (s) => [s.id, s.state, String(s.functions), s.node || "this machine"]));
  byId("tenants-section").hidden = view.tenants === null;
  showRows(byId("tenants"), (view.tenants ?? []).map(
    (t) => [t.name, ...[t.requests, t.prompt_tokens, t.generated_tokens].map(String), t.gb_s.toPrecision(3)]));
  showCost();
}

function showCost() {
  if (view) showPairs(byId("figures"), costPairs(view, (performance.now() - received) / 1000));
}

async function open() {
  const response = await fetch("models", { headers: keyHeaders() });
  byId("key-form").hidden = response.status !== 401;
  if (!response.ok) {
    byId("connection").textContent = (await response.json()).error.message;
    return;
  }
  byId("chat-section").hidden = !(await hasChat());
  const { models } = await response.json();
  byId("model").replaceChildren(...models.map((name) => new Option(name)));
  if (models.length) follow(models[0]);
  else byId("connection").textContent = "no model runs";
}

byId("model").addEventListener("change", (event) => follow(event.target.value));
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("faasmoe-page-key", byId("key").value);
  open();
});
connectChat({
  form: byId("chat"), message: byId("message"), apiKey: byId("api-key"), answer: byId("answer"),
  waits: byId("waits"), tenant: byId("tenant"), model: () => byId("model").value,
});
setInterval(showCost, 1000);
open();
