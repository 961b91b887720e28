// Embeddings -> what is shown.

/**
 * Probabilities of labels: softmax over them, or of a model with a bias one by one.
 *
 * @param {Float32Array} image unit embedding.
 * @param {Float32Array[]} texts unit embeddings, one of each label.
 * @param {{temperature: number, bias: ?number}} model
 * @returns {number[]}
 */
export function probabilities(image, texts, { temperature, bias }) {
  const logits = texts.map((text) => temperature * text.reduce((sum, value, i) => sum + value * image[i], 0));
  if (bias !== null) return logits.map((logit) => 1 / (1 + Math.exp(-logit - bias)));
  const most = Math.max(...logits);
  const powers = logits.map((logit) => Math.exp(logit - most));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}

/**
 * A text area's labels: one a line, outer spaces and empty lines left out, each once.
 *
 * @param {string} text @param {number} most how many are kept.
 * @returns {{labels: string[], left: number}} `left` counts the others.
 */
export function parseLabels(text, most) {
  const found = [...new Set(text.split(/\r?\n/).map((line) => line.trim()).filter(Boolean))];
  return { labels: found.slice(0, most), left: Math.max(0, found.length - most) };
}

/** A prompt template around a label; null if the template has no place for it. */
export function prompted(template, label) {
  const trimmed = template.trim();
  if (!trimmed) return label;
  return trimmed.includes("{}") ? trimmed.replaceAll("{}", () => label) : null;
}
