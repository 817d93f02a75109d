// Who is there, in which state, under which load; and who talks to whom.

import { $, el, epochText, number, workerColour, workerNumber, write } from "./format.js";
import { askDrain, askKill } from "./ask.js";
import { lastDeath } from "./events.js";

const SYMBOLS = { healthy: "●", starting: "◐", suspect: "▲", dead: "✕", draining: "◌" };
const FEW = 8; // of one role, so that lines between all of them can be told apart
const cards = new Map();
let shown = [];

const tierOf = (role) => (role === "attention" || role === "expert" ? role : "service");

function makeCard(worker) {
  const { id, role } = worker;
  const parts = {
    state: el("span", { className: "state" }),
    pid: el("dd"),
    epoch: el("dd"),
    held: el("dd"),
    load: el("span"),
    bar: el("i"),
    cause: el("p", { className: "cause" }),
    kill: el("button", { type: "button", ariaLabel: `Kill ${id}`, onclick: () => askKill(id, role) }, "Kill…"),
  };
  const pair = (name, dd) => el("div", {}, el("dt", {}, name), dd);
  const facts = [pair("pid", parts.pid), pair("epoch", parts.epoch)];
  if (role === "expert") facts.push(pair("experts", parts.held));
  const buttons = el("div", { className: "buttons" }, parts.kill);
  const computes = tierOf(role) !== "service";
  if (computes) {
    parts.drain = el("button", { type: "button", ariaLabel: `Drain ${id}`, onclick: () => askDrain(id) }, "Drain…");
    buttons.append(parts.drain);
  }
  const card = el("article", { className: "worker", ariaLabel: `${id}, ${role} worker` },
    el("div", { className: "name" }, el("h4", {}, id), parts.state),
    el("dl", {}, ...facts));
  if (computes) card.append(el("div", { className: "load" }, parts.load, parts.bar));
  card.append(parts.cause, buttons);
  card.dataset.id = id;
  document.querySelector(`[data-tier="${tierOf(role)}"] .cards`).append(card);
  return { card, parts };
}

function update({ card, parts }, worker, rate, largest) {
  if (card.dataset.state !== worker.state) card.dataset.state = worker.state;
  write(parts.state, `${SYMBOLS[worker.state] ?? "?"} ${worker.state}`);
  write(parts.pid, String(worker.pid || "–"));
  write(parts.epoch, epochText(worker.epoch));
  parts.epoch.title = String(worker.epoch);
  write(parts.held, number(worker.experts_resident));
  write(parts.load, rate === undefined ? "no load reported" : `${number(rate)} rows/s`);
  parts.bar.style.setProperty("--fill", `${largest && rate ? (100 * rate) / largest : 0}%`);
  // A dead worker is replaced so fast that often nobody sees it dead: what its card says stays.
  const cause = (worker.given_up ? "given up; " : "") + (lastDeath(worker.id) ?? worker.cause ?? "");
  write(parts.cause, cause);
  parts.cause.hidden = !cause;
  parts.kill.disabled = worker.state === "dead";
  if (parts.drain) parts.drain.disabled = worker.state !== "healthy";
  if (worker.role === "expert") card.style.setProperty("--mine", workerColour(workerNumber(worker.id)));
}

export function showWorkers(workers, rates) {
  const ids = new Set(workers.map((worker) => worker.id));
  for (const [id, { card }] of cards) if (!ids.has(id)) cards.delete(id), card.remove();
  const largest = {};
  for (const { id, role } of workers) largest[role] = Math.max(largest[role] ?? 0, rates[id] ?? 0);
  for (const worker of workers) {
    if (!cards.has(worker.id)) cards.set(worker.id, makeCard(worker));
    update(cards.get(worker.id), worker, rates[worker.id], largest[worker.role]);
  }
  shown = workers;
  drawLinks();
}

function drawLinks() {
  const of = (role) => shown.filter((worker) => worker.role === role);
  const few = of("attention").length <= FEW && of("expert").length <= FEW;
  $("topology").classList.toggle("few", few);
  const svg = $("links");
  if (!few || getComputedStyle(svg).display === "none") return svg.replaceChildren();
  const origin = $("topology").getBoundingClientRect();
  const box = ({ id }) => cards.get(id).card.getBoundingClientRect();
  const line = (from, to) => {
    const a = box(from), b = box(to);
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const x1 = a.right - origin.left, y1 = a.top + a.height / 2 - origin.top;
    const x2 = b.left - origin.left, y2 = b.top + b.height / 2 - origin.top, bend = (x2 - x1) / 2;
    path.setAttribute("d", `M${x1} ${y1}C${x1 + bend} ${y1} ${x2 - bend} ${y2} ${x2} ${y2}`);
    const up = (worker) => worker.state === "healthy" || worker.state === "draining";
    if (!up(from) || !up(to)) path.setAttribute("data-broken", "");
    return path;
  };
  const attention = of("attention");
  svg.replaceChildren(
    ...[...of("gateway"), ...of("store")].flatMap((one) => attention.map((aw) => line(one, aw))),
    ...attention.flatMap((aw) => of("expert").map((ew) => line(aw, ew))),
  );
}

new ResizeObserver(drawLinks).observe($("topology"));
