// What a model says of a text while it reads it, token by token: probabilities, surprise, attention.
// Beyond `block_size` the context rolls, as `gptlit.generation.generate(context="rolling")` has it: when the window is
// full, its newest half is read again, and grows again. A sampler begins with a window of its own, the newest tokens.

const ATTENTION_NUMBERS = 2 ** 24; // attention weights that a reading keeps, 64 MiB; older ones go first

/** log softmax(logits) in nats. */
function logSoftmax(logits) {
  let largest = -Infinity, total = 0;
  for (const value of logits) largest = Math.max(largest, value);
  for (const value of logits) total += Math.exp(value - largest);
  const shift = largest + Math.log(total);
  return logits.map((value) => value - shift);
}

/** A text that a model has read: one entry of `states`, `surprises` and `ranks` for each token. */
class Reading {
  constructor(model) {
    this.model = model;
    this.cache = new Cache(model);
    this.half = Math.max(Math.floor(model.T / 2), 1);
    this.ids = [];
    this.states = []; // residual stream (C,) after the last norm, at the token
    this.surprises = []; // -log2 p(token | those before it); null for the first
    this.ranks = []; // 1 for the most probable token; null for the first
    this.starts = []; // first token of the window in which the token was read
    this.offGrid = Infinity; // first token that was read in a window of a sampler
    this.attention = []; // {start, weights (L, H, count)}: of the token over tokens start … start + count - 1
    this.oldest = 0; // first token whose attention is kept
    this.numbers = 0;
    this.latest = null; // [state, logits] that were asked for last
  }

  get length() {
    return this.ids.length;
  }

  /** Reads the newest token, whose window is in the cache. */
  readNewest() {
    const { model, cache } = this, newest = this.length - 1, start = newest - cache.length;
    const weights = new Float32Array(model.L * model.H * (cache.length + 1));
    this.states[newest] = cache.forward(this.ids[newest], weights);
    this.numbers += weights.length - (this.attention[newest]?.weights.length ?? 0);
    this.attention[newest] = { start, weights };
    this.starts[newest] = start;
  }

  /** Reads one more token. */
  push(id) {
    const { model, cache } = this;
    if (this.length) {
      const logs = logSoftmax(this.logits(this.length - 1));
      this.surprises.push(-logs[id] / Math.LN2);
      this.ranks.push(logs.reduce((rank, value) => rank + (value > logs[id]), 1));
    } else {
      this.surprises.push(null);
      this.ranks.push(null);
    }
    this.ids.push(id);
    if (cache.length === model.T) this.rewind(this.length - this.half);
    this.readNewest();
    while (this.numbers > ATTENTION_NUMBERS && this.oldest < this.length - 1) {
      this.numbers -= this.attention[this.oldest].weights.length;
      this.attention[this.oldest++] = null;
    }
  }

  /** Fills the cache with tokens `start` … of those read, without the newest one. */
  rewind(start, end = this.length - 1) {
    this.cache.length = 0;
    for (let i = start; i < end; i++) this.cache.forward(this.ids[i]);
  }

  /** Begins a window with the newest tokens, as many as it holds, as `generate` does with its prompt. */
  beginWindow() {
    const start = Math.max(this.length - this.model.T, 0);
    if (start === this.length - this.cache.length) return;
    this.offGrid = Math.min(this.offGrid, this.length - 1);
    this.rewind(start);
    this.readNewest();
  }

  /** Forgets what was read in windows of a sampler, which depend on where it began. */
  forgetSamples() {
    this.truncate(this.offGrid);
  }

  /** Forgets all but the first `count` tokens. */
  truncate(count) {
    if (count >= this.length) return;
    if (count <= this.offGrid) this.offGrid = Infinity;
    const start = this.length - this.cache.length, wanted = count ? this.starts[count - 1] : 0;
    for (const list of [this.ids, this.states, this.surprises, this.ranks, this.starts]) list.length = count;
    for (const kept of this.attention.splice(count)) this.numbers -= kept ? kept.weights.length : 0;
    this.oldest = Math.min(this.oldest, count);
    if (wanted === start) this.cache.length = count - start;
    else this.rewind(wanted, count);
  }

  /** Logits (V,) after token `index`. */
  logits(index) {
    if (this.latest?.[0] !== this.states[index]) this.latest = [this.states[index], this.model.logits(this.states[index])];
    return this.latest[1];
  }

  /** Bits of the tokens from the second on, and how many characters they are. */
  total(characters) {
    let bits = 0, count = 0;
    for (let i = 1; i < this.length; i++) {
      bits += this.surprises[i];
      count += characters[this.ids[i]];
    }
    return { bits, characters: count };
  }

  /** Attention (count,) of token `index` in one head, and the first token it covers; null when it is not kept. */
  row(index, layer, head) {
    const kept = this.attention[index];
    if (!kept || !this.model.L) return null;
    const count = index + 1 - kept.start, at = (layer * this.model.H + head) * count;
    return { start: kept.start, weights: kept.weights.subarray(at, at + count) };
  }
}
