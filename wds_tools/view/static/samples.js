// A page of samples: of all in their order, of all in the order of a field, or what a search or a filter has found so far.
import { dataset, get, load, unlessLeft, waiting } from "/static/api.js";
import { count, el, failure, go, marked, plain, replace, state, title } from "/static/dom.js";
import { markButton } from "/static/marks.js";

const PAGE = 24;
let shown = null; // the cards of the last page, kept while the next one comes

export function card(sample, needle, signal, onproblem) {
  const column = Object.keys(sample.columns)[0];
  const thumb = column || sample.images.length ? el("div", { className: "thumb waiting" }, waiting(column ? "/picture/" : "/image/")) : null;
  if (thumb) picture(thumb, sample, column, signal, onproblem);
  const text = sample.problem ?? sample.text;
  const link = el("a", { className: `card${sample.problem ? " broken" : ""}`, href: `/sample/${sample.number}`, "data-inside": true, "data-number": sample.number },
    thumb,
    el("div", { className: `text${text ? "" : " none"}`, dir: "auto" }, text ? marked(text, needle) : "no text"),
    el("div", { className: "foot" },
      el("span", { className: "mono", title: plain(sample.key) }, plain(sample.key) || `#${sample.number}`),
      sample.turns_count ? el("span", { className: "chip" }, `${sample.turns_count} turns`) : null,
      el("span", { className: "chip" }, sample.row_tokens ? `${count(sample.row_tokens)} tokens` : `${count(sample.chars)} chars`)));
  return el("div", { className: "cell" }, link, markButton(sample));
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
  const query = Object.fromEntries(["text", "key", "where", "type", "by"].map((name) => [name, url.searchParams.get(name) ?? ""]));
  const isSearch = Boolean(query.text || query.key || query.where || query.type);
  title(...[query.text, query.key, query.where, query.type, query.by && `by ${query.by}`].filter(Boolean));
  const first = Math.max(0, Number(url.searchParams.get("first")) || 0);
  const notice = el("div", { className: "notice", hidden: true });
  const onproblem = (error) => {
    notice.hidden = false;
    notice.textContent = `Pictures can't be decoded, so their codes are shown as colours. ${error.message}`;
  };
  const cards = el("div", { className: "cards stale", id: "cards" }, ...(shown ? [...shown.children] : [state("Loading", "")]));
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
  if (query.by) {
    turn = rank(query, first, { place, progress, pager, fill }, signal);
  } else if (isSearch) {
    turn = search(query, first, { cards, place, progress, pager, fill, onproblem }, signal);
  } else {
    turn = browse(first, { place, pager, fill }, signal);
  }
  return keysOf(cards, ...turn);
}

// What the server looks at bit by bit: how far it is, and a button that ends it.
function watch(progress, from, stopping) {
  const bar = el("progress", { max: dataset.samples, value: from, "aria-label": "looked at" });
  const said = el("span", { role: "status" });
  const stop = el("button", { type: "button", onclick: () => stopping.abort(), title: "Stop (Esc)" }, "Stop");
  progress.hidden = false;
  replace(progress, bar, el("div", {}, said, el("span", { className: "grow" }), stop));
  return { bar, said, stop };
}

// What a condition could not be asked of: nothing of this goes by without a word.
function left(wrongType, without = 0) {
  return (wrongType ? ` · ${count(wrongType)} have values that it can't compare` : "") + (without ? ` · ${count(without)} have no number or text there, and are left out` : "");
}

async function absence(names, signal) {
  if (!names?.length) return "";
  const known = await get("/api/fields", {}, signal);
  return ` No sample looked at has a field ${names.map(plain).join(", ")}; the fields are ${known.names.map(plain).join(", ")}.`;
}

const addressOf = (query, first) => `/?${new URLSearchParams({ ...Object.fromEntries(Object.entries(query).filter(([, value]) => value)), first })}`;

