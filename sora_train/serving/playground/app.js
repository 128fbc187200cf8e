/* The page: sends what the form asks, follows what is being made, and shows what was made. */

import { Lost, Refusal, addressOf, ask, call, key, patiently } from "./server.js";
import * as form from "./form.js";
import { element, say } from "./form.js";

const $ = (id) => document.getElementById(id);
const PAGE = 12; // videos that are listed at once
const POLL_MS = 1000; // where the server does not say
const SHEET = { columns: 4, frames: 16 }; // of a spritesheet: its frames lie in rows of four
const MADE = {
  t2v: "from words", i2v: "from images", extend: "extended", "extend-back": "extended to the front", infill: "filled in",
  connect: "connected", loop: "a loop", edit: "edited", upscale: "enlarged",
};
const WAITING = { queued: "Waiting for its turn", in_progress: "Being made" };
const cards = new Map(); // id -> Card

const told = (isLost) => ($("connection").hidden = !isLost);

/* --- a video --- */

class Card {
  constructor(video) {
    this.root = element("article", { className: "card", id: video.id });
    this.addresses = [];
    this.update(video);
  }

  update(video) {
    const hadFocus = this.root.contains(document.activeElement);
    const isSameState = this.video?.status === video.status;
    this.video = video;
    if (isSameState) {
      if (this.bar) this.showProgress(); // what plays goes on
      return;
    }
    this.release();
    this.bar = null;
    const title = element("p", { className: "prompt", id: `${video.id}-prompt`, dir: "auto", textContent: video.prompt ?? "" });
    this.root.setAttribute("aria-labelledby", title.id);
    this.root.dataset.status = video.status;
    this.actions = element("div", { className: "buttons" });
    const parts = { completed: () => this.finished(), failed: () => this.failed() };
    const shown = (parts[video.status] ?? (() => this.running()))();
    this.root.replaceChildren(...shown, title, this.facts(), this.actions);
    if (hadFocus) this.actions.firstElementChild.focus();
  }

  /* What every state shows in numbers. */
  facts() {
    const { video } = this;
    const facts = [`${video.seconds} s`, video.size.replace("x", " × ")];
    if (video.fps) facts.push(`${Number(video.fps.toFixed(3))} frames a second`);
    if (video.seed !== null) facts.push(`seed ${video.seed}`);
    facts.push(video.model, video.remixed_from_video_id ? "remixed" : (MADE[video.operation] ?? video.operation));
    return element("p", { className: "facts", textContent: facts.join(" · ") });
  }

  running() {
    const name = `${this.video.id}-prompt`;
    this.bar = element("progress", { max: 100, "aria-labelledby": name });
    this.count = element("span", { className: "count" });
    this.button("Cancel", () => this.remove());
    this.showProgress();
    return [this.screen("running", this.count, this.bar)];
  }

  showProgress() {
    const { status, progress } = this.video;
    this.count.textContent = status === "queued" ? WAITING.queued : `${WAITING[status]}: ${progress} %`;
    if (status === "queued") this.bar.removeAttribute("value");
    else this.bar.value = progress;
  }

  failed() {
    const { error } = this.video;
    this.button("Try these words again", () => form.reuse(this.video));
    this.deletion();
    const text = sentence(error?.message ?? "This video could not be made.");
    return [this.screen("failed", element("p", { textContent: text })), badges(["Not billed"])];
  }

  finished() {
    const { video } = this;
    if (video.expires_at && 1000 * video.expires_at < Date.now()) {
      this.deletion();
      return [this.screen("failed", element("p", { textContent: "The files of this video have expired." }))];
    }
    const still = element("img", { alt: "", loading: "lazy" });
    const play = element("button", { type: "button", className: "play" });
    play.setAttribute("aria-label", `Play: ${video.prompt}`);
    play.addEventListener("click", () => this.play().then((player) => player?.play().catch(() => {})));
    this.put(still, "thumbnail");
    for (const [label, what] of [["Remix", "remix"], ["Extend", "extend"], ["Edit", "edit"]]) {
      this.button(label, () => form.take(video, what));
    }
    this.button("Download", () => this.download());
    this.deletion();
    const screen = this.screen("finished", still, play);
    return [screen, this.strip(), this.badges()];
  }

