// Which view an address means, links inside the page, and keys. A view is a function (main, url, signal) -> {keys}; the signal
// says that another one has taken its place.
import { dataset } from "/static/api.js";
import { failure, go, replace } from "/static/dom.js";
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
  for (const link of document.querySelectorAll(".bar nav a")) {
    const here = link.getAttribute("href") === "/rejects" ? url.pathname === "/rejects" : link.getAttribute("href") === "/" && url.pathname !== "/rejects";
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (dataset.error) {
    replace(main, failure(dataset.error, () => location.reload()));
    return;
  }
  const view = url.pathname === "/rejects" ? showRejects : url.pathname.startsWith("/sample/") ? showSample : showSamples;
  keys = view(main, url, leaving.signal);
}

document.addEventListener("click", (event) => {
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
  if (event.key === "?") {
    help.showModal();
  } else if (keys[event.key]) {
    event.preventDefault();
    keys[event.key](event);
  }
});

document.getElementById("help").addEventListener("click", () => help.showModal());
help.addEventListener("click", (event) => { if (event.target === help) help.close(); });
window.addEventListener("popstate", show);
document.getElementById("where").textContent = dataset.url ?? "";
document.title = dataset.url ? `${dataset.url} · wds-tools` : "wds-tools";
show();
