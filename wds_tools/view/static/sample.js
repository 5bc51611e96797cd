// One sample: the picture from its codes, the original, the codes themselves, its text or conversation, and where it lies.
import { dataset, get, load, unlessLeft, waiting } from "/static/api.js";
import { bytes, count, el, facts, failure, go, plain, replace, title } from "/static/dom.js";
import { codeGrid } from "/static/grid.js";
import { markButton } from "/static/marks.js";

const PAGE = 24;
const kept = new Map(); // the last few answers, and those of the neighbours

function fetchSample(number) {
  if (!kept.has(number)) {
    const answer = get(`/api/sample/${number}`);
    kept.set(number, answer);
    answer.catch(() => kept.delete(number));
    if (kept.size > 12) kept.delete(kept.keys().next().value);
  }
  return kept.get(number);
}

export function showSample(main, url, signal) {
  const number = Number(url.pathname.slice("/sample/".length));
  title(`Sample ${count(number)}`);
  const step = (by) => () => {
    const to = number + by;
    if (to >= 0 && to < dataset.samples) go(`/sample/${to}`, { replacing: true });
  };
  const list = `/?first=${Math.floor(number / PAGE) * PAGE}`;
  const back = () => (history.state?.inside && history.length > 1 ? history.back() : go(list));
  const copied = el("button", { type: "button", title: "Copy the link (c)" }, "Copy link");
  const copy = () => navigator.clipboard.writeText(location.href).then(
    () => { copied.textContent = "Copied"; }, () => { copied.textContent = "Copy it from the address bar"; });
  copied.addEventListener("click", copy);
  const keys = { ArrowLeft: step(-1), ArrowRight: step(1), k: step(-1), j: step(1), Escape: back, u: back, c: copy, "/": () => go(list), g: () => go(list), f: () => go(list), m: () => {}, x: () => {} };

  const late = setTimeout(() => main.classList.add("stale"), 150);
  fetchSample(number).then((sample) => {
    if (signal.aborted) return;
    const grids = [];
    const mark = markButton(sample, "✓ Mark");
    title(sample.key, `sample ${count(number)}`);
    replace(main, head(sample, number, step, back, mark, copied), body(sample, number, signal, grids));
    keys.x = () => mark.click();
    keys.m = () => grids.forEach((grid) => grid.nextMode());
    for (const near of [number + 1, number - 1]) if (near >= 0 && near < dataset.samples) fetchSample(near).catch(() => {});
  }).catch(unlessLeft((error) => {
    if (!signal.aborted) replace(main, failure(error, () => go(list)));
  })).finally(() => {
    clearTimeout(late);
    main.classList.remove("stale");
  });
  return keys;
}

function head(sample, number, step, back, mark, copied) {
  return el("div", { className: "head" },
    el("button", { type: "button", onclick: back, title: "Back to the list (Esc)" }, "↑ List"),
    el("button", { type: "button", onclick: step(-1), disabled: number <= 0, title: "Previous sample (k, ←)", "aria-label": "previous sample", id: "previous" }, "‹"),
    el("button", { type: "button", onclick: step(1), disabled: number + 1 >= sample.total, title: "Next sample (j, →)", "aria-label": "next sample", id: "next" }, "›"),
    el("span", { className: "count" }, `#${count(number)} of ${count(sample.total)}`),
    el("h1", { title: "key" }, plain(sample.key)),
    sample.type ? el("span", { className: "chip" }, sample.type) : null,
    sample.intact === true ? el("span", { className: "chip good", title: "Its bytes have the CRC-32 of the index" }, "intact") : null,
    sample.intact === false ? el("span", { className: "chip bad", title: "Its bytes do not have the CRC-32 of the index" }, "damaged") : null,
    el("span", { className: "grow" }), mark, copied);
}

