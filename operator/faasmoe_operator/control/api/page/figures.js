// Figures and lists: text only.

export const size = (bytes) =>
  bytes < 1e8 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
export const seconds = (value) => `${value.toFixed(value < 10 ? 2 : 0)} s`;
export const clock = (unixSeconds) => new Date(unixSeconds * 1000).toLocaleTimeString();

/** Shows [term, text] pairs in a description list. */
export function showPairs(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([term, text]) => [element("dt", term), element("dd", text)]));
}

export function showRows(body, rows) {
  body.replaceChildren(...rows.map((row) => {
    const line = document.createElement("tr");
    line.append(...row.map((text) => element("td", text)));
    return line;
  }));
}

export function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

/** Returns what a model costs now, as pairs. `since` is how old the view is, in seconds. */
export function costPairs(view, since) {
  const { memory, functions } = view;
  const active = memory.active_gb_s + (memory.active_bytes / 1e9) * since;
  const resident = memory.resident_gb_s + (memory.all_bytes / 1e9) * since;
  const saved = resident > 0 ? ` (${(100 * (1 - active / resident)).toFixed(0)} % saved)` : "";
  return [
    ["Active functions", `${functions.active} of ${functions.total}`],
    ["Active weights", `${size(memory.active_bytes)} of ${size(memory.all_bytes)}`],
    ["GB-seconds", `${active.toPrecision(3)} of ${resident.toPrecision(3)} with all resident${saved}`],
    ["Routers", String(view.routers)],
    ["Queued", String(view.queued)],
  ];
}
