// What the server is asked for. Pictures wait in a queue of their own, so that a slow tokenizer never holds up a page of texts.

export class Left extends Error {} // whoever asked has gone on

export async function get(path, query = {}, signal = undefined) {
  const search = new URLSearchParams(Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined));
  const text = search.toString();
  return (await request(text ? `${path}?${text}` : path, signal)).json();
}

async function request(url, signal) {
  let answer;
  try {
    answer = await fetch(url, { signal });
  } catch (error) {
    if (error.name === "AbortError") throw new Left();
    throw new Error("The viewer does not answer: is `wds-tools view` still running?");
  }
  if (answer.ok) return answer;
  let why = `status ${answer.status}`;
  try {
    why = (await answer.json()).error;
  } catch { /* no sentence came with it */ }
  throw new Error(why);
}

export const dataset = await get("/api/set").catch((error) => ({ error }));

let isDecoderReady = false; // the first picture takes seconds: the tokenizer is loaded for it

// What stands in the place of an image until it is there.
export function waiting(url) {
  return url.startsWith("/picture/") && !isDecoderReady ? "loading the tokenizer …" : "loading …";
}

const MOST_AT_ONCE = 3; // of the six connections that browsers open to a server
let running = 0;
const queue = [];

// Put the image at `url` into `img`, when it is its turn.
export function load(img, url, signal) {
  return new Promise((resolve, reject) => {
    queue.push({ img, url, signal, resolve, reject });
    next();
  });
}

async function next() {
  if (running >= MOST_AT_ONCE || !queue.length) return;
  const { img, url, signal, resolve, reject } = queue.shift();
  if (signal?.aborted) {
    reject(new Left());
    return next();
  }
  running += 1;
  try {
    const blob = await (await request(`${url}${url.includes("?") ? "&" : "?"}v=${dataset.version}`, signal)).blob();
    const address = URL.createObjectURL(blob);
    await new Promise((done, failed) => {
      img.onload = done;
      img.onerror = () => failed(new Error("This browser can't show the image: it is damaged, or of a kind that it does not know."));
      img.src = address;
    }).finally(() => URL.revokeObjectURL(address));
    isDecoderReady ||= url.startsWith("/picture/");
    resolve();
  } catch (error) {
    reject(error.name === "AbortError" ? new Left() : error);
  } finally {
    running -= 1;
    next();
  }
}

// A promise that fails although nobody looks is a message in the console: this is for those where leaving is no failure.
export const unlessLeft = (handle) => (error) => { if (!(error instanceof Left)) handle(error); };
