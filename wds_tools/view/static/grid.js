// A code grid as a canvas of one pixel a code, and a frame that marks the same place in the pictures beside it.
import { get, unlessLeft } from "/static/api.js";
import { count, el } from "/static/dom.js";

export const MODES = ["number", "rarity", "repeats"];
const TITLES = {
  number: "equal codes have equal colours",
  rarity: "the brighter, the rarer the code in the dataset",
  repeats: "the brighter, the more often the code stands in this picture",
};
const HEAT = [[10, 10, 14], [66, 29, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];

function heat(share) {
  const at = Math.min(Math.max(share, 0), 1) * (HEAT.length - 1);
  const low = Math.min(Math.floor(at), HEAT.length - 2);
  return HEAT[low].map((value, channel) => value + (HEAT[low + 1][channel] - value) * (at - low));
}

function hue(code) {
  const turn = (code * 0.618033988749895) % 1;
  return [0, 1 / 3, 2 / 3].map((part) => 150 + 70 * Math.cos((turn + part) * 2 * Math.PI));
}

export function codeGrid(number, grid, signal) {
  const { width, height, codes } = grid;
  const cells = el("canvas", { className: "cells", width, height, tabIndex: 0, role: "img", "aria-label": `${height} by ${width} codes` });
  const overlays = [];
  const readout = el("p", { className: "readout mono" });
  const here = new Map();
  for (const code of codes) here.set(code, (here.get(code) ?? 0) + 1);
  let usage = null;
  let mode = MODES.includes(localStorage.getItem("mode")) ? localStorage.getItem("mode") : "number";
  let marked = -1;

  const buttons = MODES.map((name) => el("button", { type: "button", title: TITLES[name], onclick: () => choose(name) }, name));
  const controls = el("span", { className: "switch" }, buttons);

  function choose(name) {
    mode = name;
    localStorage.setItem("mode", name);
    buttons.forEach((button, at) => button.setAttribute("aria-pressed", String(MODES[at] === mode)));
    if (mode === "rarity" && !usage) {
      readout.textContent = "counting how often codes are used ...";
      get(`/api/usage/${number}/${grid.column}`, { image: grid.image }, signal)
        .then((found) => { usage = found; readout.textContent = TITLES[mode]; draw(); }, unlessLeft((error) => { readout.textContent = error.message; }));
    }
    if (marked < 0) readout.textContent = TITLES[mode];
    draw();
  }

  function colour(at) {
    if (mode === "number" || (mode === "rarity" && !usage)) return hue(codes[at]);
    if (mode === "repeats") return heat(Math.log(here.get(codes[at])) / Math.log(Math.max(2, ...here.values())));
    return heat(Math.log2((usage.total + 1) / (usage.counts[at] + 1)) / Math.log2(usage.total + 1));
  }

  function draw() {
    const context = cells.getContext("2d");
    const pixels = context.createImageData(width, height);
    codes.forEach((_, at) => pixels.data.set([...colour(at), 255], 4 * at));
    context.putImageData(pixels, 0, 0);
  }

  // Where the code at `at` stands, and everywhere else where the same one does.
  function mark(at) {
    marked = at;
    for (const overlay of overlays) {
      const context = overlay.getContext("2d");
      const scale = overlay.width / width;
      context.clearRect(0, 0, overlay.width, overlay.height);
      if (at < 0) continue;
      codes.forEach((code, other) => {
        if (code !== codes[at]) return;
        context.strokeStyle = other === at ? "#fff" : "#4fd1bd";
        context.lineWidth = other === at ? 3 : 1.5;
        context.strokeRect((other % width) * scale + 1, Math.floor(other / width) * scale + 1, scale - 2, scale - 2);
      });
    }
    if (at < 0) {
      readout.textContent = TITLES[mode];
      return;
    }
    const code = codes[at];
    const used = usage && usage.total ? ` · ${count(usage.counts[at])} of ${count(usage.total)} codes looked at` : "";
    const times = here.get(code) === 1 ? "once" : `${here.get(code)} times`;
    readout.textContent = `row ${Math.floor(at / width)}, column ${at % width} · code ${count(code)} · ${times} in this picture${used}`;
  }

  function overlay() {
    const scale = Math.max(4, Math.round(640 / width));
    const canvas = el("canvas", { className: "over", width: width * scale, height: height * scale, "aria-hidden": "true" });
    overlays.push(canvas);
    return canvas;
  }

  // Follow the pointer over an element that shows the whole picture.
  function follow(node) {
    node.addEventListener("pointermove", (event) => {
      const box = node.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left) / box.width) * width);
      const y = Math.floor(((event.clientY - box.top) / box.height) * height);
      if (x >= 0 && x < width && y >= 0 && y < height) mark(y * width + x);
    });
    node.addEventListener("pointerleave", () => mark(-1));
  }

  cells.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -width, ArrowDown: width }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const next = Math.max(marked, 0) + (marked < 0 ? 0 : step);
    if (next >= 0 && next < codes.length) mark(next);
  });
  cells.addEventListener("blur", () => mark(-1));
  choose(mode);
  return { cells, controls, readout, overlay, follow, nextMode: () => choose(MODES[(MODES.indexOf(mode) + 1) % MODES.length]) };
}
