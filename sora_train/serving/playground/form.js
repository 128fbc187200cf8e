/* The form: what is asked, with its files and its storyboard, and errors beside the fields that they name. */

import { randomName } from "./server.js";

const $ = (id) => document.getElementById(id);
const form = $("ask");
const SOURCED = ["edit", "extend", "remix", "infill", "upscale"]; // made from one video
const NEEDED = {
  remix: "Choose a finished video: press Remix beside it.",
  video: "Choose a video: drop a file here, or press a button beside a finished one.",
};

const files = new Map(); // name of a field -> File
let source = null; // the finished video that is edited, extended, remixed
let cues = []; // rows of the storyboard
let attempt = null; // the idempotency key of a request that was not answered

export const operation = () => $("operation").value;

/* An element with properties and children; texts stay texts. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export const say = (text) => ($("said").textContent = text);

/* --- which fields there are --- */

export function showFields() {
  for (const part of form.querySelectorAll("[data-for]")) {
    part.hidden = !part.dataset.for.split(" ").includes(operation());
  }
  const takesVideo = operation() !== "remix" && !source;
  if (SOURCED.includes(operation())) {
    slotOf("video").hidden = !takesVideo;
    $("source").textContent = source ? source.prompt : takesVideo ? "a file:" : NEEDED.remix;
    $("drop-source").hidden = !source;
  }
  $("model").closest(".field").hidden ||= $("model").options.length < 2;
  if (operation() === "storyboard" && !cues.length) addCue(0), addCue(1);
  $("seconds").placeholder = operation() === "extend" ? "how much is added" : "model's own";
}

/* Ask for something of a finished video. */
export function take(video, what) {
  source = video;
  $("operation").value = what;
  clearErrors();
  showFields();
  $("prompt").focus();
  form.scrollIntoView({ block: "start" });
}

export function reuse(video) {
  $("prompt").value = video.prompt ?? "";
  if (operation() === "storyboard") $("operation").value = "new";
  showFields();
  $("prompt").focus();
}

/* A video that is gone is the source of nothing. */
export function forget(id) {
  if (source?.id === id) source = null;
  showFields();
}

export function offerModels(names) {
  $("model").replaceChildren(...names.map((name) => element("option", { value: name, textContent: name })));
  showFields();
}

/* --- files --- */

const slotOf = (name) => form.querySelector(`.drop[data-param="${name}"]`);

/* Make a field take a file by click, keyboard or drop, and show it. */
function takeFiles(slot, name) {
  const input = slot.querySelector("input");
  const shown = element("div", { className: "shown" });
  slot.append(shown);
  const put = (file) => {
    if (!file) return;
    if (!file.type.startsWith(`${slot.dataset.kind}/`)) {
      showError(name, `This is no ${slot.dataset.kind}: ${file.name}`);
      return;
    }
    clearError(slot);
    files.set(name, file);
    attempt = null;
    preview(shown, file, slot.dataset.kind, () => {
      drop(name, shown);
      input.focus();
    });
  };
  input.addEventListener("change", () => {
    put(input.files[0]);
    input.value = ""; // the same file may be chosen again
  });
  slot.addEventListener("dragover", () => slot.classList.add("over"));
  slot.addEventListener("dragleave", () => slot.classList.remove("over"));
  slot.addEventListener("drop", (event) => {
    slot.classList.remove("over");
    put(event.dataTransfer.files[0]);
  });
  return shown;
}

function preview(shown, file, kind, remove) {
  drop(null, shown);
  const src = URL.createObjectURL(file);
  const picture = kind === "image" ? element("img", { src, alt: "" }) : element("video", { src, muted: true });
  const button = element("button", { type: "button", className: "plain", textContent: "Remove" });
  button.setAttribute("aria-label", `Remove ${file.name}`);
  button.addEventListener("click", remove);
  shown.append(picture, element("span", { className: "name", textContent: file.name }), button);
}

function drop(name, shown) {
  files.delete(name);
  attempt = null;
  for (const one of shown.querySelectorAll("img, video")) URL.revokeObjectURL(one.src);
  shown.replaceChildren();
}

/* --- the storyboard --- */

let cueCount = 0;

