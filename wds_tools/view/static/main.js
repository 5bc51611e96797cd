// Which view an address means, links inside the page, and keys. A view is a function (main, url, signal) -> {keys}; the signal
// says that another one has taken its place.
import { dataset } from "/static/api.js";
import { failure, go, replace } from "/static/dom.js";
import { showMarks } from "/static/marks.js";
import { showRejects } from "/static/rejects.js";
import { showSample } from "/static/sample.js";
import { showSamples } from "/static/samples.js";

const main = document.getElementById("main");
const help = document.getElementById("keys");
let leaving = new AbortController();
let keys = {};

function show() {
  leaving.abort();
  leaving = new AbortController();
  const url = new URL(location.href);
  if (dataset.error) {
    replace(main, failure(dataset.error, () => location.reload()));
    return;
  }
  const view = { "/rejects": showRejects, "/marks": showMarks }[url.pathname] ?? (url.pathname.startsWith("/sample/") ? showSample : showSamples);
  keys = view(main, url, leaving.signal);
}

function random() {
  if (dataset.samples) go(`/sample/${Math.floor(Math.random() * dataset.samples)}`);
}

document.addEventListener("click", (event) => {
  if (event.target.closest("[data-random]")) random();
  const link = event.target.closest("a[data-inside]");
  if (!link || event.defaultPrevented || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(link.getAttribute("href"));
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const field = event.target.closest("input:not([type=range]), select");
  if (field) {
    if (event.key === "Escape") field.blur();
    return;
  }
  if (keys[event.key]) {
    event.preventDefault();
    keys[event.key](event);
  } else if (event.key === "r") {
    random();
  }
});

window.addEventListener("popstate", show);
show();
