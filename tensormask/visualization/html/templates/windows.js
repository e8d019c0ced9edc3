// The windows explorer: what the person does.

function moveTo(y, x) {
  state.pixel = [clamp(y, 0, data.height - 1), clamp(x, 0, data.width - 1)];
  update();
}

function hold(isHeld) {
  state.held = isHeld ? [...state.pixel] : null;
  update();
}

function choose(level, size) {
  [state.level, state.size] = [level, size];
  update();
}

function chooseNext(step) {
  const numSizes = data.levels[0].sizes.length, number = numSizes * data.levels.length;
  const next = (state.level * numSizes + state.size + step + number) % number;
  choose(Math.floor(next / numSizes), next % numSizes);
}

function nextDetection(step = 1) {
  const number = data.detections.length;
  if (!number) return;
  state.detection = (Math.max(state.detection, step < 0 ? 0 : -1) + step + number) % number;
  const { level, size, y, x } = data.detections[state.detection], { stride } = data.levels[level];
  state.held = null;
  choose(level, size);
  moveTo(y * stride, x * stride);
}

// For screen readers, after a key or a button; not at each move of a pointer.
function say() {
  const shown = current(), best = classScores(shown.level, state.size, shown.index)[0];
  byId("spoken").textContent = `${describeWindow(shown)} ${data.classes[best[0]]} ` +
    `${percent(best[1])}. ${describeDetection(shown, best[1])}`;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { level, unit } = current(), [y, x] = state.pixel;
  const step = event.shiftKey ? Math.min(unit, level.stride) : level.stride;
  const actions = {
    ArrowUp: () => moveTo(y - step, x),
    ArrowDown: () => moveTo(y + step, x),
    ArrowLeft: () => moveTo(y, x - step),
    ArrowRight: () => moveTo(y, x + step),
    "[": () => chooseNext(-1),
    "]": () => chooseNext(1),
    n: () => nextDetection(),
    Enter: () => hold(!state.held),
    " ": () => hold(!state.held),
    Escape: () => hold(false),
  };
  const action = actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
  say();
}

function start() {
  const scale = Math.max(1, Math.round(1200 / Math.max(data.width, data.height)));
  [stage.width, stage.height] = [data.width * scale, data.height * scale];
  const pointAt = (event) => {
    const box = stage.getBoundingClientRect();
    moveTo(((event.clientY - box.top) * data.height) / box.height,
      ((event.clientX - box.left) * data.width) / box.width);
  };
  stage.addEventListener("pointerdown", (event) => {
    pointAt(event);
    if (event.pointerType === "mouse") hold(!state.held);
    else stage.setPointerCapture(event.pointerId); // a drag moves the location
  });
  stage.addEventListener("pointermove", pointAt);
  stage.addEventListener("pointerleave", () => {
    if (state.held) moveTo(...state.held);
  });
  stage.addEventListener("keydown", onKey);
  byId("hold").addEventListener("click", () => { hold(!state.held); say(); });
  byId("next").addEventListener("click", () => { nextDetection(); say(); });
  byId("choices").addEventListener("change", (event) => {
    choose(...event.target.value.split("-").map(Number));
    say();
  });
  byId("overlays").addEventListener("change", (event) => {
    state.overlay = event.target.value;
    update();
  });
  addEventListener("resize", update);
  if (data.detections.length) nextDetection();
  else moveTo(data.height / 2, data.width / 2);
  byId("status").hidden = true;
  byId("explorer").hidden = false;
  draw();
  document.body.dataset.ready = "yes";
}

image.src = data.image;
Promise.all([image.decode(), unpack()]).then(start).catch((error) => {
  byId("status").textContent = `This browser cannot show the page: ${error}`;
});