function body(sample, number, signal, grids) {
  if (!dataset.has_schema) {
    return el("div", { className: "sample panes-0" }, el("div", { className: "side" }, sample.members.map((each) => member(number, each, signal))), el("div", { className: "side" }, about(sample)));
  }
  const panes = (sample.grids ?? []).flatMap((grid) => codePanes(sample, number, grid, signal, grids));
  if (!panes.length) panes.push(...sample.images.map((_, image) => original(number, image, null, signal)));
  const text = el("div", { className: "side" }, words(sample, number, signal));
  const rest = el("div", { className: "side" }, about(sample), raw(sample));
  if (panes.length === 1 || panes.length === 2) {
    text.append(...rest.childNodes);
    rest.hidden = true;
  }
  return el("div", { className: `sample panes-${Math.min(panes.length, 3)}` }, panes, text, rest);
}

// A member of a sample that is of no schema of ours.
function member(number, { suffix, bytes: size, image, text }, signal) {
  if (image !== undefined) return original(number, image, null, signal, plain(suffix));
  return el("section", {}, el("h2", {}, plain(suffix)),
    text === undefined ? el("p", { className: "nothing" }, `${bytes(size)}, not shown: no picture, and no text`)
      : suffix.toLowerCase() === "json" ? el("pre", {}, text) : el("p", { className: "prose", dir: "auto" }, text));
}

function codePanes(sample, number, grid, signal, grids) {
  const codes = grid.problem ? null : codeGrid(number, grid, signal);
  const [rows, columns] = grid.shape;
  const places = grid.shape.length === 2 ? codes : null; // which lie in the picture as they do in the grid
  const ratio = grid.shape.length > 1 ? `${columns} / ${rows}` : sample.width ? `${sample.width} / ${sample.height}` : "1 / 1";
  const decoded = frame(ratio, "/picture/");
  const img = el("img", { alt: "the picture decoded from its codes" });
  load(img, `/picture/${number}/${grid.column}.png?image=${grid.image}`, signal)
    .then(() => fill(decoded, img, places?.overlay()), unlessLeft((error) => fill(decoded, el("p", {}, error.message))));
  const cells = fill(frame(codes ? `${grid.width} / ${grid.height}` : ratio, ""), codes?.cells ?? el("p", {}, grid.problem), codes?.overlay());
  codes?.follow(cells);
  places?.follow(decoded);
  if (codes) grids.push(codes);
  const shape = grid.shape.join(" × ") + (grid.shape.length === 2 ? "" : `: ${grid.layout}`);
  return [
    el("figure", { className: "pane" }, el("header", {}, "Decoded"), decoded),
    grid.image < sample.images.length ? original(number, grid.image, ratio, signal) : null,
    el("figure", { className: "pane" }, el("header", {}, `Codes, ${shape}${grid.is_guess ? " (a guess)" : ""}`, el("span", { className: "grow" }), codes?.controls), cells, codes?.readout),
  ].filter(Boolean);
}

function frame(ratio, url) {
  const node = el("div", { className: "frame thumb waiting" }, el("p", {}, waiting(url)));
  node.style.aspectRatio = ratio; // set by script, which the page's policy allows; as an attribute it would not
  return node;
}

function fill(node, ...children) {
  node.classList.remove("waiting");
  return replace(node, ...children);
}

// The source image, cut as it was for the tokenizer, or whole.
function original(number, image, ratio, signal, name = "Original") {
  const node = frame(ratio ?? "auto", "/image/");
  const img = el("img", { alt: "the source image", className: ratio ? "cover" : "" });
  load(img, `/image/${number}?image=${image}`, signal)
    .then(() => fill(node, img), unlessLeft((error) => fill(node, el("p", {}, error.message))));
  const button = el("button", { type: "button", "aria-pressed": "false" }, "whole");
  button.addEventListener("click", () => {
    const isWhole = img.className === "cover";
    img.className = isWhole ? "whole" : "cover";
    button.setAttribute("aria-pressed", String(isWhole));
  });
  return el("figure", { className: "pane" }, el("header", {}, name, ratio ? el("span", { className: "switch" }, button) : null), node);
}