  screen(kind, ...children) {
    const screen = element("div", { className: `screen ${kind}` }, ...children);
    return (this.place = screen);
  }

  button(label, act) {
    const made = element("button", { type: "button", textContent: label });
    made.addEventListener("click", () => act(made));
    this.actions.append(made);
    return made;
  }

  /* What it cost and what proves where it comes from. */
  badges() {
    const { usage, provenance } = this.video;
    const found = [];
    if (usage) found.push(usage.cost ? `${money(usage.cost, usage.currency)} for ${usage.seconds} s` : "No charge");
    if (provenance?.signed) found.push(["Signed", "signed"]);
    if (provenance?.watermark) found.push(["Watermarked", "signed"]);
    if (provenance && !provenance.signed) found.push(["Not signed", "unsigned"]);
    return badges(found);
  }

  /* The player, in the place of the picture; the file is asked for now and not before. */
  async play() {
    this.playing ??= this.act(async () => {
      const player = element("video", { controls: true, loop: true, playsInline: true });
      player.setAttribute("aria-label", this.video.prompt ?? "");
      player.src = await this.address("video");
      this.place.replaceChildren(player);
      player.focus();
      player.addEventListener("timeupdate", () => (this.range.value = player.currentTime));
      return player;
    });
    const player = await this.playing;
    if (!player) this.playing = null;
    return player;
  }

  /* The frames of the spritesheet in a row; moving over them moves the player. */
  strip() {
    const { video } = this;
    const canvas = element("canvas", { "aria-hidden": "true" });
    this.range = element("input", { type: "range", min: 0, max: video.seconds, step: 1 / (video.fps || 24), value: 0 });
    this.range.setAttribute("aria-label", "Filmstrip: choose a moment");
    this.range.addEventListener("input", () => {
      const at = Number(this.range.value);
      this.play().then((player) => player && (player.pause(), (player.currentTime = at)));
      this.range.focus();
    });
    const sheet = element("img", { alt: "" });
    // Drawn when it is known how wide it is, and again when that changes.
    const drawn = new ResizeObserver(() => drawStrip(canvas, sheet, video));
    sheet.addEventListener("load", () => drawn.observe(canvas));
    this.put(sheet, "spritesheet");
    return element("div", { className: "strip" }, canvas, this.range);
  }

  async address(variant) {
    const address = await addressOf(this.video.id, variant);
    this.addresses.push(address);
    return address;
  }

  put(image, variant) {
    this.address(variant).then((address) => (image.src = address), () => image.remove());
  }

  async download() {
    await this.act(async () => {
      const link = element("a", { href: await this.address("video"), download: `${this.video.id}.mp4` });
      link.click();
    });
  }

  /* Asks once more before it deletes, without a window in between. */
  deletion() {
    const button = this.button("Delete", () => {
      if (button.dataset.sure) return this.remove();
      button.dataset.sure = "yes";
      button.textContent = "Really delete?";
      say("Press again to delete.");
    });
    button.addEventListener("blur", () => {
      delete button.dataset.sure;
      button.textContent = "Delete";
    });
  }

  async remove() {
    const wasRunning = this.bar !== null;
    const done = await this.act(async () => {
      await call(`v1/videos/${this.video.id}`, { method: "DELETE" }).catch((error) => {
        if (error.status !== 404) throw error;
      });
      return true;
    });
    if (!done) return;
    drop(this.video.id);
    say(wasRunning ? "Cancelled." : "Deleted.");
  }

  /* Do something with the server; what goes wrong is said on the card. */
  async act(work) {
    this.root.querySelector(".said")?.remove();
    try {
      return await work();
    } catch (error) {
      if (askForKey(error)) return undefined;
      this.root.append(element("p", { className: "error said", role: "alert", textContent: error.message }));
      return undefined;
    }
  }

