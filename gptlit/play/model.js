// The forward pass of gptlit/model/gpt.py for one token at a time, with a KV cache. Names as in that file:
// C = n_embd channels, H heads of D = C / H channels, L layers, V = vocab_size tokens.
// Weights are float32; sums and activations are float64.

const RMS_NORM_EPS = 1e-6;
const LAYER_NORM_EPS = 1e-5;

/** Bytes of base64 text. */
function decodeBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** IEEE 754 half-precision numbers (Uint16Array) as a Float32Array. */
function fromFloat16(halves) {
  const numbers = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) {
    const exponent = (halves[i] >> 10) & 31, fraction = halves[i] & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : fraction * 2 ** -24;
    numbers[i] = halves[i] & 0x8000 ? -size : size;
  }
  return numbers;
}

/** out[i] = Σ_j weight[i, j] · x[j] (+ bias[i]); weight is (rows, columns), row-major. Eight rows share a read of x[j]. */
function matvec(out, weight, x, bias) {
  const rows = out.length, n = x.length;
  let i = 0;
  for (; i + 8 <= rows; i += 8) {
    let a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
    for (let j = 0, at = i * n; j < n; j++, at++) {
      const value = x[j];
      a += weight[at] * value;
      b += weight[at + n] * value;
      c += weight[at + 2 * n] * value;
      d += weight[at + 3 * n] * value;
      e += weight[at + 4 * n] * value;
      f += weight[at + 5 * n] * value;
      g += weight[at + 6 * n] * value;
      h += weight[at + 7 * n] * value;
    }
    [out[i], out[i + 1], out[i + 2], out[i + 3]] = [a, b, c, d];
    [out[i + 4], out[i + 5], out[i + 6], out[i + 7]] = [e, f, g, h];
  }
  for (; i < rows; i++) {
    let sum = 0;
    for (let j = 0, at = i * n; j < n; j++, at++) sum += weight[at] * x[j];
    out[i] = sum;
  }
  if (bias) for (i = 0; i < rows; i++) out[i] += bias[i];
}

/** x[from … from + size) divided by its root mean square, in place. */
function rmsNorm(x, from = 0, size = x.length) {
  let squares = 0;
  for (let i = from; i < from + size; i++) squares += x[i] * x[i];
  const factor = 1 / Math.sqrt(squares / size + RMS_NORM_EPS);
  for (let i = from; i < from + size; i++) x[i] *= factor;
}

function layerNorm(x, weight, bias) {
  let mean = 0, variance = 0;
  for (const value of x) mean += value / x.length;
  for (const value of x) variance += (value - mean) ** 2 / x.length;
  const factor = 1 / Math.sqrt(variance + LAYER_NORM_EPS);
  for (let i = 0; i < x.length; i++) x[i] = (x[i] - mean) * factor * weight[i] + (bias ? bias[i] : 0);
}

/** The error function: 2/√π · exp(-x²) · Σ 2ⁿ x²ⁿ⁺¹ / (2n+1)!!, the series whose terms all have one sign. */
function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x, sum = x;
  for (let n = 1; Math.abs(term) > 1e-17 * Math.abs(sum); n++) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

