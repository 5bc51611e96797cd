// A page of samples, or what a search has found so far.
import { dataset, get, load, unlessLeft } from "/static/api.js";
import { count, el, failure, go, marked, replace, state } from "/static/dom.js";

const PAGE = 24;
let shown = null; // the cards of the last page, kept while the next one comes

export function card(sample, needle, signal, onproblem) {
  const column = Object.keys(sample.columns)[0];
  const thumb = column || sample.images.length ? el("div", { className: "thumb waiting" }) : null;
  if (thumb) picture(thumb, sample, column, signal, onproblem);
  const text = sample.problem ?? sample.text;
  return el("a", { className: `card${sample.problem ? " broken" : ""}`, href: `/sample/${sample.number}`, "data-inside": true, "data-number": sample.number },
    thumb,
    el("div", { className: `text${text ? "" : " none"}`, dir: "auto" }, text ? marked(text, needle) : "no text"),
    el("div", { className: "foot" },
      el("span", { className: "mono", title: sample.key }, sample.key || `#${sample.number}`),
      sample.turns_count ? el("span", { className: "chip" }, `${sample.turns_count} turns`) : null,
      el("span", { className: "chip" }, sample.row_tokens ? `${count(sample.row_tokens)} tokens` : `${count(sample.chars)} chars`)));
}

function picture(thumb, sample, column, signal, onproblem) {
  const img = el("img", { alt: "" });
  const done = () => replace(thumb, img).classList.remove("waiting");
  const gone = unlessLeft((error) => replace(thumb, error.message).classList.remove("waiting"));
  if (!column) {
    load(img, `/image/${sample.number}`, signal).then(done, gone);
    return;
  }
  const [height, width] = sample.columns[column];
  if (height !== width) img.className = "contain";
  load(img, `/picture/${sample.number}/${column}.png?small=1`, signal).then(done, unlessLeft((error) => {
    onproblem(error);
    img.classList.add("map");
    load(img, `/codes/${sample.number}/${column}.png`, signal).then(done, gone);
  }));
}

export function showSamples(main, url, signal) {
  const query = Object.fromEntries(["text", "key", "type"].map((name) => [name, url.searchParams.get(name) ?? ""]));
  const isSearch = Boolean(query.text || query.key || query.type);
  const first = Math.max(0, Number(url.searchParams.get("first")) || 0);
  const notice = el("div", { className: "notice", hidden: true });
  const onproblem = (error) => {
    notice.hidden = false;
    notice.textContent = `Pictures can't be decoded, so their codes are shown as colours. ${error.message}`;
  };
  const cards = el("div", { className: "cards stale", id: "cards" }, ...(shown ? [...shown.children] : []));
  if (shown) cards.className = `${shown.className} stale`;
  const progress = el("div", { className: "progress", hidden: true });
  const pager = el("footer", { className: "pager" });
  const place = el("div", {}, cards);
  replace(main, tools(query), notice, progress, place, pager);
  if (!dataset.samples) {
    replace(place, state("This dataset is empty", "It has a manifest and no samples."));
    return keysOf(cards, () => {}, () => {});
  }

  const fill = (samples) => {
    cards.classList.remove("stale");
    cards.classList.toggle("texts", samples.length > 0 && samples.every((sample) => !sample.images.length && !Object.keys(sample.columns).length));
    shown = cards;
    replace(cards, samples.map((sample) => card(sample, query.text, signal, onproblem)));
  };
  let turn;
  if (isSearch) {
    turn = search(query, first, { cards, place, progress, pager, fill, onproblem }, signal);
  } else {
    turn = browse(first, { place, pager, fill }, signal);
  }
  return keysOf(cards, ...turn);
}

function browse(first, { place, pager, fill }, signal) {
  const last = Math.floor((dataset.samples - 1) / PAGE) * PAGE;
  const at = (number) => `/?first=${Math.min(Math.max(number, 0), last)}`;
  const forward = () => { if (first < last) go(at(first + PAGE)); };
  const back = () => { if (first > 0) go(at(first - PAGE)); };
  const label = el("span", { className: "label" }, "");
  const say = (from) => { label.textContent = `#${count(from)} – #${count(Math.min(from + PAGE, dataset.samples) - 1)} of ${count(dataset.samples)}`; };
  const slider = el("input", { type: "range", min: 0, max: Math.max(last, 0), step: PAGE, value: first, "aria-label": "place in the dataset" });
  slider.addEventListener("input", () => say(Number(slider.value)));
  slider.addEventListener("change", () => go(at(Number(slider.value))));
  replace(pager,
    el("button", { type: "button", onclick: back, disabled: first <= 0, title: "Previous page (p)" }, "‹ Previous"),
    label, slider,
    el("button", { type: "button", onclick: forward, disabled: first >= last, title: "Next page (n)" }, "Next ›"));
  say(first);
  const start = () => get("/api/samples", { first, count: PAGE }, signal)
    .then((page) => fill(page.samples))
    .catch(unlessLeft((error) => replace(place, failure(error, () => go(location.href, { replacing: true })))));
  start();
  return [forward, back];
}

