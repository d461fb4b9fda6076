// The page of `minerva serve`: one conversation, kept in this tab's memory.
// What a user, a model or the server says is text: it becomes text nodes, never markup.

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const button = (label, action, className = "") => {
  const element = make("button", { type: "button", textContent: label, className });
  element.addEventListener("click", () => action(element));
  return element;
};

const turns = []; // questions and answers in turn
let running = null; // the answer that is being written
let shading = false; // tokens are shaded by their probability
let contextSize = 0; // in tokens; 0 if unknown

// The token: from the address, else from this tab's storage, else from the user.

const STORED = "minerva-token";
let token = null;
let asking = null; // a promise while the user is asked

function keepToken(text) {
  const given = text.includes("token=") ? text.replace(/^.*token=([^&]*).*$/s, "$1") : text;
  let decoded = given.trim();
  try {
    decoded = decodeURIComponent(decoded);
  } catch {
    // A percent sign that encodes nothing is part of the token.
  }
  if (!/^[!-~]+$/.test(decoded)) return false;
  token = decoded;
  try {
    sessionStorage.setItem(STORED, token);
  } catch {
    // Storage is turned off: the token lasts until the page is left.
  }
  asking?.resolve();
  $("token-dialog").close();
  return true;
}

function takeTokenFromAddress() {
  if (!location.hash.includes("token=")) return;
  keepToken(location.hash);
  history.replaceState(null, "", location.pathname + location.search);
}

function askForToken(wasRefused, signal) {
  if (!asking) {
    asking = Promise.withResolvers();
    asking.promise.catch(() => {}).finally(() => (asking = null));
    $("token-refused").textContent = wasRefused ? "The server refused this token." : "";
    $("token").value = "";
    $("token-dialog").showModal();
  }
  signal?.addEventListener("abort", () => $("token-dialog").close(), { once: true });
  return asking.promise;
}

$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!keepToken($("token").value)) $("token-refused").textContent = "A token has no spaces and only plain characters.";
});
$("token-cancel").addEventListener("click", () => $("token-dialog").close());
$("token-dialog").addEventListener("close", () => asking?.reject(new Failure("The server wants a token.")));

// Requests.

class Failure extends Error {}

function failureOf(error, status) {
  const where = [status ?? error?.code, error?.param].filter(Boolean).join(", ");
  return new Failure(`${error?.message || "The server failed."}${where ? ` (${where})` : ""}`);
}

function sayLost() {
  throw new Failure("The server cannot be reached. Is it still running?");
}