// All that a filter chooses, in the order of a field.
function rank(query, first, { place, progress, pager, fill }, signal) {
  const stopping = new AbortController();
  signal.addEventListener("abort", () => stopping.abort());
  const { bar, said, stop } = watch(progress, 0, stopping);
  let forward = () => {};
  const back = () => { if (first > 0) go(addressOf(query, Math.max(0, first - PAGE))); };

  async function run() {
    let answer;
    do {
      answer = await get("/api/ranked", { ...query, first, count: PAGE }, stopping.signal);
      bar.value = answer.looked_at;
      said.textContent = `${count(answer.looked_at)} of ${count(dataset.samples)} samples looked at`;
    } while (answer.looked_at < dataset.samples);
    const all = answer.chosen - answer.without;
    said.textContent = `${count(all)} by ${plain(query.by)}${answer.ranked < all ? `, of which the first ${count(answer.ranked)} are shown` : ""}${left(answer.wrong_type, answer.without)}`;
    if (!answer.samples.length) replace(place, state("Nothing found", `None of ${count(dataset.samples)} samples is there.${await absence(answer.absent, signal)}`));
    fill(answer.samples);
    forward = () => { if (first + PAGE < answer.ranked) go(addressOf(query, first + PAGE)); };
    replace(pager,
      el("button", { type: "button", onclick: back, disabled: first <= 0, title: "Previous page (p)" }, "‹ Previous"), el("span", { className: "grow" }),
      el("button", { type: "button", onclick: forward, disabled: first + PAGE >= answer.ranked, title: "Next page (n)" }, "Next ›"));
  }
  run().catch((error) => {
    if (signal.aborted) return;
    if (stopping.signal.aborted) said.textContent += " · stopped";
    else replace(place, failure(error, () => go(location.href, { replacing: true })));
  }).finally(() => { stop.hidden = true; });
  return [() => forward(), back, () => stopping.abort()];
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
  const { bar, said, stop } = watch(progress, first, stopping);
  let next = first;
  let found = 0;
  let wrongType = 0;
  let absent = null;
  let isOver = false;
  const forward = () => { if (isOver && next !== null) go(addressOf(query, next)); };
  const back = () => history.back();
  fill([]);

  async function run() {
    if (query.key && !query.text && !query.where && !query.type && !first) {
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
      wrongType += answer.wrong_type;
      absent = absent && answer.absent ? absent.filter((name) => answer.absent.includes(name)) : answer.absent ?? absent;
      said.textContent = `${count(found)} found in ${count(seen - first)} samples looked at, of ${count(dataset.samples)}${left(wrongType)}`;
    }
    if (!found) replace(place, state("Nothing found", `None of the ${count(dataset.samples - first)} samples looked at match.${await absence(absent, signal)}`));
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
    replace(pager,
      el("button", { type: "button", onclick: back, title: "Back (p)" }, "‹ Back"), el("span", { className: "grow" }),
      el("button", { type: "button", onclick: forward, disabled: next === null, title: "Go on (n)" }, "Search on ›"));
  });
  return [forward, back, () => stopping.abort()];
}

function tools(query) {
  const scope = el("select", { "aria-label": "search in" }, ["text", "key", "number", "where"].map((name) => el("option", { value: name }, name)));
  scope.value = query.where ? "where" : query.key ? "key" : "text";
  const input = el("input", { type: "search", value: query.where || query.text || query.key, "aria-label": "search", spellcheck: false, id: "search", maxLength: 4000 });
  const hint = () => { input.placeholder = scope.value === "where" ? "aesthetic >= 5.5 and not watermark" : "Search  ( / )"; };
  hint();
  const names = el("datalist", { id: "fields" });
  const by = el("input", { value: query.by, placeholder: "Sort by", title: "A field; -FIELD for the largest first", "aria-label": "sort by a field; minus before it for the largest first", list: "fields", spellcheck: false, maxLength: 500 });
  by.addEventListener("focus", () => get("/api/fields").then((known) => replace(names, known.names.flatMap((name) => [name, `-${name}`]).map((value) => el("option", { value })))).catch(unlessLeft((error) => { by.title = error.message; })), { once: true });
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
    const wanted = { [scope.value]: value, type: type.value, by: scope.value === "where" || !value ? by.value.trim() : "" }; // an order is of fields alone
    go(`/?${new URLSearchParams(Object.entries(wanted).filter(([, text]) => text))}`);
  };
  const sort = () => { if (scope.value !== "where") input.value = ""; submit(); };
  by.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  by.addEventListener("change", () => { if (document.activeElement === by || !by.value) sort(); });
  input.addEventListener("keydown", (event) => { if (event.key === "Enter") submit(); });
  input.addEventListener("search", () => { if (!input.value && (query.text || query.key || query.where)) submit(); });
  type.addEventListener("change", submit);
  scope.addEventListener("change", () => { hint(); input.focus(); });
  return el("div", { className: "tools", role: "search" }, el("div", { className: "search" }, scope, input), types.length > 1 || query.type ? type : null, by, names,
    el("button", { type: "button", "data-random": true, title: "Open a sample drawn at random (r)" }, "Random"));
}

function keysOf(cards, forward, back, stop = () => {}) {
  const all = () => [...cards.querySelectorAll(".card")];
  const columns = () => {
    const tops = all().map((node) => node.parentElement.offsetTop);
    return Math.max(1, tops.filter((top) => top === tops[0]).length);
  };
  const move = (step) => {
    const nodes = all();
    if (!nodes.length) return; // they are on their way: nobody has seen the end of them
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
    "/": () => focus("text"), g: () => focus("number"), f: () => focus("where"),
    x: () => document.activeElement.closest(".cell")?.querySelector(".mark").click(),
  };
}