function addCue(at) {
  const id = `cue_${cueCount++}`;
  const cue = { id, row: element("li", { id }) };
  const field = (name, label, control) => {
    control.id = `${id}_${name}`;
    cue[name] = control;
    return element("div", { className: `field ${name}` }, element("label", { htmlFor: control.id, textContent: label }), control);
  };
  const button = (name, label, act) => {
    cue[name] = element("button", { type: "button", className: "plain", textContent: label });
    cue[name].addEventListener("click", act);
    return cue[name];
  };
  const image = field("image", "Image", element("input", { type: "file", accept: "image/*" }));
  Object.assign(image.dataset, { param: id, kind: "image" });
  image.classList.add("drop");
  cue.row.append(
    field("at", "At second", element("input", { inputMode: "decimal", autocomplete: "off", value: String(at) })),
    field("words", "Words", element("textarea", { rows: 2, dir: "auto" })),
    image,
    element(
      "div",
      { className: "buttons" },
      button("up", "Earlier", () => moveCue(cue, -1)),
      button("down", "Later", () => moveCue(cue, 1)),
      button("remove", "Remove", () => removeCue(cue)),
    ),
  );
  cue.shown = takeFiles(image, id);
  cues.push(cue);
  $("board").append(cue.row);
  numberCues();
  return cue;
}

/* Words and images change places; the times stay where they are, since they stand in order. */
function moveCue(cue, by) {
  const place = cues.indexOf(cue);
  const other = cues[place + by];
  [cue.at.value, other.at.value] = [other.at.value, cue.at.value];
  cues[place + by] = cue;
  cues[place] = other;
  $("board").append(...cues.map((one) => one.row));
  numberCues();
  (by < 0 ? [cue.up, cue.down] : [cue.down, cue.up]).find((one) => !one.disabled).focus();
  say(`Moved to second ${cue.at.value}, row ${place + by + 1} of ${cues.length}.`);
}

function removeCue(cue) {
  const place = cues.indexOf(cue);
  drop(cue.id, cue.shown);
  cue.row.remove();
  cues.splice(place, 1);
  numberCues();
  (cues[place] ?? cues.at(-1)).words.focus();
  say(`Row ${place + 1} is removed.`);
}

function numberCues() {
  attempt = null;
  cues.forEach((cue, place) => {
    cue.row.dataset.param = `storyboard[${place}]`;
    cue.at.parentElement.dataset.param = `storyboard[${place}].at`;
    cue.words.parentElement.dataset.param = `storyboard[${place}].prompt`;
    cue.row.setAttribute("aria-label", `Row ${place + 1}`);
    cue.up.disabled = place === 0;
    cue.down.disabled = place === cues.length - 1;
    cue.remove.disabled = cues.length === 1;
    for (const [name, label] of [["up", "Earlier"], ["down", "Later"], ["remove", "Remove"]]) {
      cue[name].setAttribute("aria-label", `${label}: row ${place + 1}`);
    }
  });
}

function board() {
  return cues.map((cue) => {
    const at = cue.at.value.trim();
    const row = at ? { at: Number.isNaN(Number(at)) ? at : Number(at) } : {};
    if (cue.words.value.trim()) row.prompt = cue.words.value.trim();
    if (files.has(cue.id)) row.image = cue.id;
    return row;
  });
}

/* --- what is sent --- */

/* The prompt, and behind it a sentence for each part, in the order of the fields. */
function prompt() {
  if (operation() === "storyboard") {
    return cues.map((cue) => cue.words.value.trim()).filter(Boolean).join("; ");
  }
  const parts = [...form.querySelectorAll("[data-part]")].map((part) => part.value.trim()).filter(Boolean);
  const said = $("prompt").value.trim();
  if (!parts.length) return said;
  return [said, ...parts].filter(Boolean).map((text) => (/[.!?]$/.test(text) ? text : `${text}.`)).join(" ");
}

const isShown = (control) => !control.closest("[hidden]");