async function request(path, body, signal) {
  for (;;) {
    const headers = {};
    if (token) headers.Authorization = `Bearer ${token}`;
    if (body) headers["Content-Type"] = "application/json";
    const method = body ? "POST" : "GET";
    const response = await fetch(path, { method, headers, body: JSON.stringify(body), signal }).catch(sayLost);
    if (response.ok) return response;
    if (response.status !== 401) {
      const answer = await response.json().catch(() => null);
      throw failureOf(answer?.error ?? { message: response.statusText }, response.status);
    }
    await askForToken(Boolean(headers.Authorization), signal);
  }
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (let rest = ""; ; ) {
      const { value, done } = await reader.read().catch(sayLost);
      if (done) throw new Failure("The connection ended before the answer did.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw failureOf(event.error);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
}

function sentenceFor(error) {
  return error instanceof Failure ? error.message : `The server's answer cannot be read: ${error.message}`;
}

const alertFor = (error) => make("p", { className: "alert", role: "alert", textContent: sentenceFor(error) });

// Text: prose and fenced code, or tokens shaded by their probability. Drawing again changes only what is new, so a
// selection survives while text arrives.

function blocksOf(text) {
  const blocks = [];
  let fence = null;
  for (const line of text.split(/(?<=\n)/)) {
    const [, mark, info] = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)\n?$/.exec(line) ?? [];
    if (fence && mark?.startsWith(fence) && !info.trim()) {
      fence = null;
    } else if (!fence && mark) {
      fence = mark;
      blocks.push({ isCode: true, language: info.trim(), text: "" });
    } else {
      if (!fence && (blocks.at(-1)?.isCode ?? true)) blocks.push({ isCode: false, text: "" });
      blocks.at(-1).text += line;
    }
  }
  for (const block of blocks) block.text = block.isCode ? block.text.replace(/\n$/, "") : block.text.trim();
  return blocks.filter((block) => block.isCode || block.text);
}

function makeBlock(isCode) {
  if (!isCode) return make("div", { className: "prose" }, "");
  const code = make("pre", { tabIndex: 0, role: "group", ariaLabel: "Code", dir: "ltr" }, "");
  const copyCode = button("Copy", (it) => copy(code.textContent, it), "quiet");
  return make("div", { className: "code" }, make("div", { className: "row" }, make("span"), copyCode), code);
}

function setText(element, text) {
  const node = element.firstChild ?? element.appendChild(new Text());
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}

function drawBlocks(box, text) {
  const blocks = blocksOf(text);
  blocks.forEach((block, i) => {
    const isSameKind = box.children[i]?.classList.contains("code") === block.isCode;
    while (!isSameKind && box.children.length > i) box.lastChild.remove();
    const element = box.children[i] ?? box.appendChild(makeBlock(block.isCode));
    if (block.isCode) setText(element.querySelector("span"), block.language);
    setText(block.isCode ? element.querySelector("pre") : element, block.text);
  });
  while (box.children.length > blocks.length) box.lastChild.remove();
}

const tokenOf = new WeakMap(); // from an element to the token that it shows

class Passage {
  text = "";
  #tokens = [];
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #tokenText = "";
  #isShaded = null;

  constructor(label) {
    this.box = make("div", { className: "passage" });
    this.label = label;
  }

  add(text, tokens) {
    this.text += text;
    for (const token of tokens) {
      // A character may be cut into several tokens: it shows in the last of them.
      token.text = token.bytes ? this.#decoder.decode(Uint8Array.from(token.bytes), { stream: true }) : token.token;
      this.#tokenText += token.text;
      this.#tokens.push(token);
    }
  }

  get tokenCount() {
    return this.#tokens.length;
  }

  draw() {
    const isShaded = shading && this.#tokens.length > 0;
    if (isShaded !== this.#isShaded) {
      this.box.replaceChildren();
      this.box.role = isShaded ? "listbox" : null;
      this.box.ariaLabel = isShaded ? `Tokens of the ${this.label}` : null;
      this.box.ariaOrientation = isShaded ? "horizontal" : null;
      this.box.classList.toggle("shaded", isShaded);
      this.#isShaded = isShaded;
    }
    if (isShaded) this.#drawTokens();
    else drawBlocks(this.box, this.text);
  }

  #drawTokens() {
    this.box.querySelector(".rest")?.remove();
    for (const token of this.#tokens.slice(this.box.children.length)) {
      const element = make("span", { className: `token ${levelOf(token)}`, role: "option", textContent: token.text });
      element.tabIndex = this.box.children.length ? -1 : 0;
      if (!token.text.trim()) element.ariaLabel = spell(token);
      tokenOf.set(element, token);
      this.box.append(element);
    }
    if (this.text.length > this.#tokenText.length && this.text.startsWith(this.#tokenText)) {
      const rest = this.text.slice(this.#tokenText.length);
      this.box.append(make("span", { className: "rest", role: "presentation", textContent: rest }));
    }
  }
}

// Probabilities: a token and its alternatives, while the pointer or the focus is on it.

const popover = $("popover");
let pointedAt = null;

const probabilityOf = ({ logprob }) => Math.exp(logprob ?? -Infinity);
const percent = (p) => (p > 0 && p < 0.001 ? "< 0.1%" : `${(100 * p).toFixed(1)}%`);

function levelOf(token) {
  const p = probabilityOf(token);
  return p >= 0.9 ? "p0" : p >= 0.5 ? "p1" : p >= 0.2 ? "p2" : p >= 0.05 ? "p3" : "p4";
}

function spell({ token, bytes }) {
  let text = token;
  try {
    if (bytes) text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(bytes));
  } catch {
    return bytes.map((byte) => `<${byte.toString(16).toUpperCase().padStart(2, "0")}>`).join("");
  }
  const names = { " ": "␣", "\n": "⏎", "\t": "⇥" };
  const code = (c) => `<U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`;
  return text.replace(/[\s\p{Cc}\p{Cf}]/gu, (c) => names[c] ?? code(c)) || "(empty)";
}

