// What was not converted, and why: reasons to choose from, and lines that come as one scrolls on.
import { dataset, get, unlessLeft } from "/static/api.js";
import { count, el, failure, plain, replace, state, title } from "/static/dom.js";

export function showRejects(main, url, signal) {
  const reason = url.searchParams.get("reason") ?? "";
  title("Rejects", ...(reason ? [reason] : []));
  const total = Object.values(dataset.rejects).reduce((sum, number) => sum + number, 0);
  if (!total) {
    const earlier = dataset.earlier.filter((pass) => Object.keys(pass.rejects).length).map((pass) => el("p", {},
      `The dataset that this one was made from, ${pass.url}, rejected `,
      Object.entries(pass.rejects).map(([name, number]) => `${count(number)} ${name}`).join(", "), "."));
    replace(main, state("No rejects", `All ${count(dataset.inputs)} inputs became samples.`, earlier));
    return {};
  }
  const chip = (name, number) => el("a", { href: name ? `/rejects?reason=${encodeURIComponent(name)}` : "/rejects", "data-inside": true, "aria-current": name === reason ? "true" : null },
    `${plain(name) || "all"} ${count(number)}`);
  const reasons = Object.entries(dataset.rejects).sort((a, b) => b[1] - a[1]);
  const body = el("tbody");
  const more = el("button", { type: "button" }, "Show more");
  const status = el("p", { className: "nothing", role: "status" });
  const names = ["reason", "detail", "source", "line or key"].map((name) => el("th", { scope: "col" }, name));
  replace(main,
    el("div", { className: "reasons" }, chip("", total), reasons.map(([name, number]) => chip(name, number))),
    el("section", {}, el("div", { className: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, names)), body)), status, more));

  let place = [0, 0];
  async function advance() {
    more.disabled = true;
    let fresh = 0;
    while (place && fresh < 50) {
      const answer = await get("/api/rejects", { reason, file: place[0], byte: place[1] }, signal);
      for (const reject of answer.rejects) {
        body.append(el("tr", {},
          el("td", {}, el("span", { className: "chip bad" }, reject.reason)), el("td", {}, reject.detail),
          el("td", { className: "mono" }, reject.source), el("td", { className: "mono" }, reject.line || reject.key)));
      }
      fresh += answer.rejects.length;
      place = answer.next;
      status.textContent = `${count(body.children.length)} shown`;
    }
    more.disabled = false;
    more.hidden = !place;
    if (!body.children.length) status.textContent = "No lines under rejects/ say more.";
  }
  const start = () => advance().catch(unlessLeft((error) => replace(main, failure(error, start))));
  more.addEventListener("click", start);
  start();
  return { n: () => { if (!more.hidden && !more.disabled) start(); } };
}