const ACTIVATIONS = {
  relu: (x) => Math.max(x, 0),
  relu2: (x) => Math.max(x, 0) ** 2,
  gelu: (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
};

/** A GPT: its configuration, its weights by name, and its cosines and sines of rotary embedding. */
class Model {
  /**
   * @param {object} spec - what `gptlit.play.pack` wrote: name, config, dtype, tensors [[name, size], …], tokenizer.
   * @param {string} base64 - the tensors one after the other, little-endian.
   */
  constructor(spec, base64) {
    Object.assign(this, spec);
    const bytes = decodeBase64(base64);
    const half = spec.dtype === 'float16';
    const all = half ? fromFloat16(new Uint16Array(bytes.buffer)) : new Float32Array(bytes.buffer);
    this.weights = {};
    let at = 0;
    for (const [name, size] of spec.tensors) this.weights[name] = all.subarray(at, (at += size));
    if (at !== all.length) throw new Error(`${spec.name}: ${all.length} weights where ${at} belong`);
    const { n_embd: C, n_head: H, n_layer: L, block_size: T, mlp_ratio, token_shift, position } = spec.config;
    Object.assign(this, { C, H, L, T, D: C / H, hidden: mlp_ratio * C, V: spec.config.vocab_size });
    this.shifted = Math.floor(C / 4) * token_shift; // channels of an MLP's input that come from earlier positions
    this.blocks = Array.from({ length: L }, (_, layer) => this.blockWeights(`transformer.h.${layer}.`));
    this.head = this.weights['lm_head.weight'] ?? this.weights['transformer.wte.weight'];
    this.rotation = position === 'rope' && L ? this.rotations() : null;
  }

  blockWeights(prefix) {
    const get = (name) => this.weights[`${prefix}${name}`];
    const names = ['ln_1', 'attn.c_attn', 'attn.c_proj', 'ln_2', 'mlp.c_fc', 'mlp.c_proj'];
    return Object.fromEntries(names.map((name) => [name, { weight: get(`${name}.weight`), bias: get(`${name}.bias`) }]));
  }

  /** Cosines and sines (T, D / 2) of the angles p·base^(-2i/D), rounded to float32 like those of the model. */
  rotations() {
    const half = this.D / 2, cos = new Float32Array(this.T * half), sin = new Float32Array(this.T * half);
    for (let p = 0; p < this.T; p++) {
      for (let i = 0; i < half; i++) {
        const angle = p * this.config.rope_base ** ((2 * i) / -this.D);
        cos[p * half + i] = Math.cos(angle);
        sin[p * half + i] = Math.sin(angle);
      }
    }
    return { cos, sin };
  }

  /** The normalisation before attention, MLP or head, in place. */
  norm(x, { weight, bias }) {
    if (this.config.norm === 'layernorm') layerNorm(x, weight, bias);
    else if (this.config.norm === 'rmsnorm') rmsNorm(x);
  }

  /** Logits (V,) of the residual stream (C,) after the last norm. */
  logits(x) {
    const logits = new Float64Array(this.V), cap = this.config.logit_softcap;
    matvec(logits, this.head, x, this.weights['lm_head.bias']);
    if (cap !== null) for (let i = 0; i < this.V; i++) logits[i] = cap * Math.tanh(logits[i] / cap);
    return logits;
  }

  /** Logits after one token alone, at a position: a row of the table that a model without layers is. */
  row(id, position = 0) {
    return this.logits(new Cache(this).forward(id, null, position));
  }
}

/** Keys, values and MLP inputs of the positions of one window, at most `block_size`. */
class Cache {
  constructor(model) {
    this.model = model;
    const { L, T, C, H, D, hidden, shifted } = model;
    const perLayer = (size) => Array.from({ length: L }, () => new Float32Array(size));
    this.keys = perLayer(T * C); // (T, H, D)
    this.values = perLayer(T * C);
    this.earlier = perLayer(T * shifted); // (T, shifted): what later MLPs read of this position
    this.length = 0;
    this.qkv = new Float64Array(3 * C);
    this.gathered = new Float64Array(H * D);
    this.branch = new Float64Array(C);
    this.wide = new Float64Array(hidden);
    this.scores = new Float64Array(T);
  }

  /**
   * Reads one more token.
   * @param {number} id - the token.
   * @param {Float32Array|null} attention - filled with softmax weights (L, H, length + 1) when given.
   * @param {number} position - where it stands in the window.
   * @returns {Float64Array} the residual stream (C,) after the last norm, for `Model.logits`.
   */
  forward(id, attention = null, position = this.length) {
    const { model } = this, { C, L, weights, config } = model;
    const x = Float64Array.from(weights['transformer.wte.weight'].subarray(id * C, (id + 1) * C));
    const positions = weights['transformer.wpe.weight'];
    if (positions) for (let i = 0; i < C; i++) x[i] += positions[position * C + i];
    if (config.norm === 'rmsnorm') rmsNorm(x);
    for (let layer = 0; layer < L; layer++) {
      const block = model.blocks[layer];
      this.attend(x, block, layer, position, attention);
      this.join(x);
      if (!config.mlp_ratio) continue;
      this.mlp(x, block, layer, position);
      this.join(x);
    }
    this.length = position + 1;
    model.norm(x, { weight: weights['transformer.ln_f.weight'], bias: weights['transformer.ln_f.bias'] });
    return x;
  }

  join(x) {
    const { residual } = this.model.config;
    for (let i = 0; i < x.length; i++) x[i] = this.branch[i] + (residual ? x[i] : 0);
  }

  /** Self-attention of the newest position over all so far; the result is in `branch`. */
  attend(x, block, layer, position, attention) {
    const { model, qkv, scores, gathered } = this, { C, H, D } = model;
    const keys = this.keys[layer], values = this.values[layer], count = position + 1;
    const input = Float64Array.from(x);
    model.norm(input, block.ln_1);
    matvec(qkv, block['attn.c_attn'].weight, input, block['attn.c_attn'].bias);
    for (let start = 0; start < 2 * C; start += D) {
      if (model.rotation) this.rotate(start, position);
      if (model.config.qk_norm) rmsNorm(qkv, start, D);
    }
    keys.set(qkv.subarray(C, 2 * C), position * C);
    values.set(qkv.subarray(2 * C), position * C);
    gathered.fill(0);
    for (let head = 0; head < H; head++) {
      const at = head * D;
      let largest = -Infinity, total = 0;
      for (let p = 0; p < count; p++) {
        let dot = 0;
        for (let i = 0, k = p * C + at; i < D; i++, k++) dot += qkv[at + i] * keys[k];
        scores[p] = dot / Math.sqrt(D);
        if (scores[p] > largest) largest = scores[p];
      }
      for (let p = 0; p < count; p++) total += scores[p] = Math.exp(scores[p] - largest);
      for (let p = 0; p < count; p++) {
        const weight = scores[p] / total;
        if (attention) attention[(layer * H + head) * count + p] = weight;
        for (let i = 0, k = p * C + at; i < D; i++, k++) gathered[at + i] += weight * values[k];
      }
    }
    matvec(this.branch, block['attn.c_proj'].weight, gathered, block['attn.c_proj'].bias);
  }

  /** Turns channel pairs (i, i + D/2) of a query or key by the angles of a position. */
  rotate(start, position) {
    const { qkv } = this, half = this.model.D / 2, { cos, sin } = this.model.rotation;
    for (let i = 0; i < half; i++) {
      const c = cos[position * half + i], s = sin[position * half + i];
      const first = qkv[start + i], second = qkv[start + half + i];
      qkv[start + i] = first * c + second * s;
      qkv[start + half + i] = second * c - first * s;
    }
  }

  /** The MLP of the newest position; the result is in `branch`. */
  mlp(x, block, layer, position) {
    const { model, wide } = this, { shifted } = model, reach = model.config.token_shift;
    const input = Float64Array.from(x);
    model.norm(input, block.ln_2);
    if (reach) {
      const earlier = this.earlier[layer], width = shifted / reach;
      earlier.set(input.subarray(0, shifted), position * shifted);
      for (let i = 0; i < shifted; i++) {
        const from = position - 1 - Math.floor(i / width); // group k of the channels comes from k + 1 positions back
        input[i] = from < 0 ? 0 : earlier[from * shifted + i];
      }
    }
    const activate = ACTIVATIONS[model.config.activation];
    matvec(wide, block['mlp.c_fc'].weight, input, block['mlp.c_fc'].bias);
    for (let i = 0; i < wide.length; i++) wide[i] = activate(wide[i]);
    matvec(this.branch, block['mlp.c_proj'].weight, wide, block['mlp.c_proj'].bias);
  }
}
