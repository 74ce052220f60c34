// The page: one panel for each model shown, all on the same text; a sampler that continues the text.

const LONGEST_TEXT = 5000; // UTF-16 units of a text that are read, the newest ones; samples may add as many
const SLICE = 12; // milliseconds of computing between two looks at the user's input
const REDRAW = 50; // milliseconds between two pictures while it reads or samples
const SHOWN_FIRST = 3; // models
const SURPRISE_SHADES = 8; // bits with the full colour

const byId = (id) => document.getElementById(id);
const content = JSON.parse(byId('content').textContent);

const state = {
  text: content.text,
  start: 0, // where reading begins in the text
  chosen: null, // offset in the text of the token that is shown; null is its end
  pointed: undefined, // the same, while the pointer is on it
  panels: [],
  stream: null, // random numbers of the samples since the user's last change
  before: null, // the text before the samples
  running: false,
  waiting: 0, // panels that have not read the text to its end
  frame: 0,
  drawn: 0, // when the page was redrawn last
};

/** One model: its reading of the text, and the elements that show it. */
class Panel {
  constructor(spec, number) {
    this.model = new Model(spec, byId(`weights-${number}`).textContent);
    this.tokenizer = makeTokenizer(spec.tokenizer);
    this.reading = new Reading(this.model);
    this.unit = spec.tokenizer.kind === 'char' ? 'character' : 'token';
    [this.text, this.tokens, this.read, this.shown] = ['', [], [], 0];
    this.element = byId('panel').content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    const title = find('h2');
    title.textContent = spec.name;
    title.id = `panel-${number}`;
    this.element.setAttribute('aria-labelledby', title.id);
    find('.about').textContent = this.about(spec);
    [this.score, this.selected, this.heading] = [find('.score'), find('.selected'), find('.next h3')];
    const box = find('.tokens');
    box.classList.toggle('bpe', this.unit === 'token');
    box.setAttribute('aria-label', `The text as ${spec.name} reads it; arrow keys choose a ${this.unit}`);
    this.view = new TokenText(box, `token-${number}`, (index, stay) => this.choose(index, stay));
    this.bars = new Bars(find('.bars'), this.tokenizer);
    [this.count, this.log] = [find('.count'), find('.log')];
    for (const control of [this.count, this.log]) control.addEventListener('change', () => schedule());
    this.inside = new (this.model.L ? AttentionView : BigramView)(find('.inside'), this);
  }

  about({ parameters, note }) {
    const { L, H, C, T, V } = this.model;
    const size = parameters < 1e6 ? `${(parameters / 1e3).toPrecision(3)} k` : `${(parameters / 1e6).toPrecision(3)} M`;
    const shape = L ? [`${L} × ${H} heads`, `${C} channels`, `context ${T}`] : ['no layers'];
    return [`${size} parameters`, ...shape, `${V} ${this.unit}s`, note].filter(Boolean).join(' · ');
  }

  /** Takes a text, and keeps what it has in common with the one before; `tokens` when they are known already. */
  setText(text, tokens = this.tokenizer.encode(text)) {
    const textOf = (whole, token) => whole.slice(token.start, token.end);
    const alike = (a, b) => a && a.id === b.id && a.end === b.end && textOf(this.text, a) === textOf(text, b);
    let same = 0;
    while (same < tokens.length && alike(this.tokens[same], tokens[same])) same++;
    [this.text, this.tokens] = [text, tokens];
    this.read = tokens.filter((token) => token.id >= 0);
    let known = 0;
    while (known < this.reading.length && this.reading.ids[known] === this.read[known]?.id) known++;
    this.reading.truncate(known);
    this.view.show(this.tokenizer, text, tokens, same);
    this.shown = Math.min(this.shown, same);
  }

  /** Reads the samples again, as a part of the text. */
  keepSamples() {
    this.reading.forgetSamples();
    const next = this.tokens.indexOf(this.read[this.reading.length]);
    if (next >= 0) this.shown = Math.min(this.shown, next);
  }

