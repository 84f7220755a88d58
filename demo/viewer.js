const find = (selector) => element.querySelector(selector);
const [scene, range, point] = [find(".scene"), find(".between input"), find(".point")];
let shown = null, stage = null, values = null, at = { x: 0.5, y: 0.5 };

function depthAt({ x, y }) {
  const column = Math.min(values.width - 1, Math.floor(x * values.width));
  const row = Math.min(values.height - 1, Math.floor(y * values.height));
  return values.bytes.charCodeAt(row * values.width + column) / 255;
}

function read() {
  point.hidden = false;
  point.style.left = `${at.x * 100}%`;
  point.style.top = `${at.y * 100}%`;
  const place = `${Math.round(at.x * 100)} % from the left, ${Math.round(at.y * 100)} % from the top`;
  find(".reading").textContent = `Depth ${depthAt(at).toFixed(2)} at ${place}.`;
}

function wipe() {
  find(".depth").style.clipPath = `inset(0 0 0 ${range.value}%)`;
  find(".wipe").style.left = `${range.value}%`;
  find(".wipe").hidden = !values || range.value <= 0 || range.value >= 100;
  range.setAttribute("aria-valuetext", `${range.value} % photo, ${100 - range.value} % depth`);
}

function fillGrid(state) {
  const grid = find(".grid"), side = Math.round(Math.sqrt(state.expected || 1));
  grid.hidden = stage === "done" || !state.expected;
  grid.style.gridTemplate = `repeat(${side}, 1fr) / repeat(${side}, 1fr)`;
  while (grid.childElementCount > state.codes.length) grid.lastChild.remove();
  state.codes.forEach((code, index) => {
    const cell = grid.children[index] || grid.appendChild(document.createElement("span"));
    cell.style.background = props.colours[code];
  });
}

function chip(text, kind, colour) {
  const made = document.createElement("span");
  made.className = kind;
  made.textContent = text;
  if (colour) {
    const [red, green, blue] = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
    made.style.background = colour;
    made.style.color = 0.3 * red + 0.59 * green + 0.11 * blue > 115 ? "#000" : "#fff";
  }
  return made;
}

function writeTokens(state) {
  const closed = state.expected && state.codes.length === state.expected && ["answer", "done"].includes(stage);
  const codes = state.codes.map((code) => chip(code, "code", props.colours[code]));
  const tokens = find(".tokens");
  tokens.replaceChildren(...state.opening.map((token) => chip(token, "control")), ...codes,
    ...(closed ? [chip("<d_end>", "control")] : []), chip(state.answer, "word"));
  tokens.scrollTop = stage === "done" ? 0 : tokens.scrollHeight;
}

function say(state) {
  const words = { looking: "Looking at the picture", depth: "Writing depth", answer: "Answering", stopped: "Stopped" };
  find(".heard").textContent = stage === "done" ? `Answer: ${state.answer || "no words"}` : words[stage] || "";
}

function picture(selector, url) {
  find(selector).hidden = !url;
  if (url) find(selector).src = url;
}

// Of two questions the later is shown, and of one that was stopped nothing that was still under way.
function outdated(state) {
  return shown && (state.run < shown.run || (state.run === shown.run && shown.stage === "stopped"));
}

function draw() {
  const state = props.value;
  if (!state?.stage || outdated(state)) return;
  const before = state.run === shown?.run ? stage : null;
  shown = state;
  stage = state.stage;
  find(".problem").hidden = stage !== "problem";
  if (stage === "problem") {
    find(".problem").textContent = state.message;
    return show();
  }
  find(".empty").hidden = true;
  find(".seen").hidden = false;
  if (stage === "looking" && before !== "looking") {
    find(".photo").src = state.photo;
    find(".photo").decode().then(show);
  }
  const done = stage === "done";
  picture(".masked", done && find(".switch input").checked && state.masked);
  picture(".depth", done && state.depth);
  values = done && state.values ? { ...state.values, bytes: atob(state.values.data) } : null;
  point.hidden = true;
  find(".controls").hidden = !(done && (state.depth || state.masked));
  find(".between").hidden = find(".legend").hidden = find(".reading").hidden = !(done && state.depth);
  find(".switch").hidden = !(done && state.masked);
  if (done && before !== "done") range.value = 50;
  find(".reading").textContent = "Click the picture, or move over it with the arrow keys, to read the depth of a point.";
  find(".progress").textContent = state.message;
  find(".answer").textContent = done ? state.answer || "(no words)" : state.answer;
  find(".notes").replaceChildren(...(state.notes || []).map((note) => {
    const item = document.createElement("li");
    item.textContent = note;
    return item;
  }));
  wipe();
  fillGrid(state);
  writeTokens(state);
  if (stage !== before) say(state);
  if (done && before !== "done") show();
}

function show() {
  const box = find(".viewer").getBoundingClientRect();
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (box.top > innerHeight * 0.6 || box.top < -100)
    find(".viewer").scrollIntoView({ behavior: calm ? "auto" : "smooth", block: "start" });
}

scene.addEventListener("click", (event) => {
  if (!values) return;
  const box = scene.getBoundingClientRect();
  at = { x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height };
  read();
});
scene.addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Enter: [0, 0] };
  const step = steps[event.key];
  if (!values || !step) return;
  event.preventDefault();
  const size = event.shiftKey ? 0.1 : 0.02, inside = (share) => Math.min(0.999, Math.max(0, share));
  at = { x: inside(at.x + step[0] * size), y: inside(at.y + step[1] * size) };
  read();
});
range.addEventListener("input", wipe);
find(".switch input").addEventListener("change", (event) => {
  find(".masked").hidden = !event.target.checked || !shown.masked;
});
watch("value", draw);
draw();
