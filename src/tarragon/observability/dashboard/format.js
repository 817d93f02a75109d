// Small things that every part of the page needs: elements, numbers, colours.

export const $ = (id) => document.getElementById(id);

export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// Writes only what differs: a screen reader, the focus and a selection stay where they are.
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const counts = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
export function number(value) {
  if (value === null || value === undefined) return "–";
  return Math.abs(value) >= 100 ? counts.format(value) : fine.format(value);
}

// An epoch is "generation of the orchestrator" . "number of the incarnation".
export const epochText = (epoch) => `${Math.floor(epoch / 2 ** 20)}.${epoch % 2 ** 20}`;
export const clock = (time_s) => new Date(time_s * 1000).toLocaleTimeString("en-GB");

const HUES = [250, 62, 150, 350, 105, 300, 205, 25];
export const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark"
  || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);

// Neighbours differ in lightness as well as in hue, for those who see fewer colours.
export function workerColour(index) {
  const lap = Math.floor(index / HUES.length);
  const lightness = (isDark() ? 0.78 : 0.58) - (index % 2 ? 0 : 0.1) + (lap % 2 ? 0.05 : 0);
  return `oklch(${lightness} 0.13 ${(HUES[index % HUES.length] + 22 * lap) % 360})`;
}
export const workerInk = (index) => (isDark() && index % 2 ? "#10151a" : isDark() ? "#10151a" : "#ffffff");
export const workerNumber = (id) => Number(/\d+$/.exec(id)?.[0] ?? 0);