  release() {
    for (const address of this.addresses) if (address.startsWith("blob:")) URL.revokeObjectURL(address);
    this.addresses = [];
    this.playing = null;
  }
}

/* Labels below a video; one with a kind leads to how it is checked. */
function badges(found) {
  const row = element("p", { className: "badges" });
  for (const one of found) {
    const [text, kind] = [one].flat();
    if (kind) row.append(element("a", { href: "#verify", className: `badge ${kind}`, textContent: text }));
    else row.append(element("span", { className: "badge", textContent: text }));
  }
  return row;
}

function money(amount, currency) {
  try {
    const style = { style: "currency", currency, maximumFractionDigits: 4 };
    return new Intl.NumberFormat(undefined, style).format(amount);
  } catch {
    return `${amount} ${currency}`; // no currency that browsers know
  }
}

/* Messages of jobs begin small and end without a stop. */
function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

/* As many frames of the sheet as fit beside each other, spread over the video, each cropped to its place. */
function drawStrip(canvas, sheet, video) {
  const frames = Math.min(SHEET.frames, video.frames ?? SHEET.frames);
  const columns = Math.min(SHEET.columns, frames);
  const [width, height] = [sheet.naturalWidth / columns, sheet.naturalHeight / Math.ceil(frames / columns)];
  canvas.width = canvas.clientWidth * devicePixelRatio;
  canvas.height = canvas.clientHeight * devicePixelRatio;
  const count = Math.max(1, Math.min(frames, Math.round((canvas.width * height) / (canvas.height * width))));
  const place = canvas.width / count;
  const scale = Math.max(place / width, canvas.height / height);
  const [w, h] = [place / scale, canvas.height / scale];
  const context = canvas.getContext("2d");
  for (let i = 0; i < count; i++) {
    const frame = Math.floor(((i + 0.5) * frames) / count);
    const x = (frame % columns) * width + (width - w) / 2;
    const y = Math.floor(frame / columns) * height + (height - h) / 2;
    context.drawImage(sheet, x, y, w, h, i * place, 0, place, canvas.height);
  }
}

/* --- the gallery --- */

let last = null; // id behind which older videos begin

/* Put videos before those that are there, or behind them, and follow those that are not finished. */
function put(videos, isOlder = false) {
  const there = [...$("gallery").children];
  for (const video of videos) {
    if (cards.has(video.id)) cards.get(video.id).update(video);
    else {
      cards.set(video.id, new Card(video));
      follow(video.id);
    }
  }
  const given = videos.map((video) => cards.get(video.id).root);
  const others = there.filter((root) => !given.includes(root));
  const inOrder = isOlder ? [...others, ...given] : [...given, ...others];
  for (const [place, root] of inOrder.entries()) {
    // A player that is moved stops: what is in its place stays there.
    const here = $("gallery").children[place];
    if (here !== root) $("gallery").insertBefore(root, here ?? null);
  }
  $("empty").hidden = cards.size > 0;
}

function drop(id) {
  const card = cards.get(id);
  const next = card.root.nextElementSibling ?? card.root.previousElementSibling;
  card.release();
  card.root.remove();
  cards.delete(id);
  form.forget(id);
  $("empty").hidden = cards.size > 0;
  (next?.querySelector("button") ?? $("videos")).focus();
}

async function list(after = null) {
  const more = after ? `&after=${after}` : "";
  try {
    const [page] = await patiently(() => ask(`v1/videos?limit=${PAGE}${more}`), told);
    put(page.data, after !== null);
    // A list that is asked again from its beginning says nothing about its end.
    if (after || last === null) {
      last = page.last_id;
      $("older").hidden = !page.has_more;
    }
    return page.data;
  } catch (error) {
    if (!askForKey(error)) form.showError(null, error.message);
    return [];
  }
}

async function older() {
  const found = await list(last);
  if (found.length) cards.get(found[0].id).root.querySelector("button").focus();
}

