"use strict";
const $ = (id) => document.getElementById(id);
const viewer = new Viewer($("viewer"), $("canvas")), reference = new Reference();
let language = localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let running = null, shown = [], past = [];

const word = (name, ...rest) => {
  const value = WORDS[language][name];
  return typeof value === "function" ? value(...rest) : value;
};

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = word("title");
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = word(element.dataset.word);
  for (const element of document.querySelectorAll("[data-alt]")) element.alt = word(element.dataset.alt);
  $("seed").placeholder = word("random");
  $("language").textContent = word("other");
}

function say(text, isError = false) {
  $("message").textContent = text;
  $("message").classList.toggle("error", isError);
}

function toBlob(base64) {
  return new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type: "image/png" });
}

function options() {
  const count = Number($("count").value) || 8;
  const chosen = { n: Math.min(16, Math.max(1, count)), cfg_scale: Number($("guidance").value), quality: $("quality").value };
  if ($("seed").value !== "") chosen.seed = Number($("seed").value);
  if ($("negative").value.trim()) chosen.negative = $("negative").value.trim();
  if ($("whiten").checked) chosen.whiten = true;
  return { ...chosen, response_format: "b64_json", stream: true, partial_images: 8 };
}

function place(slot, blob, caption) {
  const figure = slot.figure;
  const image = figure.querySelector("img");
  if (image.src) URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  slot.blob = blob;
  if (caption !== undefined) figure.querySelector("figcaption").textContent = caption;
}

function newSlot(prompt) {
  const figure = document.createElement("figure"), image = document.createElement("img"), caption = document.createElement("figcaption");
  image.tabIndex = 0;
  image.alt = prompt;
  figure.append(image, caption);
  const slot = { figure, prompt, blob: null, done: false };
  const open = () => slot.done && enlarge(slot);
  image.addEventListener("click", open);
  image.addEventListener("keydown", (e) => (e.key === "Enter" || e.key === " ") && (e.preventDefault(), open()));
  return slot;
}

async function run(path, body, prompt) {
  if (running) running.abort();
  const controller = running = new AbortController(), began = performance.now();
  const slots = new Map(), finished = [];
  let notWhite = 0;
  $("images").replaceChildren();
  $("stop").hidden = false;
  $("download").hidden = true;
  say(word("working"));
  const slotOf = (index) => {
    if (!slots.has(index)) {
      slots.set(index, newSlot(prompt));
      $("images").append(slots.get(index).figure);
    }
    return slots.get(index);
  };
  try {
    await streamImages(path, body, (event) => {
      const slot = slotOf(event.index);
      if (event.type.endsWith("partial_image")) return place(slot, toBlob(event.b64_json));
      Object.assign(slot, { done: true, seed: event.seed, index: event.index });
      notWhite += event.white === false;
      place(slot, toBlob(event.b64_json), event.percentile == null ? "" : word("score", Math.round(event.percentile)));
      finished.push(slot);
    }, controller.signal);
    finished.forEach((slot, i) => slot.figure.classList.toggle("first", i === 0));
    $("images").replaceChildren(...finished.map((slot) => slot.figure)); // best first, those left out gone
    shown = finished;
    $("download").hidden = !finished.length;
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    say(word("finished", finished.length, seconds) + (notWhite ? word("not_white", notWhite) : ""));
    remember(prompt, finished);
  } catch (error) {
    report(error);
  } finally {
    if (running === controller) {
      running = null;
      $("stop").hidden = true;
    }
  }
}

function report(error) {
  if (error.name === "AbortError") return say(word("stopped"));
  if (!(error instanceof ApiProblem)) return say(word("lost"), true);
  if (error.status === 401) { $("key").closest("details").open = true; return say(word("denied"), true); }
  if (error.status === 429 && error.retryAfter) return say(word("retry", error.retryAfter), true);
  say(error.message, true);
}

