// Asks once a second and hands the answers to the parts of the page.

import { $, el, write } from "./format.js";
import { get } from "./api.js";
import { askAdd, askKey, say } from "./ask.js";
import { showWorkers } from "./topology.js";
import { Chart } from "./charts.js";
import { draw as drawGrid, showTable } from "./grid.js";
import { addEvents, failureMarks } from "./events.js";

const POLL_MS = 1000;
let orchestrator = null, version = null, seen = { event: 0, sample: 0 }, samples = [], states = new Map();

const charts = [
  new Chart($("throughput"), {
    title: "Throughput", unit: "tokens/s", empty: "nobody has reported yet",
    series: [
      { name: "sent", of: (one) => one.tokens_per_s },
      { name: "computed, prompts included", of: (one) => one.tokens_computed_per_s },
    ],
  }),
  new Chart($("tbt"), {
    title: "Time between tokens", unit: "ms", log: true, empty: "no stream, or the gateway does not say",
    series: [
      { name: "median", of: (one) => one.tbt_ms.median },
      { name: "P95", of: (one) => one.tbt_ms.p95 },
      { name: "longest", of: (one) => one.tbt_ms.max },
    ],
  }),
  new Chart($("lag"), {
    title: "Checkpoint lag", unit: "ms", empty: "no attention worker reports one",
    series: [{ name: "longest", of: (one) => one.checkpoint_lag_ms }],
  }),
  new Chart($("streams"), {
    title: "Streams", unit: "in progress", empty: "the gateway does not say",
    series: [{ name: "now", of: (one) => one.streams }],
  }),
];

function badges(status) {
  const { experts } = status;
  const because = (reason) => (reason ? ` (${reason})` : "");
  const list = [
    status.ready ? ["serving", "good"] : ["not serving", "bad"],
    status.full_capacity ? ["full capacity", "good"] : ["reduced capacity", "warn"],
    status.exact ? ["exact", "good"] : ["not exact", "warn", status.exact_reason],
    status.protected ? ["protected", "good"] : ["unprotected", "warn", status.protected_reason],
    [`${experts.with_shadow} of ${experts.total} experts with a shadow`, experts.with_shadow === experts.total ? "good" : "warn"],
    ...(experts.unreachable ? [[`${experts.unreachable} experts unreachable`, "bad"]] : []),
  ];
  const now = list.map(([text, level, reason]) => `${level}|${text}${because(reason)}`);
  const shown = $("badges");
  if (shown.dataset.now === now.join("\n")) return;
  shown.dataset.now = now.join("\n");
  shown.replaceChildren(...list.map(([text, level, reason]) => {
    const item = el("li", { title: reason ?? "" }, text, el("span", { className: "unseen" }, because(reason)));
    item.dataset.level = level;
    return item;
  }));
}

function announce(workers) {
  for (const { id, state } of workers) {
    const before = states.get(id);
    if (before && before !== state) say(`${id} is ${state}`);
    states.set(id, state);
  }
}

// A restarted orchestrator counts its events and samples from 1 again.
function noticeRestart(workers) {
  const epoch = workers.find((worker) => worker.role === "orchestrator")?.epoch;
  if (orchestrator !== null && epoch !== orchestrator) (seen = { event: 0, sample: 0 }), (version = null);
  orchestrator = epoch;
}

async function poll() {
  const status = await get("/status");
  noticeRestart(status.workers);
  const [events, history] = await Promise.all([
    get(`/events?after=${seen.event}`),
    get(`/history?after=${seen.sample}`),
  ]);
  if (status.ert_version !== version) showTable(await get("/table")), (version = status.ert_version);
  addEvents(events.events);
  seen.event = events.events.at(-1)?.number ?? seen.event;
  seen.sample = history.samples.at(-1)?.number ?? seen.sample;
  samples = [...samples, ...history.samples].slice(-history.samples_max);
  const last = samples.at(-1);
  badges(status);
  announce(status.workers);
  showWorkers(status.workers, last?.rows_per_s ?? {});
  drawCharts();
}

function drawCharts() {
  const last = samples.at(-1), span_s = Number($("span").value);
  if (last) for (const chart of charts) chart.show(samples, failureMarks(), last.time_s, span_s);
}

async function pollForever() {
  for (;;) {
    if (!document.hidden) {
      try {
        await poll();
        $("banner").hidden = true;
      } catch (error) {
        if (error.status === 401) askKey(() => {});
        const what = error.status ? error.message : "The orchestrator does not answer; the workers go on without it, and this page asks again.";
        write($("banner"), what);
        $("banner").hidden = false;
      }
    }
    await new Promise((done) => setTimeout(done, POLL_MS));
  }
}

const THEMES = ["auto", "light", "dark"];
function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  localStorage.setItem("tarragon-theme", theme);
  write($("theme"), `Theme: ${theme}`);
  drawGrid();
  drawCharts();
}
const theme = () => localStorage.getItem("tarragon-theme") ?? "auto";
$("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(theme()));
for (const button of document.querySelectorAll("[data-add]")) {
  button.addEventListener("click", () => askAdd(button.dataset.add));
}
$("span").addEventListener("change", drawCharts);
setTheme(theme());
pollForever();
