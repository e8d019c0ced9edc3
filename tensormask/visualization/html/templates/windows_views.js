// The windows explorer: what is shown.

const byId = (id) => document.getElementById(id);

// ---- windows ----

function nearestWindow(level, [y, x]) {
  const along = (pixel, count) => clamp(Math.round(pixel / level.stride), 0, count - 1);
  return [along(y, level.height), along(x, level.width)];
}

function windowBox(level, size, [y, x]) {
  const side = level.sizes[size];
  return [x * level.stride - side / 2, y * level.stride - side / 2, side, side];
}

// Labels and scores of a window, best first.
function classScores(level, size, [y, x]) {
  const number = data.classes.length;
  const scores = data.classes.map((_, label) => {
    const index = ((size * number + label) * level.height + y) * level.width + x;
    return [label, level.scores[index] / 255];
  });
  return scores.sort((a, b) => b[1] - a[1]);
}

const detectionOf = (level, size, [y, x]) => data.detections.find(
  (d) => data.levels[d.level] === level && d.size === size && d.y === y && d.x === x);

// ---- what is shown ----

// The window follows the pixel, unless it is held: then it is the one around `held`.
const state = { level: 0, size: 0, pixel: [0, 0], held: null, overlay: "mask", detection: -1 };
const image = new Image();
const stage = byId("image");

function current() {
  const level = data.levels[state.level];
  const tensor = hasMasks ? level.masks[state.size] : null;
  const unit = level.stride / level.steps;
  const index = nearestWindow(level, state.held || state.pixel);
  const location = tensor && [
    clamp(Math.round(state.pixel[0] / unit), 0, tensor.height - 1),
    clamp(Math.round(state.pixel[1] / unit), 0, tensor.width - 1),
  ];
  const box = windowBox(level, state.size, index);
  return { level, tensor, unit, index, location, box };
}

// As tensormask.visualization.windows.mask_colors: blue, white, red.
function maskColor(probability) {
  const position = probability * (data.colors.length - 1);
  const low = Math.min(Math.floor(position), data.colors.length - 2);
  return data.colors[low].map((c, i) => c + (position - low) * (data.colors[low + 1][i] - c));
}

