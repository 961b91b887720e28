// A SentencePiece unigram model: the pieces that the library `sentencepiece` finds, from the same normalisation rules and scores.

const SPACE = "\u2581"; // stands for " " in pieces
const NORMAL = 1, UNKNOWN = 2, USER_DEFINED = 4; // kinds of pieces in a model file
const UNKNOWN_PENALTY = 10; // below the lowest score
const SMALLEST = 2 ** -126; // the least that the highest score counts for own symbols: float32's smallest normal number
const encoder = new TextEncoder(), decoder = new TextDecoder("utf-8", { ignoreBOM: true });

// A protocol buffer's fields: Map of number -> [value, ...], bytes where they have a length.
function fields(bytes) {
  const found = new Map(), view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 0;
  const varint = () => {
    let value = 0, place = 1;
    for (;;) {
      const byte = bytes[at++];
      value += (byte & 0x7f) * place;
      place *= 128;
      if (!(byte & 0x80)) return value;
    }
  };
  const skip = (count) => ((at += count), at - count);
  while (at < bytes.length) {
    const key = varint(), wire = key & 7;
    let value;
    if (wire === 0) value = varint();
    else if (wire === 1) value = view.getFloat64(skip(8), true);
    else if (wire === 5) value = view.getFloat32(skip(4), true);
    else if (wire === 2) value = bytes.subarray(skip(varint()), at);
    else throw new Error(`the vocabulary has a field of an unknown kind, ${wire}`);
    if (!found.has(key >>> 3)) found.set(key >>> 3, []);
    found.get(key >>> 3).push(value);
  }
  return found;
}

// The rules that a model file carries: a double array, which is a tree of bytes, and the texts that its leaves point into.
class Rules {
  constructor(bytes) {
    bytes = bytes.slice(); // its own buffer, which begins where it does
    const view = new DataView(bytes.buffer), size = view.getUint32(0, true);
    this.units = Uint32Array.from({ length: size / 4 }, (_, i) => view.getUint32(4 + 4 * i, true));
    this.texts = bytes.subarray(4 + size);
  }

  // The longest rule for what stands at `start`: [what takes its place, how many bytes it takes], or null.
  longest(bytes, start) {
    const offset = (unit) => (unit >>> 10) << ((unit & 0x200) >>> 6);
    let found = null, place = offset(this.units[0]);
    for (let i = start; i < bytes.length; i++) {
      place ^= bytes[i];
      const unit = this.units[place];
      if (unit === undefined || (unit & 0x800000ff) !== bytes[i]) break;
      place ^= offset(unit);
      if (unit & 0x100) found = [this.units[place] & 0x7fffffff, i + 1 - start];
    }
    if (!found) return null;
    const [from, length] = found;
    return [decoder.decode(this.texts.subarray(from, this.texts.indexOf(0, from))), length];
  }
}

export class SentencePiece {
  /** @param {{length: number, vocabulary: string}} record of the Python tokenizer's `to_dict`; base64 of a ModelProto. */
  constructor({ length, vocabulary }) {
    const model = fields(Uint8Array.from(atob(vocabulary), (letter) => letter.charCodeAt(0)));
    const normalizer = fields(model.get(3)?.[0] ?? new Uint8Array());
    const flag = (number) => Boolean(normalizer.get(number)?.at(-1) ?? 1);
    const rules = normalizer.get(2)?.at(-1);
    this.length = length;
    this.rules = rules?.length ? new Rules(rules) : null;
    [this.prefix, this.tidy] = [flag(3), flag(4)];
    this.pieces = model.get(1).map((bytes) => {
      const piece = fields(bytes);
      return { text: decoder.decode(piece.get(1)[0]), score: piece.get(2)?.[0] ?? 0, kind: piece.get(3)?.[0] ?? NORMAL };
    });
    this.end = this.pieces.findIndex(({ text }) => text === "</s>");
    this.unknown = this.pieces.findIndex(({ kind }) => kind === UNKNOWN);
    const scores = this.pieces.filter(({ kind }) => kind === NORMAL).map(({ score }) => score);
    const highest = scores.reduce((a, b) => Math.max(a, b), SMALLEST);
    this.unknownScore = Math.fround(scores.reduce((a, b) => Math.min(a, b)) - UNKNOWN_PENALTY);
    this.own = [];
    this.ids = new Map();
    this.longest = 0; // characters
    this.pieces.forEach((piece, id) => {
      if (piece.kind !== NORMAL && piece.kind !== USER_DEFINED) return;
      if (piece.kind === USER_DEFINED) {
        this.own.push(piece.text);
        piece.score = Math.fround(encoder.encode(piece.text).length) * highest - 0.1;
      }
      this.ids.set(piece.text, id);
      this.longest = Math.max(this.longest, [...piece.text].length);
    });
    this.own.sort((a, b) => b.length - a.length);
  }

  normalize(text) {
    const bytes = encoder.encode(text);
    const parts = []; // what each stretch becomes
    for (let at = 0; at < bytes.length; ) {
      const [part, taken] = this.next(bytes, at);
      parts.push(part);
      at += taken;
    }
    if (this.tidy) while (parts[0] === " ") parts.shift();
    if (!parts.length) return "";
    let made = this.prefix ? SPACE : "", afterSpace = this.tidy;
    for (let part of parts) {
      if (afterSpace) part = part.replace(/^ +/, "");
      if (!part) continue;
      made += part.replaceAll(" ", SPACE);
      afterSpace = this.tidy && part.endsWith(" ");
    }
    if (this.tidy) while (made.endsWith(SPACE)) made = made.slice(0, -1);
    return made;
  }

  next(bytes, at) {
    const rest = this.own.length ? decoder.decode(bytes.subarray(at)) : "";
    const own = this.own.find((text) => rest.startsWith(text));
    if (own) return [own, encoder.encode(own).length];
    const rule = this.rules && this.rules.longest(bytes, at);
    if (rule) return rule;
    const lead = bytes[at], length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    return [decoder.decode(bytes.subarray(at, at + length)), length];
  }

  // Ids of the likeliest pieces of a normalised text, by Viterbi's algorithm; sums are float32 as in the library.
  split(text) {
    const letters = [...text];
    const best = [{ score: 0 }, ...letters.map(() => null)];
    const offer = (end, start, id, score) => {
      if (!best[end] || score > best[end].score) best[end] = { start, id, score: Math.fround(score) };
    };
    for (let start = 0; start < letters.length; start++) {
      const before = best[start].score;
      let piece = "", single = false;
      for (let end = start + 1; end <= Math.min(letters.length, start + this.longest); end++) {
        piece += letters[end - 1];
        const id = this.ids.get(piece);
        if (id === undefined) continue;
        offer(end, start, id, before + this.pieces[id].score);
        single ||= end === start + 1;
      }
      if (!single) offer(start + 1, start, this.unknown, Math.fround(before + this.unknownScore));
    }
    const found = [];
    for (let end = letters.length; end > 0; end = best[end].start) {
      const { id } = best[end];
      if (id !== this.unknown || found.at(-1) !== id) found.push(id); // a run of unknown characters is one piece
    }
    return found.reverse();
  }

  /**
   * A text's row: its ids, cut, then the end's to the full length, at least one.
   *
   * @returns {{ids: Int32Array, cut: boolean, unknown: boolean}}
   */
  encode(text) {
    const ids = this.split(this.normalize(text));
    const row = new Int32Array(this.length).fill(this.end);
    row.set(ids.slice(0, this.length - 1));
    return { ids: row, cut: ids.length > this.length - 1, unknown: ids.includes(this.unknown) };
  }
}