  /** Adds a token that this model sampled. */
  append(id, piece) {
    const start = this.text.length, token = { id, start, end: start + piece.length };
    this.text += piece;
    this.tokens.push(token);
    this.read.push(token);
    this.reading.push(id);
  }

  /** Reads until the text or the time is at its end; whether all is read. */
  advance(deadline) {
    while (this.reading.length < this.read.length && performance.now() < deadline) {
      this.reading.push(this.read[this.reading.length].id);
    }
    return this.reading.length === this.read.length;
  }

  tokenAt(index) {
    return this.read[index];
  }

  label(index) {
    return this.tokenizer.label(this.read[index].id);
  }

  choose(index, stay) {
    const offset = index === undefined || index === null ? index : this.tokens[index].start;
    if (stay) state.chosen = offset;
    state.pointed = stay || index === undefined ? undefined : offset;
    schedule();
  }

  /** Index among the tokens of the one at an offset of the text; null for the end. */
  tokenIndex(offset) {
    if (offset === null) return null;
    const index = this.tokens.findIndex((token) => token.start <= offset && offset < token.end);
    return index < 0 ? null : index;
  }

  /** Brings the elements up to date. */
  render(offset, settings) {
    if (this.view.spans.length < this.tokens.length) {
      this.view.show(this.tokenizer, this.text, this.tokens, this.view.spans.length);
    }
    this.renderSurprise();
    const index = this.tokenIndex(offset);
    const at = index === null ? this.reading.length : this.read.indexOf(this.tokens[index]);
    this.renderNext(index, at, settings);
    this.inside.show(Math.min(index === null ? at - 1 : at, this.reading.length - 1));
  }

  renderSurprise() {
    const { reading } = this;
    let position = 0;
    for (let i = 0; i < this.shown; i++) position += this.tokens[i].id >= 0;
    for (; this.shown < this.tokens.length; this.shown++) {
      if (this.tokens[this.shown].id < 0) {
        this.view.shade(this.shown, null);
        continue;
      }
      if (position >= reading.length) break;
      const bits = reading.surprises[position++];
      this.view.shade(this.shown, bits === null ? null : Math.min(bits / SURPRISE_SHADES, 1));
    }
    for (let i = this.shown; i < this.tokens.length; i++) this.view.shade(i, undefined);
    const { bits, characters } = reading.total(this.tokenizer.characters);
    const mean = characters ? `${(bits / characters).toFixed(2)} bits per character` : '';
    this.score.textContent = mean && `${mean} (${bits.toFixed(0)} bits, ${characters} characters)`;
  }

  /** The distribution before the chosen token, or after the end of the text. */
  renderNext(index, at, settings) {
    const { reading } = this, token = index === null ? null : this.tokens[index];
    this.heading.replaceChildren(...this.headingOf(token));
    const predicted = at >= 1 && at <= reading.length;
    let description = token === null ? 'end of the text' : visible(this.text.slice(token.start, token.end)) || this.tokenizer.label(token.id);
    if (!predicted) {
      this.bars.clear();
      const reason = token === null || at >= 0 ? 'nothing before it' : 'not in the vocabulary, so the model skips it';
      this.selected.textContent = token && at > reading.length ? 'not read yet' : reason;
      description += `: ${this.selected.textContent}`;
    } else {
      const logits = reading.logits(at - 1);
      const typed = token !== null && at < reading.length ? reading.ids[at] : null;
      const plain = logSoftmax(logits).map(Math.exp);
      const view = { count: +this.count.value, log: this.log.checked };
      this.bars.show(plain, distribution(logits, settings), typed, view);
      const best = mostProbable(plain, 1)[0];
      this.selected.textContent = typed === null
        ? `most probable: ${this.tokenizer.label(best)}, ${percent(plain[best])}`
        : `${reading.surprises[at].toFixed(2)} bits, probability ${percent(plain[typed])}, rank ${reading.ranks[at]} of ${this.model.V}`;
      description += `: ${this.selected.textContent}`;
    }
    this.view.select(index, description);
  }

