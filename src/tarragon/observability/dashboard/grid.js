// The expert routing table: a cell per layer and expert in its worker's colour, a corner in its shadow's.

import { $, el, isDark, workerColour, workerInk, workerNumber, write } from "./format.js";

const CELL_MIN = 5, CELL_MAX = 30, TEXT_MIN = 22, GUTTER = 34;
const canvas = $("grid");
let table = null, layout = null, only = null, at = null, legend = "";

export function showTable(found) {
  table = found;
  if (table) draw();
}

function shape() {
  const layers = table.candidates.length, experts = table.candidates[0]?.length ?? 0;
  const width = canvas.parentElement.clientWidth - GUTTER;
  // The longer side goes across where there is room for it, and down on a phone.
  const layersAcross = width < 640 ? layers < experts : layers > experts;
  const columns = layersAcross ? layers : experts, rows = layersAcross ? experts : layers;
  const cell = Math.max(CELL_MIN, Math.min(CELL_MAX, Math.floor(width / Math.max(1, columns))));
  return { layers, experts, layersAcross, columns, rows, cell };
}

const candidatesAt = (row, column) =>
  layout.layersAcross ? table.candidates[column][row] : table.candidates[row][column];

export function draw() {
  if (!table) return;
  layout = shape();
  const { columns, rows, cell } = layout, ratio = devicePixelRatio || 1;
  const width = GUTTER + columns * cell, height = GUTTER / 2 + rows * cell;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  drawAxes(pen);
  pen.translate(GUTTER, GUTTER / 2);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) drawCell(pen, row, column);
  }
  if (at) {
    pen.strokeStyle = isDark() ? "#fff" : "#000";
    pen.lineWidth = 2;
    pen.strokeRect(at.column * cell, at.row * cell, cell, cell);
  }
  describe();
}

function drawAxes(pen) {
  const { columns, rows, cell, layersAcross } = layout, step = cell >= 18 ? 1 : Math.ceil(28 / cell);
  pen.fillStyle = isDark() ? "#a5b0ac" : "#56605c";
  pen.font = "10px system-ui, sans-serif";
  pen.textAlign = "center";
  const every = (count) => Array.from({ length: count }, (_, i) => i).filter((i) => i % step === 0);
  for (const i of every(columns)) pen.fillText(i, GUTTER + (i + 0.5) * cell, 12);
  pen.textAlign = "right";
  for (const i of every(rows)) pen.fillText(i, GUTTER - 5, GUTTER / 2 + (i + 0.5) * cell + 4);
  pen.textAlign = "left";
  pen.fillText(layersAcross ? "E↓ L→" : "L↓ E→", 0, 10);
}

function drawCell(pen, row, column) {
  const { cell } = layout, gap = cell >= 8 ? 1 : 0.5;
  const x = column * cell, y = row * cell, size = cell - gap;
  const [primary, shadow] = candidatesAt(row, column);
  const dim = only && primary !== only && shadow !== only;
  pen.globalAlpha = dim ? 0.15 : 1;
  if (primary === undefined) return drawUnreachable(pen, x, y, size);
  pen.fillStyle = workerColour(workerNumber(primary));
  pen.fillRect(x, y, size, size);
  if (shadow !== undefined) {
    pen.fillStyle = workerColour(workerNumber(shadow));
    pen.beginPath();
    pen.moveTo(x + size, y + size * 0.35);
    pen.lineTo(x + size, y + size);
    pen.lineTo(x + size * 0.35, y + size);
    pen.fill();
  }
  if (cell >= TEXT_MIN) {
    pen.font = `600 ${Math.floor(cell * 0.4)}px system-ui, sans-serif`;
    pen.textAlign = "left";
    pen.fillStyle = workerInk(workerNumber(primary));
    pen.fillText(workerNumber(primary), x + 3, y + cell * 0.45);
  }
  pen.globalAlpha = 1;
}

function drawUnreachable(pen, x, y, size) {
  pen.globalAlpha = 1;
  pen.strokeStyle = isDark() ? "#ff8a8a" : "#b3202c";
  pen.lineWidth = 1.5;
  pen.strokeRect(x + 1, y + 1, size - 2, size - 2);
  pen.beginPath();
  pen.moveTo(x + 1, y + 1);
  pen.lineTo(x + size - 1, y + size - 1);
  pen.moveTo(x + size - 1, y + 1);
  pen.lineTo(x + 1, y + size - 1);
  pen.stroke();
}

function describe() {
  const all = table.candidates.flat(), ids = table.workers.map((worker) => worker.id).sort();
  const lost = all.filter((found) => found.length === 0).length;
  const alone = all.filter((found) => found.length === 1).length;
  const say = `${layout.layers} layers × ${layout.experts} experts, table version ${table.version}. `
    + "A cell has the colour of the worker that computes the expert, its corner that of the first shadow; "
    + `${alone} without a shadow, ${lost} unreachable (crossed out).`;
  write($("grid-summary"), say);
  canvas.setAttribute("aria-label", `Expert routing table. ${say}`);
  const rows = ids.map((id) => {
    const primaries = all.filter((found) => found[0] === id).length;
    return [id, `${id}: ${primaries}, shadow of ${all.filter((found) => found.indexOf(id) > 0).length}`];
  });
  const key = JSON.stringify([rows, only, isDark()]);
  if (key !== legend) showLegend(rows), (legend = key);
}

function showLegend(rows) {
  const focused = document.activeElement?.dataset?.worker;
  $("grid-legend").replaceChildren(...rows.map(([id, text]) => {
    const button = el("button", { type: "button", ariaPressed: String(only === id) }, text);
    button.dataset.worker = id;
    button.style.setProperty("--mine", workerColour(workerNumber(id)));
    button.onclick = () => ((only = only === id ? null : id), draw());
    return el("li", {}, button);
  }));
  if (focused) document.querySelector(`[data-worker="${CSS.escape(focused)}"]`)?.focus();
}

function select(row, column) {
  const inside = row >= 0 && column >= 0 && row < layout.rows && column < layout.columns;
  at = inside ? { row, column } : null;
  if (at) {
    const [primary, ...shadows] = candidatesAt(row, column);
    const [layer, expert] = layout.layersAcross ? [column, row] : [row, column];
    const who = primary ? `${primary}${shadows.length ? `, shadow on ${shadows.join(", ")}` : ", no shadow"}` : "unreachable";
    write($("grid-cell"), `Layer ${layer}, expert ${expert}: ${who}`);
  }
  draw();
}

canvas.addEventListener("pointermove", ({ offsetX, offsetY }) => {
  if (layout) select(Math.floor((offsetY - GUTTER / 2) / layout.cell), Math.floor((offsetX - GUTTER) / layout.cell));
});
canvas.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!step || !layout) return;
  event.preventDefault();
  const from = at ?? { row: 0, column: 0 };
  const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));
  select(clamp(from.row + (at ? step[0] : 0), layout.rows), clamp(from.column + (at ? step[1] : 0), layout.columns));
});
new ResizeObserver(draw).observe(canvas.parentElement);