function remember(prompt, slots) {
  past = [{ prompt, slots }, ...past].slice(0, 20);
  $("history").replaceChildren(...past.map(({ prompt: text, slots: old }) => {
    const button = document.createElement("button");
    button.type = "button";
    for (const slot of old.slice(0, 6)) {
      const image = document.createElement("img");
      image.src = URL.createObjectURL(slot.blob);
      image.alt = "";
      button.append(image);
    }
    button.append(text);
    button.addEventListener("click", () => {
      $("prompt").value = text;
      $("images").replaceChildren(...old.map((slot) => slot.figure));
      shown = old;
      $("download").hidden = false;
    });
    return button;
  }));
}

function enlarge(slot) {
  $("about").textContent = `${slot.prompt} · ${word("seed")} ${slot.seed} / ${slot.index}`;
  $("save").href = URL.createObjectURL(slot.blob);
  $("save").download = `${slot.prompt.slice(0, 30)}_${slot.seed}_${slot.index}.png`;
  viewer.show(slot);
}

function formOf(values, files) {
  const form = new FormData();
  for (const [name, value] of Object.entries(values)) form.append(name, String(value));
  for (const [name, blob] of Object.entries(files)) form.append(name, blob, `${name}.png`);
  return form;
}

function recolour(photo, prompt) {
  const more = { recolour: true, line_scale: Number($("line_scale").value) };
  run("/v1/images/edits", formOf({ prompt, ...options(), ...more }, { image: photo }), prompt);
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const prompt = $("prompt").value.trim();
  if (!prompt) return say(word("empty"), true);
  if (reference.blob && $("use").value === "recolour") return recolour(reference.blob, prompt);
  const line = reference.blob ? { line: await reference.dataUrl(), line_scale: Number($("line_scale").value) } : {};
  run("/v1/images/generations", { prompt, ...options(), ...line }, prompt);
});
$("upload").addEventListener("change", async () => {
  const [file] = $("upload").files;
  $("upload").value = "";
  if (!file) return;
  try {
    await reference.take(file);
  } catch {
    return say(word("unreadable"), true);
  }
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(reference.blob);
  $("chosen").hidden = false;
  say("");
});
$("forget").addEventListener("click", () => { reference.forget(); $("chosen").hidden = true; $("upload").focus(); });
$("prompt").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); $("form").requestSubmit(); }
});
$("stop").addEventListener("click", () => running && running.abort());
$("guidance").addEventListener("input", () => { $("guidance_value").value = $("guidance").value; });
$("key").value = sessionStorage.getItem("key") || "";
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value.trim()); showModel(); });
$("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  translate();
});
$("download").addEventListener("click", async () => {
  const files = await Promise.all(shown.map(async (slot, i) => ({ name: `${String(i).padStart(2, "0")}.png`, bytes: new Uint8Array(await slot.blob.arrayBuffer()) })));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(zipOf(files));
  link.download = "images.zip";
  link.click();
});
$("close").addEventListener("click", () => $("viewer").close());
$("clear").addEventListener("click", () => viewer.clear());
$("vary").addEventListener("click", () => {
  const slot = viewer.image;
  $("viewer").close();
  run("/v1/images/variations", formOf({ prompt: slot.prompt, ...options() }, { image: slot.blob }), slot.prompt);
});
$("repaint").addEventListener("click", async () => {
  if (viewer.isEmpty) return ($("about").textContent = word("nothing"));
  const slot = viewer.image, mask = await viewer.mask(), prompt = $("prompt").value.trim() || slot.prompt;
  $("viewer").close();
  run("/v1/images/edits", formOf({ prompt, ...options() }, { image: slot.blob, mask }), prompt);
});

$("recolour").addEventListener("click", () => {
  const slot = viewer.image, prompt = $("prompt").value.trim();
  if (!prompt || prompt === slot.prompt) return ($("about").textContent = word("recolour_hint"));
  $("viewer").close();
  recolour(slot.blob, prompt);
});

async function showModel() {
  const model = await modelName().catch(() => null);
  const followsLines = Boolean(model && model.line_drawings);
  $("reference").hidden = !followsLines;
  $("recolour").hidden = !followsLines;
  $("model").textContent = model ? `${model.id} · ${model.image_size} px` : "";
}

$("examples").append(...EXAMPLES.map((text) => {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => { $("prompt").value = text; $("form").requestSubmit(); });
  return button;
}));
translate();
showModel();
