// What happened lately, newest first; and what of it the charts mark.

import { $, clock, el } from "./format.js";

const KEPT = 400;
const LEVELS = {
  dead: "bad", exited: "bad", "given up": "bad", refused: "bad", unreachable: "bad",
  suspect: "warn", backoff: "warn", placement: "warn", draining: "warn", stop: "warn", left: "warn",
  healthy: "good",
};
let marks = [];
const died = new Set();
const deaths = new Map();

export const level = (kind) => LEVELS[kind] ?? "plain";
export const failureMarks = () => marks;

export function lastDeath(id) {
  const death = deaths.get(id);
  return death && `died at ${clock(death.time_s)}: ${death.text}`;
}

export function addEvents(events) {
  const rows = $("event-rows");
  for (const event of events) {
    const row = el("tr", {},
      el("td", {}, clock(event.time_s)), el("td", {}, event.worker_id), el("td", {}, event.kind), el("td", {}, event.text));
    row.dataset.level = level(event.kind);
    rows.prepend(row);
    mark(event);
  }
  while (rows.childElementCount > KEPT) rows.lastElementChild.remove();
}

// A death, and the return of who had died; not the first start of everybody.
function mark({ number, kind, worker_id, epoch, time_s, text }) {
  const death = deaths.get(worker_id);
  // A closed connection tells of a death first; how the process ended is known when it is reaped.
  if (kind === "exited" && death?.epoch === epoch) death.text = text;
  if (kind === "dead") died.add(worker_id), deaths.set(worker_id, { epoch, time_s, text });
  else if (kind !== "healthy" || !died.delete(worker_id)) return;
  marks.push({ number, kind, worker_id, time_s });
  marks = marks.slice(-KEPT);
}

$("failures-only").addEventListener("change", (event) =>
  $("event-rows").classList.toggle("failures-only", event.target.checked));
