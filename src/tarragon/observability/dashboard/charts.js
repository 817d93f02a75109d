// Lines over time, with failures marked. The figure's caption says the newest values, or those at the cursor.

import { clock, el, number, write } from "./format.js";

const MARGIN = { left: 44, right: 12, top: 30, bottom: 20 };
const svgEl = (tag, attributes, text) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

export class Chart {
  // series: [{ name, of: (sample) => number | null }]
  constructor(figure, { title, unit, series, log = false, empty }) {
    Object.assign(this, { title, unit, series, log, empty, cursor: null, data: null });
    this.caption = el("figcaption", {}, el("b", {}, `${title} (${unit})`));
    this.values = series.map((one, index) => {
      const value = el("span", { className: `ink-${index}` });
      this.caption.append(value);
      return value;
    });
    this.plot = svgEl("svg", { class: "plot", tabindex: "0", role: "img" });
    figure.append(this.caption, this.plot);
    this.plot.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.plot.addEventListener("pointerleave", () => this.move(null));
    this.plot.addEventListener("blur", () => this.move(null));
    this.plot.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  show(samples, marks, now_s, span_s) {
    const from_s = now_s - span_s;
    this.data = {
      samples: samples.filter((one) => one.time_s >= from_s),
      marks: marks.filter((one) => one.time_s >= from_s),
      from_s,
      now_s,
    };
    this.draw();
  }

  point(x) {
    if (!this.data) return;
    const { samples } = this.data;
    const distance = (one) => Math.abs(this.x(one.time_s) - x);
    const nearest = samples.reduce((best, one) => (!best || distance(one) < distance(best) ? one : best), null);
    this.move(nearest && nearest.number);
  }

  press(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !this.data?.samples.length) return;
    event.preventDefault();
    const { samples } = this.data;
    const at = samples.findIndex((one) => one.number === this.cursor);
    const next = at < 0 ? samples.length - 1 : Math.min(samples.length - 1, Math.max(0, at + step));
    this.move(samples[next].number);
  }

  move(cursor) {
    this.cursor = cursor;
    this.draw();
  }

  x(time_s) {
    const { from_s, now_s } = this.data;
    const width = this.plot.clientWidth - MARGIN.left - MARGIN.right;
    return MARGIN.left + ((time_s - from_s) / (now_s - from_s)) * width;
  }

  scale(values) {
    const top = MARGIN.top, height = this.plot.clientHeight - MARGIN.top - MARGIN.bottom;
    if (this.log) {
      const low = Math.floor(Math.log10(Math.max(0.1, Math.min(...values))));
      const high = Math.max(low + 1, Math.ceil(Math.log10(Math.max(...values))));
      const ticks = Array.from({ length: high - low + 1 }, (_, i) => 10 ** (low + i));
      const place = (value) => (Math.log10(Math.max(value, 10 ** low)) - low) / (high - low);
      return { ticks, y: (value) => top + height * (1 - place(value)) };
    }
    const largest = Math.max(1e-9, ...values);
    const step = [1, 2, 5, 10].map((m) => m * 10 ** Math.floor(Math.log10(largest / 4))).find((s) => s * 5 >= largest);
    const high = Math.ceil(largest / step) * step;
    const ticks = Array.from({ length: Math.round(high / step) + 1 }, (_, i) => i * step);
    return { ticks, y: (value) => top + height * (1 - value / high) };
  }

  draw() {
    if (!this.data || !this.plot.clientWidth) return;
    const { samples, marks } = this.data;
    const values = samples.flatMap((one) => this.series.map(({ of }) => of(one))).filter((v) => v !== null);
    const at = samples.find((one) => one.number === this.cursor) ?? samples.at(-1);
    this.series.forEach(({ name, of }, i) => write(this.values[i], `${name} ${number(at && of(at))}`));
    const parts = [...this.axes(values), ...this.markLines(marks)];
    if (values.length) {
      const { y } = this.scale(values);
      this.series.forEach(({ of }, i) => parts.push(this.path(samples, of, y, i)));
    }
    if (this.cursor !== null && at) parts.push(...this.cursorLine(at));
    this.plot.replaceChildren(...parts);
    this.plot.setAttribute("aria-label", this.describe(values, marks, at));
  }

  axes(values) {
    const { clientWidth: width, clientHeight: height } = this.plot;
    const bottom = height - MARGIN.bottom, right = width - MARGIN.right, parts = [];
    parts.push(svgEl("line", { class: "axis", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }));
    if (!values.length) {
      parts.push(svgEl("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, this.empty));
    } else {
      const { ticks, y } = this.scale(values);
      for (const tick of ticks) {
        parts.push(svgEl("line", { class: "axis", x1: MARGIN.left, x2: right, y1: y(tick), y2: y(tick) }));
        parts.push(svgEl("text", { x: MARGIN.left - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick)));
      }
    }
    const { from_s, now_s } = this.data;
    for (const part of width < 420 ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1]) {
      const anchor = part === 0 ? "start" : part === 1 ? "end" : "middle";
      const time_s = from_s + part * (now_s - from_s);
      parts.push(svgEl("text", { x: this.x(time_s), y: height - 5, "text-anchor": anchor }, clock(time_s)));
    }
    return parts;
  }

  markLines(marks) {
    const parts = [], taken = [];
    for (const { number, time_s, worker_id, kind } of marks) {
      const x = this.x(time_s), row = taken[0] === undefined || x - taken[0] > 52 ? 0 : 1;
      const line = { x1: x, x2: x, y1: 14, y2: this.plot.clientHeight - MARGIN.bottom };
      parts.push(svgEl("line", { class: "mark", "data-kind": kind, "data-event": number, ...line }));
      if (taken[row] === undefined || x - taken[row] > 52) {
        taken[row] = x;
        const side = x > this.plot.clientWidth - 60 ? "end" : "middle";
        const name = `${kind === "healthy" ? "↑" : "✕"} ${worker_id}`;
        parts.push(svgEl("text", { class: "mark-name", "data-kind": kind, x, y: 11 + 13 * row, "text-anchor": side }, name));
      }
    }
    return parts;
  }

  path(samples, of, y, index) {
    let d = "", pen = "M";
    for (const one of samples) {
      const value = of(one);
      if (value === null) pen = "M"; // nobody said anything: a gap, no zero
      else (d += `${pen}${this.x(one.time_s).toFixed(1)} ${y(value).toFixed(1)}`), (pen = "L");
    }
    return svgEl("path", { class: `series ink-${index}`, d });
  }

  cursorLine(at) {
    const x = this.x(at.time_s), end = x > this.plot.clientWidth - 80 ? "end" : "start";
    return [
      svgEl("line", { class: "cursor", x1: x, x2: x, y1: MARGIN.top, y2: this.plot.clientHeight - MARGIN.bottom }),
      svgEl("text", { x: x + (end === "end" ? -4 : 4), y: MARGIN.top + 10, "text-anchor": end }, clock(at.time_s)),
    ];
  }

  describe(values, marks, at) {
    if (!values.length) return `${this.title}: ${this.empty}`;
    const said = this.series.map(({ name, of }) => `${name} ${number(of(at))}`).join(", ");
    const deaths = marks.filter((one) => one.kind === "dead").length;
    return `${this.title} in ${this.unit} at ${clock(at.time_s)}: ${said}. Failures shown: ${deaths}.`;
  }
}