// A canvas with a pixel a value; `paint` gives [red, green, blue, alpha 0..255].
function toCanvas(values, width, paint) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = values.length / width;
  const pixels = new ImageData(canvas.width, canvas.height);
  values.forEach((value, i) => {
    if (!Number.isNaN(value)) pixels.data.set(paint(value), 4 * i);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

const inMaskColors = (value) => [...maskColor(value), 255];
const green = `rgb(${data.mark.join()})`;

// Draw values as a square of cells, one of them marked.
function drawTile(canvas, values, width, marked) {
  const context = canvas.getContext("2d"), cell = canvas.width / width;
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = false;
  context.drawImage(toCanvas(values, width, inMaskColors), 0, 0, canvas.width, canvas.height);
  if (!marked) return;
  const [row, column] = marked, box = [column * cell - 1, row * cell - 1, cell + 2, cell + 2];
  strokeTwice(context, box, 3, green);
}

function strokeTwice(context, box, width, color) {
  for (const [style, extra] of [["black", 2], [color, 0]]) {
    context.strokeStyle = style;
    context.lineWidth = width + extra;
    context.strokeRect(...box);
  }
}

// At most `limit` evenly spaced numbers of 0 .. side - 1, about the middle.
function sampled(side, limit) {
  const number = Math.min(side, limit);
  return Array.from({ length: number }, (_, i) => Math.floor(((i + 0.5) * side) / number));
}

// Those of a mask's rows, or columns, that are inside of the image.
function rowsInside(start, length, side, extent) {
  const first = clamp(Math.floor((-start * side) / length), 0, side - 1);
  const last = clamp(Math.ceil(((extent - start) * side) / length), first + 1, side);
  return Array.from({ length: last - first }, (_, i) => first + i);
}

function drawMask(context, { level, tensor, index, box }) {
  const [left, top, length] = box, side = maskSide(level, tensor), cell = length / side;
  const rows = rowsInside(top, length, side, data.height);
  const columns = rowsInside(left, length, side, data.width);
  const mask = naturalMask(level, tensor, index, rows, columns);
  const paint = (value) => [255, 40, 60, 130 * value];
  context.drawImage(
    toCanvas(mask, columns.length, paint), left + columns[0] * cell, top + rows[0] * cell,
    columns.length * cell, rows.length * cell);
}

function drawAligned(context, { level, tensor, unit, location }) {
  const view = alignedView(level, tensor, location);
  const length = tensor.side * level.steps * data.upscale * unit;
  context.imageSmoothingEnabled = false;
  context.drawImage(
    toCanvas(view, tensor.side, (value) => [...maskColor(value), 160]),
    location[1] * unit - length / 2, location[0] * unit - length / 2, length, length);
  context.imageSmoothingEnabled = true;
}

function drawScores(context, { level }) {
  const scores = new Float32Array(level.height * level.width);
  for (let y = 0; y < level.height; y++) {
    for (let x = 0; x < level.width; x++) {
      scores[y * level.width + x] = classScores(level, state.size, [y, x])[0][1];
    }
  }
  const paint = (score) => [20 + 235 * score, 20 + 200 * score, 40, 110 + 110 * score];
  const half = level.stride / 2;
  context.imageSmoothingEnabled = false;
  context.drawImage(
    toCanvas(scores, level.width, paint), -half, -half,
    level.width * level.stride, level.height * level.stride);
  context.imageSmoothingEnabled = true;
}

function drawStage(shown) {
  const context = stage.getContext("2d"), scale = stage.width / data.width;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.drawImage(image, 0, 0, data.width, data.height);
  if (state.overlay === "scores") drawScores(context, shown);
  else if (hasMasks && state.overlay === "mask") drawMask(context, shown);
  else if (hasMasks && state.overlay === "aligned") drawAligned(context, shown);
  const thin = stage.width / stage.clientWidth / scale; // a pixel of the screen
  strokeTwice(context, shown.box, 2 * thin, state.held ? "#ffd23f" : "white");
  drawCross(context, thin);
}

// The location; `thin` is the length of a pixel of the canvas.
function drawCross(context, thin) {
  const [y, x] = state.pixel;
  for (const [color, width] of [["black", 5], [green, 2.5]]) {
    context.strokeStyle = color;
    context.lineWidth = width * thin;
    context.beginPath();
    context.moveTo(x - 9 * thin, y);
    context.lineTo(x + 9 * thin, y);
    context.moveTo(x, y - 9 * thin);
    context.lineTo(x, y + 9 * thin);
    context.stroke();
  }
}

const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}\u00a0%`;

function describeWindow({ level, index }) {
  const [y, x] = index, side = level.sizes[state.size];
  return `${level.name}, ${side} px: the window in row ${y} and column ${x} of ` +
    `${level.height} × ${level.width}, centered at pixel x ${x * level.stride}, ` +
    `y ${y * level.stride}; the next is ${level.stride} px away.`;
}

function describeDetection({ level, index }, best) {
  const detection = detectionOf(level, state.size, index);
  if (detection) {
    const name = data.classes[detection.label];
    const rest = data.mask_iou ? " with the expected quality of its mask" : "";
    return `This window is a detection: ${name}, ${percent(detection.score)}${rest}.`;
  }
  if (best <= data.threshold) return `No detection: its score is not above ${percent(data.threshold)}.`;
  const poor = data.mask_iou ? ", or the model expects a poor mask" : "";
  return `No detection: another window has a better score for the same object${poor}.`;
}

// The part of the image in the window, with the mask.
function drawCrop(shown) {
  const canvas = byId("crop"), context = canvas.getContext("2d");
  const [left, top, length] = shown.box, scale = canvas.width / length;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.setTransform(scale, 0, 0, scale, -left * scale, -top * scale);
  context.drawImage(image, 0, 0, data.width, data.height);
  drawMask(context, shown);
  drawCross(context, 1 / scale);
}

function drawViews({ level, tensor, index, location, unit, box }) {
  const [left, top, length] = box, full = maskSide(level, tensor);
  const rows = sampled(full, 128);
  const mask = naturalMask(level, tensor, index, rows, rows);
  const [y, x] = location.map((along) => along * unit);
  const at = [(y - top) / length, (x - left) / length];
  const isInside = at.every((share) => share >= 0 && share < 1);
  const inMask = at.map((share) => Math.floor(share * rows.length));
  drawTile(byId("natural"), mask, rows.length, isInside && inMask);

  const { side } = tensor, view = alignedView(level, tensor, location);
  const alpha = level.steps * data.upscale;
  const cell = location.map((along, axis) =>
    Math.round((level.steps * index[axis] - along) / alpha + (side - 1) / 2));
  const hasCell = cell.every((i) => i >= 0 && i < side);
  drawTile(byId("aligned"), view, side, hasCell && cell);

  byId("natural-shape").textContent = `${full} × ${full} pixels`;
  byId("aligned-shape").textContent = `${side} × ${side} windows`;
  const value = isInside ? percent(mask[inMask[0] * rows.length + inMask[1]]) : "outside";
  const same = hasCell ? percent(view[cell[0] * side + cell[1]]) : "outside";
  byId("natural-value").textContent = value;
  byId("aligned-value").textContent = same;
  byId("natural").setAttribute("aria-label", `Mask of the window; at the location ${value}`);
  byId("aligned").setAttribute("aria-label", `Windows around the location; this window ${same}`);
}

// Of each level and size: the mask and the score of the window around the location.
function drawChoices() {
  data.levels.forEach((level, l) => level.sizes.forEach((_, size) => {
    const index = nearestWindow(level, state.held || state.pixel);
    const [label, score] = classScores(level, size, index)[0];
    const choice = byId(`window-${l}-${size}`).parentElement;
    if (choice.dataset.index === String(index)) return; // it is drawn already
    choice.dataset.index = String(index);
    const name = data.classes.length > 1 && score > 0.05 ? ` ${data.classes[label]}` : "";
    choice.querySelector(".score").textContent = percent(score) + name;
    choice.classList.toggle("fires", score > data.threshold);
    if (!hasMasks) return;
    const tensor = level.masks[size], rows = sampled(maskSide(level, tensor), 30);
    drawTile(
      choice.querySelector("canvas"), naturalMask(level, tensor, index, rows, rows), rows.length);
  }));
}

function drawBars(scores) {
  byId("scores").replaceChildren(...scores.slice(0, 5).map(([label, score]) => {
    const row = document.createElement("li"), bar = document.createElement("span");
    bar.className = "bar";
    bar.style.width = `${100 * score}%`;
    row.append(`${data.classes[label]} ${percent(score)}`, bar);
    return row;
  }));
}

function draw() {
  const shown = current(), scores = classScores(shown.level, state.size, shown.index);
  byId("window").textContent = describeWindow(shown);
  byId("detection").textContent = describeDetection(shown, scores[0][1]);
  byId("hold").setAttribute("aria-pressed", String(state.held !== null));
  byId(`window-${state.level}-${state.size}`).checked = true;
  drawBars(scores);
  drawChoices();
  drawStage(shown);
  if (!hasMasks) return;
  drawCrop(shown);
  drawViews(shown);
}

let isPending = false;
function update() {
  if (isPending) return;
  isPending = true;
  requestAnimationFrame(() => { isPending = false; draw(); });
}
