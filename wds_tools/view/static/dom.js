// Elements from values. Text only ever becomes a text node: nothing that comes from data is parsed as markup.
import { dataset } from "/static/api.js";

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function replace(node, ...children) {
  node.replaceChildren(...children.flat().filter(Boolean));
  return node;
}

// A name with everything shown that a page would hide, or turn the direction by.
export function plain(name) {
  return name.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (sign) => [...Array(sign.length).keys()].map((at) => `\\u${sign.charCodeAt(at).toString(16).padStart(4, "0")}`).join(""));
}

// What the window is called: the page, then the dataset.
export function title(...parts) {
  document.title = [...parts, dataset.place.split("/").pop() || dataset.place].map(plain).join(" · ");
}

export const count = (number) => number.toLocaleString("en-US");

export function bytes(number) {
  for (const unit of ["bytes", "kB", "MB", "GB"]) {
    if (number < 1000) return unit === "bytes" ? `${number} bytes` : `${number.toFixed(1)} ${unit}`;
    number /= 1000;
  }
  return `${number.toFixed(1)} TB`;
}

export function facts(pairs) {
  return el("dl", { className: "facts" }, pairs.filter(Boolean).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

// The text with every occurrence of `needle` in a <mark>.
export function marked(text, needle) {
  if (!needle) return [text];
  const parts = [];
  const [low, find] = [text.toLowerCase(), needle.toLowerCase()];
  if (low.length !== text.length) return [text]; // lower case moved the letters
  let at = 0;
  for (let next = low.indexOf(find); next >= 0; next = low.indexOf(find, at)) {
    parts.push(text.slice(at, next), el("mark", {}, text.slice(next, next + find.length)));
    at = next + find.length;
  }
  return [...parts, text.slice(at)];
}

export function state(title, text, ...more) {
  return el("div", { className: "state", role: "status" }, el("b", {}, title), text && el("p", {}, text), more);
}

export function failure(error, retry) {
  return state("That did not work", error.message, retry && el("button", { type: "button", onclick: retry }, "Try again"));
}

// Another address, and what main.js shows for it, as when somebody presses the browser's own buttons.
export function go(address, { replacing = false } = {}) {
  history[replacing ? "replaceState" : "pushState"]({ inside: true }, "", address);
  window.dispatchEvent(new PopStateEvent("popstate"));
}
