// Decoded pixels -> what the image tower takes: the arithmetic of keras_vit.data.pipeline.eval_image, without a canvas's scaling.

// Distance from the sample in source pixels -> weight. Keys's kernel has a = -0.5.
const KERNELS = {
  bilinear: { radius: 1, at: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    radius: 2,
    at: (x) => {
      const d = Math.abs(x);
      if (d >= 2) return 0;
      return d < 1 ? (1.5 * d - 2.5) * d * d + 1 : ((-0.5 * d + 2.5) * d - 4) * d + 2;
    },
  },
};

// For each of `count` positions along an axis of `length` pixels resized to `whole`, of which `corner` are cut off before them:
// the first pixel that counts, and the weights of it and those after it, which add up to 1.
function spans(length, whole, count, corner, kernel, antialias) {
  const step = length / whole;
  const wide = antialias ? Math.max(step, 1) : 1;
  return Array.from({ length: count }, (_, position) => {
    const center = (position + corner + 0.5) * step;
    const first = Math.max(0, Math.ceil(center - kernel.radius * wide - 0.5));
    const last = Math.min(length - 1, Math.floor(center + kernel.radius * wide - 0.5));
    const weights = [];
    for (let i = first; i <= last; i++) weights.push(kernel.at((i + 0.5 - center) / wide));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    return { first, weights: weights.map((weight) => weight / total) };
  });
}

function halfToEven(x) {
  const down = Math.floor(x);
  return x - down === 0.5 ? down + (down % 2) : Math.round(x);
}

function extent(height, width, size, pixels) {
  if (pixels.crop === "squash") return { whole: size, corner: [0, 0] };
  const [high, wide] = size.map((side) => Math.floor(side / pixels.crop_fraction));
  const fits = high * width >= wide * height;
  const whole = fits ? [high, Math.floor((high * width) / height)] : [Math.floor((wide * height) / width), wide];
  return { whole, corner: whole.map((side, axis) => halfToEven((side - size[axis]) / 2)) };
}

/**
 * Resizes, crops and normalises an image.
 *
 * @param {Uint8ClampedArray|Uint8Array} rgba height x width x 4 values, of which the last, alpha, is not read.
 * @param {number} height in pixels. @param {number} width in pixels.
 * @param {[number, number]} size height and width that the model takes.
 * @param {object} pixels `Pixels.asdict()` of the model.
 * @returns {Float32Array} size[0] x size[1] x 3.
 */
export function prepare(rgba, height, width, size, pixels) {
  const kernel = KERNELS[pixels.resize];
  const { whole, corner } = extent(height, width, size, pixels);
  const [rows, columns] = [height, width].map((length, axis) =>
    spans(length, whole[axis], size[axis], corner[axis], kernel, pixels.antialias),
  );
  const level = pixels.antialias ? (value) => Math.min(255, Math.max(0, halfToEven(value))) : (value) => value;
  const resized = new Map(); // number of a source row -> that row at its new width

  function row(y) {
    const made = new Float64Array(3 * columns.length);
    columns.forEach(({ first, weights }, x) => {
      for (let c = 0; c < 3; c++) {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) sum += weights[i] * rgba[4 * (y * width + first + i) + c];
        made[3 * x + c] = level(sum);
      }
    });
    return made;
  }

  const out = new Float32Array(3 * size[0] * size[1]);
  rows.forEach(({ first, weights }, y) => {
    for (const old of resized.keys()) if (old < first) resized.delete(old);
    const sums = new Float64Array(3 * columns.length);
    weights.forEach((weight, i) => {
      if (!resized.has(first + i)) resized.set(first + i, row(first + i));
      resized.get(first + i).forEach((value, x) => (sums[x] += weight * value));
    });
    sums.forEach((sum, x) => {
      const centred = Math.fround(Math.fround(level(sum)) - Math.fround(pixels.mean[x % 3]));
      out[y * sums.length + x] = centred / Math.fround(pixels.std[x % 3]);
    });
  });
  return out;
}
