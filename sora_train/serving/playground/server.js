/* What the page asks of /v1: with the key, through lost connections, and with refusals as sentences. */

const KEY = "sora-api-key";
const PAUSES = [1, 2, 4, 8, 15]; // seconds between attempts while there is no connection

/* The server said no; `param` is the field that it names. */
export class Refusal extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    Object.assign(this, { status, param, code });
  }
}

/* No answer, or none that is the server's own: the same request may be made again. */
export class Lost extends Error {
  constructor(message = "The server cannot be reached.") {
    super(message);
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

/* One request. Throws Refusal and Lost. */
export async function call(path, { method = "GET", body, headers = {} } = {}) {
  const given = key.get() ? { ...headers, Authorization: `Bearer ${key.get()}` } : headers;
  let answer;
  try {
    answer = await fetch(path, { method, body, headers: given, cache: "no-store" });
  } catch {
    throw new Lost();
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  // 503 is temporary, and a 5xx without a sentence is a proxy's, while the server is away.
  if (answer.status === 503 || (answer.status > 500 && !told?.error)) throw new Lost(told?.error?.message);
  throw new Refusal(answer.status, told?.error ?? { message: `The server answered ${answer.status}.` });
}

/* The same for answers in JSON: the object and the headers. */
export async function ask(path, options) {
  const answer = await call(path, options);
  try {
    return [await answer.json(), answer.headers];
  } catch {
    throw new Lost(); // the connection broke within the answer
  }
}

/* Do `work` until it is answered. `told(true)` when the connection is lost, `told(false)` when it is back. */
export async function patiently(work, told, attempts = Infinity) {
  for (let attempt = 0; ; attempt++) {
    try {
      const done = await work();
      if (attempt) told(false);
      return done;
    } catch (error) {
      if (!(error instanceof Lost)) {
        if (attempt) told(false);
        throw error;
      }
      if (attempt + 1 >= attempts) throw error;
      told(true);
      await connected(PAUSES[Math.min(attempt, PAUSES.length - 1)]);
    }
  }
}

/* So many seconds, or less if the browser notices that it is online again. */
function connected(seconds) {
  return new Promise((go) => {
    const end = () => {
      clearTimeout(timer);
      removeEventListener("online", end);
      go();
    };
    const timer = setTimeout(end, 1000 * seconds);
    addEventListener("online", end);
  });
}

/* A random name, also where the page is not served by HTTPS and `crypto.randomUUID` is missing. */
export function randomName() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((n) => n.toString(16).padStart(2, "0")).join("");
}

/* An address of a file of a video for players and pictures, which send no key. */
export async function addressOf(id, variant) {
  const path = `v1/videos/${id}/content?variant=${variant}`;
  if (!key.get()) return path;
  const answer = await call(path);
  return URL.createObjectURL(await answer.blob());
}
