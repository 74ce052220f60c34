// How the next token is chosen: gptlit/generation/generate.py (`distribution`, `draw`, `uniform_numbers`).

/**
 * The distribution (V,) that the next token is drawn from.
 * @param {Float64Array} logits
 * @param {{temperature: number, topK: number|null, topP: number|null, minP: number|null}} settings
 */
function distribution(logits, { temperature, topK, topP, minP }) {
  const best = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
  if (temperature === 0) return new Float64Array(logits.length).fill(1, best, best + 1);
  let kept = Float64Array.from(logits);
  if (topK && topK < logits.length) {
    const last = Float64Array.from(logits).sort()[logits.length - topK];
    kept = kept.map((value) => (value < last ? -Infinity : value));
  }
  let p = kept.map((value) => Math.exp((value - logits[best]) / temperature));
  const normalise = () => {
    const total = p.reduce((a, b) => a + b, 0);
    p = p.map((value) => value / total);
  };
  normalise();
  if (topP && topP < 1) {
    const order = Array.from(p.keys()).sort((a, b) => p[b] - p[a] || a - b);
    let before = 0;
    for (const id of order) {
      const mass = p[id];
      if (before >= topP) p[id] = 0;
      before += mass;
    }
  }
  if (minP) {
    const least = minP * p.reduce((a, b) => Math.max(a, b));
    p = p.map((value) => (value < least ? 0 : value));
  }
  if (topP || minP) normalise();
  return p;
}

/** The token that a number from [0, 1) picks: the inverse of the cumulative distribution. */
function draw(probabilities, uniform) {
  const target = uniform * probabilities.reduce((a, b) => a + b, 0);
  let sum = 0, last = 0;
  for (let id = 0; id < probabilities.length; id++) {
    if (probabilities[id] > 0) last = id;
    if ((sum += probabilities[id]) > target) return id;
  }
  return last;
}

/** ⌊value^(1/n)⌋ of BigInt. */
function integerRoot(value, n) {
  let low = 0n, high = 1n << (BigInt(value.toString(2).length) / n + 1n);
  while (low < high) {
    const middle = (low + high + 1n) >> 1n;
    if (middle ** n <= value) low = middle;
    else high = middle - 1n;
  }
  return low;
}

/** SHA-512 (FIPS 180-4) of bytes, as 64 bytes. */
function sha512(bytes) {
  const mask = (1n << 64n) - 1n;
  const primes = [];
  for (let n = 2; primes.length < 80; n++) if (primes.every((prime) => n % prime)) primes.push(n);
  // The first 64 bits of the fractional parts of the square and cube roots of the primes.
  const fraction = (prime, n) => integerRoot(BigInt(prime) << (64n * n), n) & mask;
  const k = primes.map((prime) => fraction(prime, 3n));
  const state = primes.slice(0, 8).map((prime) => fraction(prime, 2n));
  const padded = new Uint8Array(Math.ceil((bytes.length + 17) / 128) * 128);
  padded.set(bytes);
  padded[bytes.length] = 0x80;
  const view = new DataView(padded.buffer);
  view.setBigUint64(padded.length - 8, BigInt(bytes.length) * 8n);
  const turn = (x, n) => ((x >> n) | (x << (64n - n))) & mask;
  for (let start = 0; start < padded.length; start += 128) {
    const w = Array.from({ length: 16 }, (_, i) => view.getBigUint64(start + 8 * i));
    for (let i = 16; i < 80; i++) {
      const s0 = turn(w[i - 15], 1n) ^ turn(w[i - 15], 8n) ^ (w[i - 15] >> 7n);
      const s1 = turn(w[i - 2], 19n) ^ turn(w[i - 2], 61n) ^ (w[i - 2] >> 6n);
      w.push((w[i - 16] + s0 + w[i - 7] + s1) & mask);
    }
    let [a, b, c, d, e, f, g, h] = state;
    for (let i = 0; i < 80; i++) {
      const s1 = turn(e, 14n) ^ turn(e, 18n) ^ turn(e, 41n);
      const first = h + s1 + ((e & f) ^ (~e & mask & g)) + k[i] + w[i];
      const s0 = turn(a, 28n) ^ turn(a, 34n) ^ turn(a, 39n);
      const second = s0 + ((a & b) ^ (a & c) ^ (b & c));
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + first) & mask, c, b, a, (first + second) & mask];
    }
    [a, b, c, d, e, f, g, h].forEach((value, i) => (state[i] = (state[i] + value) & mask));
  }
  const digest = new DataView(new ArrayBuffer(64));
  state.forEach((value, i) => digest.setBigUint64(8 * i, value));
  return new Uint8Array(digest.buffer);
}

/**
 * Python's `random.Random(text)`: the Mersenne Twister MT19937 (Matsumoto & Nishimura 1998), seeded with the bytes of
 * the text followed by their SHA-512. The numbers are those of `gptlit predict`, so a seed gives the same text there.
 */
class PythonRandom {
  constructor(text) {
    const bytes = new TextEncoder().encode(text);
    const all = [...bytes, ...sha512(bytes)].reverse(); // a big-endian integer, as little-endian words
    const key = [];
    for (let i = 0; i < all.length; i += 4) {
      key.push(((all[i] ?? 0) | ((all[i + 1] ?? 0) << 8) | ((all[i + 2] ?? 0) << 16) | ((all[i + 3] ?? 0) << 24)) >>> 0);
    }
    while (key.length > 1 && key.at(-1) === 0) key.pop();
    this.state = new Uint32Array(624);
    this.seed(key);
  }

  seed(key) {
    const { state } = this;
    const mixed = (i, factor) => Math.imul(state[i] ^ (state[i] >>> 30), factor);
    state[0] = 19650218;
    for (let i = 1; i < 624; i++) state[i] = mixed(i - 1, 1812433253) + i;
    let i = 1;
    const next = () => {
      if (++i > 623) [state[0], i] = [state[623], 1];
    };
    for (let step = 0; step < Math.max(624, key.length); step++, next()) {
      const j = step % key.length;
      state[i] = (state[i] ^ mixed(i - 1, 1664525)) + key[j] + j;
    }
    for (let step = 0; step < 623; step++, next()) state[i] = (state[i] ^ mixed(i - 1, 1566083941)) - i;
    state[0] = 0x80000000;
    this.index = 624;
  }

  word() {
    const { state } = this;
    if (this.index === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      this.index = 0;
    }
    let y = state[this.index++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  /** A number from [0, 1) with 53 random bits. */
  random() {
    return ((this.word() >>> 5) * 67108864 + (this.word() >>> 6)) / 9007199254740992;
  }
}