  headingOf(token) {
    if (token === null) return [`Next ${this.unit}`];
    const label = token.id < 0 ? visible(this.text.slice(token.start, token.end)) : this.tokenizer.label(token.id);
    return ['Prediction of “', element('bdi', { textContent: label }), '”'];
  }
}

// ---------------------------------------------------------------- the text

/** Takes a text that the user typed: the samples are part of it now, and their stream ends. */
function typed(text) {
  const long = Math.max(text.length - LONGEST_TEXT, 0);
  const start = long && /[\udc00-\udfff]/.test(text[long]) ? long + 1 : long; // no half of a surrogate pair
  Object.assign(state, { start, stream: null, before: null, running: false, chosen: null });
  for (const panel of state.panels) panel.keepSamples();
  setText(text);
}

function setText(text) {
  state.text = text;
  const part = text.slice(state.start);
  for (const panel of state.panels) if (panel.text !== part) panel.setText(part);
  read();
}

/** Reads in slices, so that the page stays responsive. */
function read() {
  clearTimeout(state.timer);
  const deadline = performance.now() + SLICE;
  state.waiting = state.panels.filter((panel) => !panel.advance(deadline)).length;
  schedule();
  if (state.waiting) state.timer = setTimeout(read);
}

/** Redraws the page in the next frame; while it reads or samples, less often, so that the time goes into that. */
function schedule() {
  if ((state.running || state.waiting) && performance.now() - state.drawn < REDRAW) return;
  state.frame ||= requestAnimationFrame(render);
}

function render() {
  Object.assign(state, { frame: 0, drawn: performance.now() });
  const offset = state.pointed === undefined ? state.chosen : state.pointed;
  const settings = samplingSettings();
  for (const panel of state.panels) panel.render(offset, settings);
  if (byId('text').value !== state.text) byId('text').value = state.text;
  byId('sample').textContent = state.running ? 'Stop' : 'Sample';
  byId('undo').disabled = state.before === null;
  byId('text-status').textContent = statusLine();
}

function statusLine() {
  const count = Array.from(state.text).length;
  const parts = [`${count.toLocaleString('en')} character${count === 1 ? '' : 's'}`];
  if (state.start) parts.push(`the first ${state.start.toLocaleString('en')} are left out`);
  if (isFull()) parts.push('the text is as long as the page can show');
  for (const panel of state.panels) {
    const unknown = panel.tokens.filter((token) => token.id < 0);
    if (unknown.length) {
      const some = [...new Set(unknown.map((token) => panel.text.slice(token.start, token.end)))];
      const listed = some.slice(0, 5).map(visible).join(' ') + (some.length > 5 ? ' …' : '');
      parts.push(`${panel.model.name} skips ${unknown.length} that its vocabulary lacks: ${listed}`);
    }
    const left = panel.read.length - panel.reading.length;
    if (left) parts.push(`${panel.model.name} has ${left.toLocaleString('en')} left to read`);
  }
  return parts.join(' · ');
}

// ---------------------------------------------------------------- sampling

function samplingSettings() {
  const value = (id) => +byId(id).value;
  return {
    temperature: value('temperature'),
    topK: value('top-k') || null,
    topP: value('top-p') < 1 ? value('top-p') : null,
    minP: value('min-p') || null,
  };
}

function samplingPanel() {
  return state.panels[+byId('sampler').value] ?? state.panels[0];
}

function isFull() {
  return state.text.length - state.start >= 2 * LONGEST_TEXT;
}

/** Starts the stream of random numbers and of text, from the text as it is. */
function startStream(panel) {
  state.before = state.text;
  panel.reading.beginWindow();
  state.stream = { random: new PythonRandom(`${byId('seed').value || 0}/0`), decode: panel.tokenizer.decoder(), panel };
}

