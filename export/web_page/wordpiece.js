// BERT's WordPiece: words in lower case without accents, each split into the longest pieces of the vocabulary.

const WORD_BYTES = 100; // of UTF-8, above which a word is not looked into
const PAD = 0;
const encoder = new TextEncoder();
const IGNORED = /\p{Default_Ignorable_Code_Point}/u, MARKS = /\p{Mn}/gu, CONTROLS = /[\p{Cc}\p{Cf}]/gu;
const CHINESE = "\u4e00-\u9fff\u3400-\u4dbf\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}\u{2b820}-\u{2ceaf}\uf900-\ufaff\u{2f800}-\u{2fa1f}";
const ALONE = `!-/:-@\\[-\`{-~\\p{P}${CHINESE}`;
const SINGLE = new RegExp(`^[${ALONE}]$`, "u"), WORDS = new RegExp(`[${ALONE}]|[^ ${ALONE}]+`, "gu");

// Unicode's full case folding, which JavaScript lacks; Cherokee folds to capitals, and the dotless i to itself.
function casefold(text) {
  const one = (character) => {
    if (character === "\u0131") return character;
    return /[\u13a0-\u13fd\uab70-\uabbf]/.test(character) ? character.toUpperCase() : character.toUpperCase().toLowerCase();
  };
  return [...text].map(one).map((folded) => [...folded].map(one).join("")).join("");
}

/** NFKC_Casefold of one character, then NFD without marks; characters that separate words become spaces. */
export function fold(character) {
  if (IGNORED.test(character)) return "";
  const folded = casefold(casefold(character.normalize("NFKC")).normalize("NFKC")).normalize("NFKC");
  return folded.normalize("NFD").replace(MARKS, "").replace(CONTROLS, " ");
}

/** Whether a character is a word of its own. */
export const standsAlone = (character) => SINGLE.test(character);

export class WordPiece {
  /** @param {{length: number, vocabulary: string}} record of the Python tokenizer's `to_dict`; a word on each line. */
  constructor({ length, vocabulary }) {
    const words = vocabulary.split("\n").map((line) => line.replace(/\r$/, ""));
    if (!words.at(-1)) words.pop();
    this.length = length;
    this.ids = new Map(words.map((word, id) => [word, id]));
    [this.first, this.unknown] = [this.ids.get("[CLS]"), this.ids.get("[UNK]")];
    this.longest = words.reduce((most, word) => Math.max(most, [...word].length), 0);
    this.folds = new Map();
  }

  normalize(text) {
    let made = "";
    for (const character of text.toWellFormed?.() ?? text) {
      if (!this.folds.has(character)) this.folds.set(character, fold(character));
      made += this.folds.get(character);
    }
    return made;
  }

  pieces(word) {
    if (encoder.encode(word).length > WORD_BYTES) return [this.unknown];
    const letters = [...word], found = [];
    for (let start = 0; start < letters.length; ) {
      let end = Math.min(letters.length, start + this.longest), id;
      for (; end > start; end--) {
        id = this.ids.get((start ? "##" : "") + letters.slice(start, end).join(""));
        if (id !== undefined) break;
      }
      if (id === undefined) return [this.unknown];
      found.push(id);
      start = end;
    }
    return found;
  }

  /**
   * A text's row: [CLS], then its ids, cut or filled up with zeros.
   *
   * @returns {{ids: Int32Array, cut: boolean, unknown: boolean}}
   */
  encode(text) {
    const ids = [this.first];
    for (const [word] of this.normalize(text).matchAll(WORDS)) {
      ids.push(...this.pieces(word));
      if (ids.length > this.length) break;
    }
    const row = new Int32Array(this.length).fill(PAD);
    row.set(ids.slice(0, this.length));
    return { ids: row, cut: ids.length > this.length, unknown: ids.includes(this.unknown) };
  }
}