function showPopover(element) {
  if (element === pointedAt) return;
  hidePopover();
  const chosen = tokenOf.get(element);
  const line = (candidate, className) => {
    const bar = make("span", { className: "bar" });
    bar.style.inlineSize = `${100 * probabilityOf(candidate)}%`;
    return make("p", { className }, make("bdi", { textContent: spell(candidate) }), " ",
      make("span", { textContent: percent(probabilityOf(candidate)) }), bar);
  };
  const others = (chosen.top_logprobs ?? []).slice(0, 5);
  const isChosen = (candidate) => spell(candidate) === spell(chosen); // pieces of characters have equal texts
  popover.replaceChildren(line(chosen, "chosen"), ...others.map((it) => line(it, isChosen(it) ? "same" : "")));
  popover.hidden = false;
  pointedAt = element;
  element.setAttribute("aria-describedby", "popover");
  placePopover();
}

function placePopover() {
  if (!pointedAt) return;
  const view = $("main").getBoundingClientRect();
  const isInView = ({ top, bottom }) => bottom > view.top && top < view.bottom;
  const spot = [...pointedAt.getClientRects()].find(isInView); // of the lines that the token is on
  if (!spot) return hidePopover();
  const { width, height } = popover.getBoundingClientRect();
  const hasRoomBelow = spot.bottom + height < innerHeight - 8;
  popover.style.left = `${Math.max(8, Math.min(spot.left, innerWidth - width - 8))}px`;
  popover.style.top = `${hasRoomBelow ? spot.bottom : Math.max(8, spot.top - height)}px`;
}

function hidePopover() {
  pointedAt?.removeAttribute("aria-describedby");
  pointedAt = null;
  popover.hidden = true;
}

function backToFocus() {
  if (tokenOf.has(document.activeElement)) showPopover(document.activeElement);
  else hidePopover();
}

for (const type of ["pointerover", "focusin"]) {
  document.addEventListener(type, (event) => {
    if (tokenOf.has(event.target)) showPopover(event.target);
    else if (pointedAt && !popover.contains(event.target)) backToFocus();
  });
}
document.documentElement.addEventListener("pointerleave", () => pointedAt && backToFocus());
document.addEventListener("focusout", hidePopover);

$("turns").addEventListener("keydown", (event) => {
  if (!tokenOf.has(event.target)) return;
  const all = [...event.target.parentElement.children].filter((element) => tokenOf.has(element));
  const here = all.indexOf(event.target);
  const there = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: all.length - 1 }[event.key];
  if (there === undefined) return;
  event.preventDefault();
  const next = all[there];
  if (!next) return;
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});

// What is said aloud: whole sentences, not tokens.

function announce(text) {
  const line = make("p", { textContent: text });
  $("live").append(line);
  setTimeout(() => line.remove(), 10_000); // else a reader that moves through the page meets the answer twice
}

// Questions and answers.

class Question {
  role = "user";

  constructor(text) {
    this.text = text;
    this.body = make("div", { className: "bubble prose", textContent: text });
    this.actions = make("div", { className: "actions" },
      button("Edit", () => this.edit(), "quiet idle"), button("Copy", (it) => copy(this.text, it), "quiet"));
    this.element = make("article", { className: "question" },
      make("h2", { className: "unseen", textContent: "You" }), this.body, this.actions);
  }

  edit() {
    const field = make("textarea", { value: this.text, ariaLabel: "Edit the message", dir: "auto" });
    const send = make("button", { type: "submit", className: "strong", textContent: "Send" });
    const form = make("form", { className: "edit" }, field,
      make("div", { className: "row end" }, button("Cancel", () => close()), send));
    const close = () => {
      form.replaceWith(this.body);
      this.actions.hidden = false;
      this.actions.firstChild.focus();
    };
    sendOnEnter(field, form);
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || running) return;
      event.stopPropagation();
      close();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!field.value.trim() || !knobsAreValid()) return;
      cutFrom(this);
      ask(field.value);
      $("stop").focus();
    });
    this.body.replaceWith(form);
    this.actions.hidden = true;
    field.focus();
  }
}