/* Path and options of the request, or null after an error was shown. */
export function request() {
  clearErrors();
  const op = operation();
  if (op === "remix" && !source) return showError("source", NEEDED.remix);
  if (SOURCED.includes(op) && !source && !files.has("video")) return showError("video", NEEDED.video);
  attempt ??= randomName();
  const headers = { "Idempotency-Key": attempt };
  if (op === "remix") {
    headers["Content-Type"] = "application/json";
    return [`v1/videos/${source.id}/remix`, { method: "POST", headers, body: JSON.stringify({ prompt: prompt() }) }];
  }
  const body = new FormData();
  body.set("prompt", prompt());
  for (const control of form.querySelectorAll("[name]")) {
    const value = control.value.trim();
    if (control.id !== "prompt" && value && isShown(control)) body.set(control.name, value);
  }
  const adapters = $("adapters").value.split(",").map((name) => name.trim()).filter(Boolean);
  if (adapters.length) body.set("adapters", JSON.stringify(adapters));
  if (op === "storyboard") body.set("storyboard", JSON.stringify(board()));
  else if (op !== "new" && op !== "edit" && op !== "extend") body.set("operation", op);
  addFiles(body, op);
  const path = { edit: "v1/videos/edits", extend: "v1/videos/extensions" }[op] ?? "v1/videos";
  return [path, { method: "POST", headers, body }];
}

function addFiles(body, op) {
  const takesSource = SOURCED.includes(op) && source;
  if (takesSource) body.set("video[id]", source.id);
  for (const [name, file] of files) {
    const cue = cues.find((one) => one.id === name);
    if (cue && op === "storyboard") body.append("files", file, name);
    else if (!cue && isShown(slotOf(name)) && !(takesSource && name === "video")) {
      body.append(name.replace("_2", ""), file);
    }
  }
}

/* What was sent has its answer: the next request is another one. */
export const answered = () => (attempt = null);

export const setBusy = (busy) => {
  $("submit").textContent = busy ? "Sending" : "Make the video";
  $("submit").setAttribute("aria-disabled", busy);
};

/* --- errors --- */

/* A sentence beside the field that `param` names, or above the button; the field gets the focus. */
export function showError(param, message) {
  const field = fieldOf(param);
  if (!field) {
    $("form-error").textContent = message;
    $("form-error").hidden = false;
    $("form-error").focus();
    return null;
  }
  clearError(field);
  const id = `${field.dataset.param}-error`;
  const control = field.querySelector("input, textarea, select, [tabindex]");
  field.append(element("p", { id, className: "error", role: "alert", textContent: message }));
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", id);
  for (let part = field.closest("details"); part; part = part.parentElement.closest("details")) part.open = true;
  control.focus();
  return null;
}

/* `storyboard[1].prompt`, `video.id`, `prompt`: the nearest field that is shown. */
function fieldOf(param) {
  const names = [];
  for (let name = param ?? ""; name; name = name.replace(/[.[]?[^.[]*$/, "")) names.push(name);
  if (param === "prompt" && operation() === "storyboard") names.push("storyboard");
  if (param === "input_reference") names.push("image");
  if (param === "video" || param === "video.id" || param === "video_id") names.push("source");
  for (const name of names) {
    const field = form.querySelector(`[data-param="${CSS.escape(name)}"]`);
    if (field && isShown(field)) return field;
  }
  return null;
}

function clearError(field) {
  for (const old of field.querySelectorAll(".error")) old.remove();
  for (const control of field.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-describedby");
  }
}

export function clearErrors() {
  for (const field of form.querySelectorAll("[data-param]")) clearError(field);
  $("form-error").hidden = true;
}

/* --- the page --- */

for (const slot of form.querySelectorAll(".drop[data-param]")) takeFiles(slot, slot.dataset.param);
form.addEventListener("input", () => (attempt = null));
$("operation").addEventListener("change", () => {
  clearErrors();
  showFields();
});
$("drop-source").addEventListener("click", () => {
  source = null;
  attempt = null;
  showFields();
  $("operation").focus();
});
$("add-cue").addEventListener("click", () => addCue(nextTime()).words.focus());
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
// A file that misses its field must not take the page's place.
for (const name of ["dragover", "drop"]) addEventListener(name, (event) => event.preventDefault());
showFields();

function nextTime() {
  return cues.length ? Math.round(10 * (Number(cues.at(-1).at.value) + 1 || cues.length)) / 10 : 0;
}
