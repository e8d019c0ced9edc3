"use strict";
// The windows explorer, on the data of tensormask/visualization/explorer.py: the tensors.
//
// Lengths are in pixels of the network's input. A tensor (side, side, height, width) is what the
// mask head predicts for the windows of a level and size: side x side values at height x width
// locations, which are level.stride / level.steps pixels apart. Windows are level.steps locations
// apart. docs/representation.md explains the natural and the aligned representation.

const data = JSON.parse(document.getElementById("data").textContent);
const hasMasks = "masks" in data.levels[0];

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpack() {
  for (const level of data.levels) {
    level.scores = await inflate(level.scores);
    for (const tensor of level.masks || []) tensor.codes = await inflate(tensor.codes);
  }
}

// An entry, as a logit. A byte has two codes, the first in its high half.
function logitAt(tensor, v, u, y, x) {
  const index = ((v * tensor.side + u) * tensor.height + y) * tensor.width + x;
  const pair = tensor.codes[index >> 1];
  return data.logits[index & 1 ? pair & 15 : pair >> 4];
}

const sigmoid = (logit) => 1 / (1 + Math.exp(-logit));
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

// The two integers around a position, with the weights of linear interpolation.
function linear(position) {
  const low = Math.floor(position), above = position - low;
  return above ? [[low, 1 - above], [low + 1, above]] : [[low, 1]];
}

// How many times finer the pixels of a mask are than those of the predicted tensor.
const upscaling = (level) => level.steps * data.zoom * data.upscale;
const maskSide = (level, tensor) => Math.round(upscaling(level) * tensor.side);

// Which predicted mask rows a row of the final mask interpolates.
function predictedRows(level, side, row) {
  const center = (row + 0.5) / upscaling(level);
  if (data.upscale_mode === "nearest" && !data.bipyramid) return [[Math.floor(center), 1]];
  const rows = linear(center - 0.5);
  // swap_align2nat reads the padding beyond the border, upscaling repeats the border.
  if (data.bipyramid) return rows.filter(([v]) => v >= 0 && v < side);
  return rows.map(([v, weight]) => [clamp(v, 0, side - 1), weight]);
}

// At which of `extent` locations row `row` of the mask of window number `index` is.
function predictedLocations(level, side, extent, index, row) {
  if (!data.aligned) return [[index, 1]]; // a window predicts its mask at its own location
  const middle = (Math.round(upscaling(level) * side) - 1) / 2;
  const locations = [];
  // data.zoom: the locations are first upsampled.
  for (const [fine, weight] of linear(index * level.steps * data.zoom + row - middle)) {
    if (fine < 0 || fine >= extent * data.zoom) continue;
    for (const [location, share] of linear(fine / data.zoom)) {
      locations.push([Math.min(location, extent - 1), weight * share]);
    }
  }
  return locations;
}

// What a row of a mask reads along one pair of axes: [v, y, weight]. What is missing is padding.
function taps(level, side, extent, index, row) {
  const locations = predictedLocations(level, side, extent, index, row);
  return predictedRows(level, side, row).flatMap(
    ([v, weight]) => locations.map(([y, share]) => [v, y, weight * share]));
}

// The natural view: some rows and columns of the mask of the window (y, x), as probabilities.
function naturalMask(level, tensor, [y, x], rows, columns) {
  const { codes, side, height, width } = tensor, { logits, padding } = data;
  const mask = new Float32Array(rows.length * columns.length);
  // The index of an entry is the sum of two offsets, one of each pair of axes.
  const along = (extent, index, strideV, strideY, row) => taps(level, side, extent, index, row)
    .map(([v, location, weight]) => [v * strideV + location * strideY, weight]);
  const perRow = rows.map((row) => along(height, y, side * height * width, width, row));
  const perColumn = columns.map((column) => along(width, x, height * width, 1, column));
  let i = 0;
  for (const ofRow of perRow) {
    for (const ofColumn of perColumn) {
      let sum = padding;
      for (const [offset, weight] of ofRow) {
        for (const [more, share] of ofColumn) {
          const entry = offset + more, pair = codes[entry >> 1];
          sum += weight * share * (logits[entry & 1 ? pair & 15 : pair >> 4] - padding);
        }
      }
      mask[i++] = sigmoid(sum);
    }
  }
  return mask;
}

// The aligned view: what the windows around a location say about it. Cell (i, j) is the window
// whose center is i rows and j columns from the upper left; NaN: there is no window.
function alignedView(level, tensor, [y, x]) {
  const { side, height, width } = tensor;
  const alpha = level.steps * data.upscale; // locations from one predicted mask row to the next
  const view = new Float32Array(side * side).fill(NaN);
  const isWindow = (position, count) => position >= -0.5 && position <= count - 0.5;
  for (let i = 0; i < side; i++) {
    for (let j = 0; j < side; j++) {
      const v = side - 1 - i, u = side - 1 - j;
      const windowY = y - alpha * (v - (side - 1) / 2), windowX = x - alpha * (u - (side - 1) / 2);
      if (!isWindow(windowY / level.steps, level.height)) continue;
      if (!isWindow(windowX / level.steps, level.width)) continue;
      if (data.aligned) {
        view[i * side + j] = sigmoid(logitAt(tensor, v, u, y, x));
        continue;
      }
      let sum = 0;
      for (const [row, weightY] of linear(windowY)) {
        for (const [column, weightX] of linear(windowX)) {
          const inside = row >= 0 && row < height && column >= 0 && column < width;
          sum += weightY * weightX * (inside ? logitAt(tensor, v, u, row, column) : data.padding);
        }
      }
      view[i * side + j] = sigmoid(sum);
    }
  }
  return view;
}
