// Events of the last ten minutes, as marks on a line and as a list.

import { clock, element, seconds } from "./figures.js";

const NAMESPACE = "http://www.w3.org/2000/svg";
const SPAN_S = 600;
const WIDTH = 520;
const HEIGHT = 44;
const CLASSES = { "sandbox gone": "gone", "scaled to zero": "gone", "sandbox started": "started" };

export function showTimeline(svg, list, events) {
  const now = Date.now() / 1000;
  const recent = events.filter((event) => now - event.at < SPAN_S);
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("width", "100%");
  svg.replaceChildren(
    shape("line", { class: "line", x1: 0, x2: WIDTH, y1: HEIGHT - 6, y2: HEIGHT - 6 }),
    ...recent.map((event) => {
      const height = Math.min(HEIGHT - 10, 6 + 6 * Math.log2(1 + event.count));
      return shape("rect", {
        class: `mark ${CLASSES[event.kind] ?? ""}`,
        x: WIDTH * (1 - (now - event.at) / SPAN_S) - 2, y: HEIGHT - 6 - height, width: 3, height,
      });
    }),
  );
  list.replaceChildren(...recent.reverse().slice(0, 40).map((event) => element("li", describe(event))));
}

function describe({ kind, at, count, longest_s: longest }) {
  const what = kind.startsWith("sandbox") ? `${count} × ${kind}` : `${count} functions ${kind}`;
  return `${clock(at)}: ${what}${longest == null ? "" : `, the slowest after ${seconds(longest)}`}`;
}

function shape(tag, attributes) {
  const made = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
