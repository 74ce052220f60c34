// Text to tokens: characters, or byte-level BPE (gptlit/tokenizer).

const SHOWN_AS = new Map([['\n', '↵'], [' ', '␣'], ['\t', '⇥'], ['\r', '␍']]);

/** A text as a label: white space visible, marks on a dotted circle, control characters by number. */
function visible(text) {
  return Array.from(text, (character) => {
    if (SHOWN_AS.has(character)) return SHOWN_AS.get(character);
    if (/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Zs}\p{Co}\p{Cn}]/u.test(character)) {
      return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}`;
    }
    return /\p{M}/u.test(character) ? `◌${character}` : character;
  }).join('');
}

/** One token for each character. */
class CharTokenizer {
  constructor({ symbols }) {
    this.symbols = Array.from(symbols);
    this.ids = new Map(this.symbols.map((symbol, id) => [symbol, id]));
    this.characters = new Uint32Array(this.symbols.length).fill(1); // in each token
  }

  /** Tokens {id, start, end} of a text, in UTF-16 units; characters that the vocabulary lacks have id -1. */
  encode(text) {
    let at = 0;
    return Array.from(text, (character) => ({ id: this.ids.get(character) ?? -1, start: at, end: (at += character.length) }));
  }

  label(id) {
    return visible(this.symbols[id]);
  }

  /** The text of one token after others, as it arrives. */
  decoder() {
    return (id) => this.symbols[id];
  }
}

/** Byte-level byte-pair encoding. */
class BPETokenizer {
  constructor({ words, tokens, merges, added }) {
    this.pattern = new RegExp(words, 'gu');
    this.bytes = tokens.map((hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16)));
    this.key = (bytes) => String.fromCharCode(...bytes);
    const special = new Set(added);
    this.ids = new Map();
    this.bytes.forEach((bytes, id) => special.has(id) || this.ids.set(this.key(bytes), id));
    this.ranks = new Map(merges.map(([left, right], rank) => [left * tokens.length + right, rank]));
    this.merged = merges.map(([left, right]) => this.ids.get(this.key(this.bytes[left]) + this.key(this.bytes[right])));
    this.characters = Uint32Array.from(this.bytes, (bytes) => bytes.reduce((n, byte) => n + ((byte & 0xc0) !== 0x80), 0));
    const decoder = new TextDecoder();
    this.added = new Map(added.map((id) => [decoder.decode(this.bytes[id]), id]));
    const longestFirst = [...this.added.keys()].sort((a, b) => b.length - a.length);
    const escaped = longestFirst.map((text) => text.replace(/[\\^$.*+?()[\]{}|/-]/g, '\\$&'));
    this.split = escaped.length ? new RegExp(`(${escaped.join('|')})`, 'u') : null;
    this.known = new Map(); // ids of the words met so far
  }

  encode(text) {
    const ids = [];
    for (const part of this.split ? text.split(this.split) : [text]) {
      if (this.added.has(part)) ids.push(this.added.get(part));
      else for (const [word] of part.matchAll(this.pattern)) ids.push(...this.wordIds(word));
    }
    return this.withOffsets(ids, text);
  }

  wordIds(word) {
    if (!this.known.has(word)) this.known.set(word, this.merge(new TextEncoder().encode(word)));
    return this.known.get(word);
  }

  /** Joins the pair that was learned first, until none is left. */
  merge(bytes) {
    const ids = Array.from(bytes, (byte) => this.ids.get(String.fromCharCode(byte)));
    for (;;) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < ids.length; i++) {
        const rank = this.ranks.get(ids[i] * this.bytes.length + ids[i + 1]) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return ids;
      ids.splice(at, 2, this.merged[best]);
    }
  }

  /** A token that ends inside of a character covers no UTF-16 units of it; the one that ends the character has them. */
  withOffsets(ids, text) {
    const ends = []; // UTF-16 offset after each byte of the text
    let at = 0;
    for (const character of text) {
      const count = new TextEncoder().encode(character).length;
      for (let i = 1; i < count; i++) ends.push(at);
      ends.push((at += character.length));
    }
    let byte = 0, start = 0;
    return ids.map((id) => {
      byte += this.bytes[id].length;
      const token = { id, start, end: byte ? ends[byte - 1] : 0 };
      start = token.end;
      return token;
    });
  }

  label(id) {
    const bytes = this.bytes[id];
    try {
      return visible(new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)) || '∅';
    } catch {
      return Array.from(bytes, (byte) => byte.toString(16).toUpperCase().padStart(2, '0')).join('·');
    }
  }

  decoder() {
    const decoder = new TextDecoder('utf-8', { ignoreBOM: true });
    return (id) => decoder.decode(this.bytes[id], { stream: true });
  }
}

function makeTokenizer(spec) {
  return spec.kind === 'char' ? new CharTokenizer(spec) : new BPETokenizer(spec);
}