// Asks piece by piece until a page is full, the end is reached, or somebody says stop.
function search(query, first, { cards, place, progress, pager, fill, onproblem }, signal) {
  const stopping = new AbortController();
  signal.addEventListener("abort", () => stopping.abort());
  const bar = el("progress", { max: dataset.samples, value: first });
  const said = el("span");
  const stop = el("button", { type: "button", onclick: () => stopping.abort(), title: "Stop (Esc)" }, "Stop");
  progress.hidden = false;
  replace(progress, bar, el("div", {}, said, el("span", { className: "grow" }), stop));
  let next = first;
  let found = 0;
  let isOver = false;
  const address = (from) => `/?${new URLSearchParams({ ...Object.fromEntries(Object.entries(query).filter(([, value]) => value)), first: from })}`;
  const forward = () => { if (isOver && next !== null) go(address(next)); };
  const back = () => history.back();
  fill([]);

  async function run() {
    if (query.key && !query.text && !query.type && !first) {
      const { number } = await get("/api/find", { key: query.key }, stopping.signal);
      if (number !== null) return go(`/sample/${number}`, { replacing: true });
    }
    while (next !== null && found < PAGE) {
      const answer = await get("/api/search", { ...query, after: next, limit: PAGE - found }, stopping.signal);
      cards.append(...answer.samples.map((sample) => card(sample, query.text, signal, onproblem)));
      cards.classList.toggle("texts", !cards.querySelector(".thumb"));
      found += answer.samples.length;
      next = answer.next;
      const seen = next ?? dataset.samples;
      bar.value = seen;
      said.textContent = `${count(found)} found in ${count(seen - first)} samples looked at, of ${count(dataset.samples)}`;
    }
    return null;
  }
  run().catch((error) => {
    if (signal.aborted) return;
    if (stopping.signal.aborted) said.textContent += " · stopped";
    else replace(place, failure(error, () => go(location.href, { replacing: true })));
  }).finally(() => {
    isOver = true;
    stop.hidden = true;
    if (signal.aborted) return;
    if (!found && next === null) replace(place, state("Nothing found", `None of the ${count(dataset.samples - first)} samples looked at match.`));
    replace(pager,
      el("button", { type: "button", onclick: back, title: "Back (p)" }, "‹ Back"), el("span", { className: "grow" }),
      el("button", { type: "button", onclick: forward, disabled: next === null, title: "Go on (n)" }, "Search on ›"));
  });
  return [forward, back, () => stopping.abort()];
}

function tools(query) {
  const scope = el("select", { "aria-label": "search in" }, ["text", "key", "number"].map((name) => el("option", { value: name }, name)));
  scope.value = query.key ? "key" : "text";
  const input = el("input", { type: "search", placeholder: "Search  ( / )", value: query.text || query.key, "aria-label": "search", spellcheck: false, id: "search", maxLength: 500 });
  const types = Object.keys(dataset.data_types);
  const type = el("select", { "aria-label": "type" }, el("option", { value: "" }, "all types"),
    types.map((name) => el("option", { value: name }, `${name} (${count(dataset.data_types[name])})`)));
  type.value = query.type;
  const submit = () => {
    const value = input.value.trim();
    if (scope.value === "number" && value) {
      go(`/sample/${value.replace(/[^0-9]/g, "") || 0}`);
      return;
    }
    const wanted = { [scope.value]: value, type: type.value };
    go(`/?${new URLSearchParams(Object.entries(wanted).filter(([, text]) => text))}`);
  };
  input.addEventListener("keydown", (event) => { if (event.key === "Enter") submit(); });
  input.addEventListener("search", () => { if (!input.value && (query.text || query.key)) submit(); });
  type.addEventListener("change", submit);
  scope.addEventListener("change", () => input.focus());
  return el("div", { className: "tools" }, el("div", { className: "search" }, scope, input), types.length > 1 || query.type ? type : null);
}

function keysOf(cards, forward, back, stop = () => {}) {
  const all = () => [...cards.querySelectorAll(".card")];
  const columns = () => {
    const tops = all().map((node) => node.offsetTop);
    return Math.max(1, tops.filter((top) => top === tops[0]).length);
  };
  const move = (step) => {
    const nodes = all();
    const at = nodes.indexOf(document.activeElement);
    const to = at < 0 ? (step > 0 ? 0 : nodes.length - 1) : at + step;
    if (to >= nodes.length && Math.abs(step) === 1) forward();
    else if (to < 0 && Math.abs(step) === 1) back();
    else nodes[Math.min(Math.max(to, 0), nodes.length - 1)]?.focus();
  };
  const focus = (scope) => {
    document.querySelector(".search select").value = scope;
    document.getElementById("search").select();
    document.getElementById("search").focus();
  };
  return {
    ArrowRight: () => move(1), ArrowLeft: () => move(-1), ArrowDown: () => move(columns()), ArrowUp: () => move(-columns()),
    j: () => move(1), k: () => move(-1), n: forward, p: back, PageDown: forward, PageUp: back, Escape: stop,
    "/": () => focus("text"), g: () => focus("number"),
  };
}