/** Continues the text by one token; false when the text is not read to its end yet, or is full. */
function sampleToken() {
  const panel = samplingPanel();
  if (isFull()) return (state.running = false);
  if (!panel.read.length) {
    setText(panel.tokenizer.encode('\n')[0].id < 0 ? state.text + panel.tokenizer.decoder()(0) : `${state.text}\n`);
  }
  if (!panel.advance(performance.now() + SLICE)) return false;
  if (state.stream?.panel !== panel) startStream(panel);
  const logits = panel.reading.logits(panel.reading.length - 1);
  const id = draw(distribution(logits, samplingSettings()), state.stream.random.random());
  const piece = state.stream.decode(id);
  panel.append(id, piece);
  state.text += piece;
  return true;
}

/** Samples until the user stops it, in slices. */
function sampleOn() {
  if (!state.running) return;
  const deadline = performance.now() + SLICE;
  while (performance.now() < deadline && sampleToken());
  setText(state.text);
  setTimeout(sampleOn);
}

function step() {
  state.running = false;
  if (sampleToken()) setText(state.text);
  else if (!isFull()) setTimeout(step);
}

function undo() {
  if (state.before !== null) typed(state.before);
}

// ---------------------------------------------------------------- controls

function showModels(numbers) {
  const made = new Map(state.panels.map((panel) => [panel.number, panel]));
  state.running = false;
  state.stream = null;
  state.panels = numbers.map((number) => made.get(number) ?? Object.assign(new Panel(content.models[number], number), { number }));
  byId('panels').replaceChildren(...state.panels.map((panel) => panel.element));
  byId('sampler').replaceChildren(...state.panels.map((panel, i) => element('option', { value: i, textContent: panel.model.name })));
  byId('sampler-field').hidden = state.panels.length < 2;
  byId('top-k').max = Math.max(1, ...state.panels.map((panel) => Math.min(panel.model.V, 200) - 1));
  setText(state.text);
}

function showSliders() {
  const { temperature, topK, topP, minP } = samplingSettings();
  const texts = { temperature: temperature ? temperature.toFixed(2) : '0 (greedy)', 'top-k': topK ?? 'off', 'top-p': topP ?? 'off', 'min-p': minP ?? 'off' };
  for (const [id, text] of Object.entries(texts)) document.querySelector(`output[for=${id}]`).textContent = text;
  schedule();
}

function bindControls() {
  byId('text').addEventListener('input', (event) => typed(event.target.value));
  byId('sample').addEventListener('click', () => {
    state.running = !state.running;
    state.chosen = null;
    sampleOn();
    schedule();
  });
  byId('step').addEventListener('click', step);
  byId('undo').addEventListener('click', undo);
  byId('seed').addEventListener('input', () => (state.stream = null));
  byId('sampler').addEventListener('change', () => (state.stream = null));
  const sliders = ['temperature', 'top-k', 'top-p', 'min-p'];
  for (const id of sliders) byId(id).addEventListener('input', showSliders);
  byId('reset').addEventListener('click', () => {
    for (const id of sliders) byId(id).value = byId(id).defaultValue;
    showSliders();
  });
}

function buildModelChoice() {
  const field = byId('models'), boxes = content.models.map((spec, number) => {
    const box = element('input', { type: 'checkbox', value: number, checked: number < SHOWN_FIRST });
    field.append(element('label', {}, box, ` ${spec.name}`));
    return box;
  });
  const chosen = () => boxes.filter((box) => box.checked).map((box) => +box.value);
  field.hidden = boxes.length < 2;
  field.addEventListener('change', (event) => {
    if (!chosen().length) event.target.checked = true;
    showModels(chosen());
  });
  showModels(chosen());
}

bindControls();
buildModelChoice();
typed(content.text);
showSliders();
globalThis.gptlitPlay = { state, setText: typed, samplingSettings, distribution, logSoftmax }; // for the console