function words(sample, number, signal) {
  if (sample.problem) return el("section", {}, el("h2", {}, "Not readable"), el("p", {}, sample.problem));
  const parts = [];
  const images = { at: 0 };
  const placed = (text) => text.split("<image>").flatMap((piece, at) => (at ? [small(sample, number, images.at++, signal), piece] : [piece]));
  if (sample.turns?.length) parts.push(el("section", {}, el("h2", {}, "Conversation"), el("div", { className: "turns" }, sample.turns.map((each) => turn(each, placed)))));
  if (sample.segments) parts.push(...sample.segments.map((segment, at) => row(sample, number, segment, at, signal)));
  if (sample.text || !parts.length) {
    const text = sample.text || (sample.type ? "no text" : "");
    if (text) parts.unshift(el("section", {}, el("h2", {}, "Text"), el("p", { className: "prose", dir: "auto" }, sample.type === "interleaved" ? placed(text) : text)));
  }
  return parts;
}

// A segment of a row of tokens: what is trained is marked.
function row(sample, number, { tokens, runs }, at, signal) {
  const pieces = runs.map((run) => el("span", { className: run.trained ? "trained" : "", title: `${count(run.tokens)} tokens, ${run.trained ? "trained" : "not trained"}` },
    run.image === undefined ? run.text ?? `${run.ids.join(" ")}${run.tokens > run.ids.length ? " …" : ""} ` : small(sample, number, run.image, signal)));
  return el("section", {}, el("h2", {}, `Segment ${at + 1}: ${count(tokens)} tokens`), el("p", { className: "prose", dir: "auto" }, pieces));
}

function turn({ from, value }, placed) {
  const isAnswer = from === "gpt" || from === "assistant";
  return el("div", { className: `turn${isAnswer ? " answer" : ""}`, dir: "auto" }, el("b", {}, from), placed(value));
}

// An image in its place in a text: the picture of its codes, the codes as colours, the source image, or the word, whichever there is.
function small(sample, number, image, signal) {
  const node = el("span", { className: "image" }, "image");
  const img = el("img", { alt: `image ${image + 1}` });
  const column = Object.keys(sample.columns ?? {})[0];
  const urls = column ? ["picture", "codes"].map((kind) => `/${kind}/${number}/${column}.png?image=${image}&small=1`) : [];
  if (image < sample.images.length) urls.push(`/image/${number}?image=${image}`);
  const show = ([url, ...others]) => url && load(img, url, signal).then(() => replace(node, img), unlessLeft(() => show(others)));
  show(urls);
  return node;
}

function about(sample) {
  const size = sample.width ? `${sample.width} × ${sample.height} px` : null;
  const distinct = (sample.grids ?? []).map((grid) => count(grid.distinct)).join(", ");
  return el("section", {}, el("h2", {}, "Sample"),
    facts([
      sample.row_tokens ? ["tokens", count(sample.row_tokens)] : ["characters", count(sample.chars)],
      sample.codes ? ["image tokens", count(sample.codes)] : null,
      distinct ? ["different codes", distinct] : null,
      sample.tokens !== undefined ? ["text tokens", count(sample.tokens)] : null,
      sample.trained !== undefined ? ["trained tokens", count(sample.trained)] : null,
      sample.padding !== undefined ? ["padding", count(sample.padding)] : null,
      sample.length !== undefined ? ["length", count(sample.length)] : null,
      size ? ["cropped to", size] : null,
      ["shard", sample.shard],
      ["sample in its shard", count(sample.sample_index)],
      ["at byte", count(sample.start)],
      ["bytes", count(sample.bytes)],
      ...Object.entries(sample.provenance ?? {}),
    ]),
    el("div", { className: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "member"), el("th", { scope: "col" }, "size"))),
      el("tbody", {}, sample.members.map((member) => el("tr", {}, el("td", { className: "mono" }, plain(member.suffix)), el("td", {}, bytes(member.bytes))))))));
}

function raw(sample) {
  return sample.members.filter(({ text }) => text !== undefined).map(({ suffix, text }) => el("details", { open: !sample.type }, el("summary", {}, suffix), el("pre", {}, text)));
}