class Answer {
  role = "assistant";
  #stopper = new AbortController();
  #reasoning = new Passage("reasoning");
  #answer = new Passage("answer");
  #asked = performance.now();
  #first = null; // when the first token came, and when the answer itself began
  #begun = null;
  #last = null;
  #held = []; // tokens whose text has not come yet
  #said = 0;
  #frame = 0;

  constructor() {
    this.summary = make("summary", { textContent: "Reasoning" });
    this.details = make("details", { hidden: true }, this.summary, this.#reasoning.box);
    this.progress = make("p", { className: "progress", textContent: "Reading" });
    this.facts = make("p", { className: "facts" });
    this.copy = button("Copy", (it) => copy(this.text, it), "quiet");
    this.again = button("Regenerate", () => regenerate(this), "quiet idle again");
    this.actions = make("div", { className: "actions", hidden: true }, this.copy, this.again);
    this.foot = make("div", { className: "foot" }, this.facts, this.actions);
    this.element = make("article", { className: "answer" }, make("h2", { className: "unseen", textContent: "Answer" }),
      this.details, this.#answer.box, this.progress, this.foot);
  }

  get text() {
    return this.#answer.text;
  }

  stop() {
    this.#stopper.abort();
  }

  async run(body) {
    try {
      if (!$("model").value) {
        await loadModels(this.#stopper.signal);
        load(loadDefaults);
      }
      body.model = $("model").value;
      for await (const event of eventsOf(await request("v1/chat/completions", body, this.#stopper.signal))) {
        this.#take(event);
        this.#frame ||= requestAnimationFrame(() => this.draw());
      }
    } catch (error) {
      if (!this.#stopper.signal.aborted) this.foot.before(alertFor(error));
    }
    this.#finish();
  }

  #take({ choices, usage, timings }) {
    this.usage = usage ?? this.usage;
    this.timings = timings ?? this.timings;
    const [choice] = choices ?? [];
    if (!choice) return;
    const { content, reasoning_content: reasoning } = choice.delta ?? {};
    this.#held.push(...(choice.logprobs?.content ?? []));
    this.finishReason = choice.finish_reason ?? this.finishReason;
    if (!content && !reasoning && !this.#held.length) return;
    this.#last = performance.now();
    this.#first ??= this.#last;
    if (content) this.#begun ??= this.#last;
    if (reasoning) this.#reasoning.add(reasoning, content ? [] : this.#held.splice(0));
    if (content) this.#answer.add(content, this.#held.splice(0));
    const [sentences] = /^.*([.!?。！？]\s|\n)/s.exec(this.text.slice(this.#said)) ?? [""];
    this.#say(sentences);
  }

  #say(text) {
    this.#said += text.length;
    if (text.trim()) announce(text.trim());
  }

  draw() {
    this.#frame = 0;
    const isRunning = running === this;
    this.details.hidden = !this.#reasoning.text;
    if (this.#reasoning.text) {
      const until = this.#begun ?? this.#last;
      const isOpenEnded = isRunning && !this.#begun;
      this.summary.textContent = isOpenEnded ? "Reasoning …" : `Reasoning, ${seconds(until - this.#first)}`;
    }
    this.progress.hidden = !isRunning;
    this.progress.textContent = this.#first === null ? "Reading" : "Writing";
    this.#reasoning.draw();
    this.#answer.draw();
    follow();
    placePopover();
  }

  #finish() {
    cancelAnimationFrame(this.#frame);
    this.#say(this.text.slice(this.#said));
    if (this.#stopper.signal.aborted) announce("Stopped.");
    if (running === this) {
      running = null;
      update();
    }
    this.actions.hidden = false;
    this.copy.hidden = !this.text;
    if (!this.text) this.again.textContent = "Try again";
    this.facts.textContent = this.#describe();
    this.draw();
  }

  #describe() {
    const { usage, timings } = this;
    const facts = [];
    const received = this.#reasoning.tokenCount + this.#answer.tokenCount;
    const count = timings?.predicted_n ?? usage?.completion_tokens ?? received;
    if (count) facts.push(`${number(count)} ${count === 1 ? "token" : "tokens"}`);
    const rate = timings?.predicted_per_second ?? (1000 * (count - 1)) / (this.#last - this.#first);
    if (count > 1 && Number.isFinite(rate)) facts.push(`${number(rate, 1)} tokens/s`);
    if (this.#first !== null) facts.push(`first token ${seconds(this.#first - this.#asked)}`);
    const cached = timings?.cache_n ?? usage?.prompt_tokens_details?.cached_tokens;
    const prompt = usage?.prompt_tokens ?? (timings && timings.prompt_n + timings.cache_n);
    if (prompt) facts.push(`${number(cached ?? 0)} of ${number(prompt)} prompt tokens cached`);
    if (this.finishReason === "length") facts.push("cut off at the token limit");
    if (this.#stopper.signal.aborted) facts.push("stopped");
    if (usage) showUsed(usage.prompt_tokens + usage.completion_tokens);
    return facts.join(" · ");
  }
}

const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const seconds = (milliseconds) => `${number(milliseconds / 1000, milliseconds < 10_000 ? 2 : 0)} s`;

function showUsed(tokens) {
  const isKnown = tokens > 0 && contextSize > 0;
  $("used").textContent = isKnown ? `Context: ${number(tokens)} / ${number(contextSize)} tokens` : "";
}

function add(turn) {
  turns.push(turn);
  $("turns").append(turn.element);
}

function ask(text) {
  add(new Question(text));
  reply();
}

function reply() {
  const system = $("system").value.trim();
  const body = {
    messages: [
      ...(system ? [{ role: "system", content: system }] : []),
      ...turns.map(({ role, text }) => ({ role, content: text })),
    ],
    stream: true,
    stream_options: { include_usage: true },
    logprobs: true,
    top_logprobs: 5,
    ...knobValues(),
  };
  $("notice").replaceChildren();
  running = new Answer();
  add(running);
  update();
  isFollowing = true;
  follow();
  running.run(body);
}

function stop() {
  running?.stop();
}

function cutFrom(turn) {
  stop();
  running = null;
  for (const { element } of turns.splice(turns.indexOf(turn))) element.remove();
}

function regenerate(answer) {
  if (!knobsAreValid()) return;
  cutFrom(answer);
  reply();
  $("stop").focus();
}

function update() {
  const hadFocus = document.activeElement === $("stop");
  document.body.classList.toggle("busy", running !== null);
  $("stop").hidden = !running;
  $("send").hidden = Boolean(running);
  $("clear").disabled = !turns.length;
  $("welcome").hidden = turns.length > 0;
  if (!running && hadFocus) focusMessage();
}

async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page that came over plain HTTP from another machine has no clipboard; a selection can still be copied.
    const field = make("textarea", { value: text, className: "unseen" });
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    pressed.focus();
  }
  pressed.textContent = "Copied";
  setTimeout(() => (pressed.textContent = "Copy"), 1500);
  announce("Copied");
}

// The scroll stays at the end while text arrives, unless the user scrolled up.

let isFollowing = true;

function follow() {
  if (isFollowing) $("main").scrollTop = $("main").scrollHeight;
}

$("main").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = $("main");
  isFollowing = scrollHeight - scrollTop - clientHeight < 16;
  $("to-end").hidden = isFollowing;
  placePopover();
});
new ResizeObserver(follow).observe($("main"));
$("to-end").addEventListener("click", () => {
  isFollowing = true;
  follow();
  focusMessage();
});

// The composer.

function focusMessage() {
  if (!matchMedia("(pointer: coarse)").matches) $("message").focus(); // there it would open the keyboard
}

function sendOnEnter(field, form) {
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

sendOnEnter($("message"), $("composer"));
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value;
  if (running || !text.trim() || !knobsAreValid()) return;
  $("message").value = "";
  ask(text);
  $("message").focus();
});
$("stop").addEventListener("click", stop);
$("shade").addEventListener("click", () => {
  shading = !shading;
  $("shade").ariaPressed = String(shading);
  $("legend").hidden = !shading;
  hidePopover();
  for (const turn of turns) turn.draw?.();
});
$("clear").addEventListener("click", () => {
  stop();
  running = null;
  const gone = turns.splice(0);
  $("turns").replaceChildren();
  showUsed(0);
  update();
  const undo = button("Undo", () => {
    gone.forEach(add);
    $("notice").replaceChildren();
    update();
    focusMessage();
  });
  $("notice").replaceChildren(make("p", { role: "status" }, "The conversation is cleared. ", undo));
  focusMessage();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("token-dialog").open) return;
  const hadPopover = pointedAt !== null;
  hidePopover();
  if (running) stop();
  else if (!hadPopover && isNarrow.matches && !$("settings").hidden) showSettings(false);
});

// Settings: beside the conversation if there is room, else over it.

const isNarrow = matchMedia("(max-width: 1079px)");
const knobs = [...$("knobs").querySelectorAll("input")];

function showSettings(isShown) {
  $("settings").hidden = !isShown;
  $("show-settings").ariaExpanded = String(isShown);
  for (const part of document.querySelectorAll("header, main, footer")) part.inert = isShown && isNarrow.matches;
}

isNarrow.addEventListener("change", () => showSettings(!isNarrow.matches));
$("show-settings").addEventListener("click", () => {
  showSettings($("settings").hidden);
  if (!$("settings").hidden) $("settings-title").focus();
});
$("hide-settings").addEventListener("click", () => {
  showSettings(false);
  $("show-settings").focus();
});

function knobValues() {
  return Object.fromEntries(knobs.filter((knob) => knob.value !== "").map((knob) => [knob.id, knob.valueAsNumber]));
}

function knobsAreValid() {
  const wrong = knobs.find(({ validity }) => validity.rangeUnderflow || validity.rangeOverflow || validity.badInput);
  if (!wrong) return true;
  showSettings(true);
  wrong.reportValidity();
  return false;
}

function markKnobs() {
  for (const knob of knobs) knob.classList.toggle("changed", knob.value !== knob.defaultValue);
  $("defaults").disabled = knobs.every((knob) => knob.value === knob.defaultValue);
}

function setDefaults(params) {
  const shown = (value) => (Number.isFinite(value) ? String(Number(value.toPrecision(6))) : "");
  const limit = params.max_tokens ?? params.n_predict;
  const isRandom = !(params.seed >= 0) || params.seed === 0xffffffff; // as llama-server says it
  const defaults = { ...params, seed: isRandom ? null : params.seed, max_tokens: limit > 0 ? limit : null };
  for (const knob of knobs) {
    const isUntouched = knob.value === knob.defaultValue;
    knob.defaultValue = shown(defaults[knob.id]);
    if (isUntouched) knob.value = knob.defaultValue;
  }
  markKnobs();
}

$("knobs").addEventListener("input", markKnobs);
$("knobs").addEventListener("submit", (event) => event.preventDefault());
$("defaults").addEventListener("click", () => {
  $("knobs").reset();
  markKnobs();
  $("knobs").querySelector("input").focus();
});

// Models.

async function loadModels(signal) {
  const { data } = await (await request("v1/models", undefined, signal)).json();
  $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
  $("model").disabled = data.length < 2;
  if (!data.length) throw new Failure("The server has no model.");
}

async function loadDefaults() {
  const model = $("model").value;
  $("model").title = model;
  const response = await request(`props?model=${encodeURIComponent(model)}`);
  const { default_generation_settings: settings } = await response.json();
  if ($("model").value !== model) return; // another was chosen since
  contextSize = settings?.n_ctx ?? 0;
  showUsed(0);
  setDefaults(settings?.params ?? {});
}

function load(what) {
  $("notice").replaceChildren();
  what().catch((error) => {
    $("notice").replaceChildren(alertFor(error), button("Try again", () => load(what)));
  });
}

$("model").addEventListener("change", () => load(loadDefaults));

try {
  token = sessionStorage.getItem(STORED);
} catch {
  // As above.
}
takeTokenFromAddress();
addEventListener("hashchange", takeTokenFromAddress);
showSettings(!isNarrow.matches);
focusMessage();
load(async () => {
  await loadModels();
  await loadDefaults();
});