/* Ask for a video until it is finished, as often as the server says. */
async function follow(id) {
  const isRunning = () => cards.has(id) && cards.get(id).video.status in WAITING;
  let pause = POLL_MS;
  let said = 0;
  while (isRunning()) {
    await new Promise((go) => setTimeout(go, pause));
    if (!isRunning()) return;
    try {
      const [video, headers] = await patiently(() => ask(`v1/videos/${id}`), told);
      if (!cards.has(id)) return;
      pause = Number(headers.get("openai-poll-after-ms")) || POLL_MS;
      cards.get(id).update(video);
      said = announce(video, said);
    } catch (error) {
      if (askForKey(error)) return; // followed again when there is a key
      if (error.status !== 404) pause = 10 * POLL_MS;
      else if (cards.has(id)) drop(id);
    }
  }
}

/* Tell those who do not see the bar how far it is, by quarters; gives the quarter that was told. */
function announce(video, said) {
  const name = (video.prompt ?? "").slice(0, 60);
  if (video.status === "completed") say(`Finished: ${name}`);
  if (video.status === "failed") say(`Failed: ${name}. ${video.error?.message ?? ""}`);
  const quarter = Math.floor(video.progress / 25);
  if (video.status === "in_progress" && quarter > said) say(`${25 * quarter} percent: ${name}`);
  return Math.max(said, quarter);
}

/* --- the key --- */

/* Whether the error was that a key is missing or wrong; then the page asks for one. */
function askForKey(error) {
  if (!(error instanceof Refusal) || error.status !== 401) return false;
  const isNew = $("key").hidden;
  $("key").hidden = false;
  $("change-key").hidden = false;
  if (key.get()) keyError(error.message);
  if (isNew) $("api-key").focus();
  return true;
}

function keyError(message) {
  $("key").querySelector(".error")?.remove();
  if (!message) return $("api-key").removeAttribute("aria-invalid");
  const told = element("p", { className: "error", id: "key-error", role: "alert", textContent: message });
  $("key").querySelector(".field").append(told);
  $("api-key").setAttribute("aria-invalid", "true");
  $("api-key").setAttribute("aria-describedby", told.id);
}

/* Another key sees other videos. */
async function useKey(text) {
  keyError("");
  if (!/^[!-~]*$/.test(text)) return keyError("A key has letters, digits and signs only, and no spaces.");
  key.set(text);
  for (const card of cards.values()) card.release();
  cards.clear();
  $("gallery").replaceChildren();
  last = null;
  $("api-key").value = "";
  $("key").hidden = true;
  $("change-key").hidden = !text;
  await begin();
}

/* --- the page --- */

let isSending = false;

async function submit(event) {
  event.preventDefault();
  if (isSending) return;
  const asked = form.request();
  if (!asked) return;
  isSending = true;
  form.setBusy(true);
  try {
    const [video] = await patiently(() => ask(...asked), told, 6);
    form.answered();
    put([video]);
    say(`Accepted: ${(video.prompt ?? "").slice(0, 60)}`);
    const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;
    cards.get(video.id).root.scrollIntoView({ block: "nearest", behavior: isStill ? "auto" : "smooth" });
  } catch (error) {
    if (error instanceof Lost) {
      // Sent again it has the same idempotency key, so that nothing is made twice.
      told(false);
      form.showError(null, `${error.message} What you wrote is still here; send it again.`);
    } else {
      form.answered();
      if (!askForKey(error)) form.showError(error.param, error.message);
    }
  }
  isSending = false;
  form.setBusy(false);
}

async function begin() {
  await list();
  try {
    const [models] = await ask("v1/models");
    form.offerModels(models.data.map((model) => model.id));
  } catch (error) {
    if (!(error instanceof Lost) && error.status !== 401) throw error; // the server's own model is taken
  }
}

$("ask").addEventListener("submit", submit);
$("older").addEventListener("click", older);
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("api-key").value.trim());
});
$("forget-key").addEventListener("click", () => useKey(""));
$("change-key").addEventListener("click", () => {
  $("key").hidden = !$("key").hidden;
  if (!$("key").hidden) $("api-key").focus();
});
addEventListener("hashchange", () => {
  if (location.hash === "#verify") $("verify").open = true;
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) list(); // what was made elsewhere meanwhile
});
begin();
