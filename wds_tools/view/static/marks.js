// Samples that somebody has marked: kept in this browser, for this very content of the dataset, and downloaded as a file of keys,
// DATASET<tab>KEY a line. The server is told nothing.
import { dataset } from "/static/api.js";
import { count, el, plain, replace, state, title } from "/static/dom.js";

const PLACE = `marks ${dataset.version}`;
const MOST = 10_000;

// Number of the sample -> key.
export function marks() {
  try {
    return new Map(JSON.parse(localStorage.getItem(PLACE)).filter(([number, key]) => Number.isInteger(number) && typeof key === "string"));
  } catch {
    return new Map(); // none yet, or none that this page wrote
  }
}

// Whether there was room for them.
function keep(marked) {
  try {
    if (marked.size <= MOST) localStorage.setItem(PLACE, JSON.stringify([...marked].sort(([one], [other]) => one - other)));
    return marked.size <= MOST;
  } catch {
    return false; // browsers keep 5 MB
  }
}

// A button that marks a sample, or takes the mark off.
export function markButton({ number, key }, text = "✓") {
  const button = el("button", { type: "button", className: "mark", title: "Mark (x)", "aria-label": `mark ${plain(key)}` }, text);
  const show = (isMarked) => button.setAttribute("aria-pressed", String(isMarked));
  show(marks().has(number));
  if (!key.trim() || /[\t\r\n]/.test(key)) {
    button.disabled = true;
    button.title = "This key can't stand in a file of keys";
  }
  button.addEventListener("click", () => {
    const marked = marks();
    if (!marked.delete(number)) marked.set(number, key);
    if (keep(marked)) {
      show(marked.has(number));
    } else {
      button.textContent = "full";
      button.title = `There is room for ${count(MOST)} marks at most: download them, and take the marks off`;
    }
  });
  return button;
}

export function showMarks(main, url, signal) {
  title("Marks");
  const marked = marks();
  if (!marked.size) {
    replace(main, state("Nothing is marked", "The ✓ of a sample, or the key x, marks it. Marks stay in this browser; this page makes a file of keys of them."));
    return {};
  }
  const again = () => { if (!signal.aborted) showMarks(main, url, signal); };
  const lines = [...marked.values()].map((key) => `${dataset.place}\t${key}\n`).join("");
  const download = el("a", { className: "button", download: "marks.txt", href: URL.createObjectURL(new Blob([lines], { type: "text/plain" })) }, "Download keys");
  signal.addEventListener("abort", () => URL.revokeObjectURL(download.href));
  const clear = el("button", { type: "button", onclick: () => { keep(new Map()); again(); } }, "Take all marks off");
  const off = (number) => el("button", { type: "button", "aria-label": `take the mark off sample ${number}`, onclick: () => { marked.delete(number); keep(marked); again(); } }, "Take off");
  const row = ([number, key]) => el("tr", {}, el("td", {}, count(number)), el("td", { className: "mono" }, el("a", { href: `/sample/${number}`, "data-inside": true }, plain(key))), el("td", {}, off(number)));
  replace(main, el("div", { className: "tools" }, el("h1", {}, `${count(marked.size)} marked`), el("span", { className: "grow" }), download, clear),
    el("section", {},
      el("p", {}, "The file is one that ", el("code", {}, "wds-tools select --keys marks.txt"), " takes, ", el("code", {}, "--exclude marks.txt"), " too, and ", el("code", {}, "Source(exclude=\"marks.txt\")"), " in training."),
      el("div", { className: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ["number", "key", ""].map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, [...marked].map(row))))));
  return {};
}
