// The heat map: one cell per function, layers downwards, blocks to the right.

const NAMESPACE = "http://www.w3.org/2000/svg";
const LABEL_WIDTH = 34;

export class HeatMap {
  constructor(svg, label, status) {
    Object.assign(this, { svg, label, status, cells: new Map(), selected: [0, 0] });
    svg.addEventListener("keydown", (event) => this.onKey(event));
    svg.addEventListener("click", (event) => {
      const at = event.target.dataset?.at;
      if (at) this.select(at.split(",").map(Number));
    });
  }

  show(functions) {
    const layers = [...new Set(functions.cells.map(([layer]) => layer))].sort((a, b) => a - b);
    this.rows = new Map(layers.map((layer, row) => [layer, row]));
    this.columns = Math.max(0, ...functions.cells.map(([, block]) => block)) + 1;
    this.maxLevel = functions.max_level;
    this.functions = new Map(functions.cells.map((cell) => [`${this.rows.get(cell[0])},${cell[1]}`, cell]));
    const shape = `${layers.length}x${this.columns}`;
    if (shape !== this.shape) this.build(shape, layers);
    for (const [at, cell] of this.functions) this.paint(this.cells.get(at), cell);
    const active = functions.cells.filter(([, , , replicas]) => replicas > 0).length;
    this.label.textContent =
      `Heat map of ${layers.length} layers by ${this.columns} blocks; ${active} of ` +
      `${functions.cells.length} functions shown were active when it was last updated.`;
    this.describe();
  }

  build(shape, layers) {
    this.shape = shape;
    const size = Math.max(5, Math.min(22, Math.floor(620 / this.columns)));
    this.svg.setAttribute("width", LABEL_WIDTH + this.columns * size);
    this.svg.setAttribute("height", layers.length * size);
    this.cells.clear();
    const parts = [];
    layers.forEach((layer, row) => {
      if (size >= 12 || row % 4 === 0) parts.push(this.text(layer, row * size + size * 0.7));
      for (let block = 0; block < this.columns; block += 1) {
        const at = `${row},${block}`;
        if (!this.functions.has(at)) continue;
        const cell = document.createElementNS(NAMESPACE, "rect");
        const place = { x: LABEL_WIDTH + block * size, y: row * size, width: size, height: size };
        for (const [name, value] of Object.entries(place)) cell.setAttribute(name, value);
        cell.dataset.at = at;
        this.cells.set(at, cell);
        parts.push(cell);
      }
    });
    this.svg.replaceChildren(...parts);
  }

  text(layer, y) {
    const text = document.createElementNS(NAMESPACE, "text");
    text.setAttribute("class", "axis");
    text.setAttribute("y", y);
    text.textContent = `L ${layer}`;
    return text;
  }

  paint(cell, [, , level, replicas, desired]) {
    const state = replicas > 0 ? "active" : desired > 0 ? "starting" : "zero";
    const isSelected = cell.dataset.at === this.selected.join(",");
    cell.setAttribute("class", `cell ${state}${isSelected ? " selected" : ""}`);
    cell.dataset.level = level;
    cell.setAttribute("fill-opacity", state === "active" ? 0.3 + (0.7 * level) / this.maxLevel : 1);
  }

  onKey(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    this.select([this.selected[0] + move[0], this.selected[1] + move[1]]);
  }

  select(at) {
    if (!this.functions?.has(at.join(","))) return;
    this.cells.get(this.selected.join(","))?.classList.remove("selected");
    this.selected = at;
    this.cells.get(at.join(",")).classList.add("selected");
    this.describe();
  }

  describe() {
    const cell = this.functions.get(this.selected.join(","));
    if (!cell) return;
    const [layer, block, level, replicas, desired] = cell;
    this.status.textContent =
      `Layer ${layer}, block ${block}: ${replicas} of ${desired} replicas, ` +
      `calls ${level} of ${this.maxLevel} in its layer.`;
  }
}
