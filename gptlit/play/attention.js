// What is inside: attention weights of a transformer, the table of a bigram model.

const LARGEST_TABLE = 256; // tokens; more cannot be told apart on a screen
const GATHERED = 5; // tokens listed under an attention text

/** Fills a canvas (rows × columns pixels) with a colour whose opacity is the square root of value(row, column). */
function paint(canvas, rows, columns, value) {
  if (canvas.width !== columns || canvas.height !== rows) Object.assign(canvas, { width: columns, height: rows });
  const context = canvas.getContext('2d');
  const [r, g, b] = getComputedStyle(canvas).color.match(/\d+(\.\d+)?/g).map(Number);
  const image = context.createImageData(columns, rows);
  for (let i = 0, at = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++, at += 4) {
      image.data.set([r, g, b, 255 * Math.sqrt(value(i, j))], at);
    }
  }
  context.putImageData(image, 0, 0);
}

function selectOf(name, count) {
  const options = Array.from({ length: count }, (_, i) => element('option', { value: i, textContent: i + 1 }));
  return element('select', { 'aria-label': name }, ...options);
}

/** Attention of one token in one head, and of all tokens in all heads. */
class AttentionView {
  constructor(place, panel) {
    const { L, H } = panel.model;
    this.panel = panel;
    this.layer = selectOf('layer', L);
    this.head = selectOf('head', H);
    this.layer.value = L - 1;
    this.sentence = element('p', { className: 'quiet' });
    this.text = element('div', { className: 'tokens attended', dir: 'auto', 'aria-hidden': 'true' });
    this.list = element('ol', { className: 'gathered' });
    this.grid = element('div', { className: 'maps', style: `--heads: ${H}` });
    this.details = element(
      'details', {}, element('summary', { textContent: `All ${L * H} heads` }),
      element('p', { className: 'quiet', textContent: 'A row gathers from the columns. Opacity: square root of the weight.' }),
      this.grid,
    );
    this.maps = Array.from({ length: L * H }, (_, i) => this.makeMap(Math.floor(i / H), i % H));
    place.append(
      element('h3', { textContent: 'Attention' }),
      element('div', { className: 'row' }, element('label', {}, 'layer ', this.layer), element('label', {}, 'head ', this.head)),
      this.sentence, this.text, this.list, this.details,
    );
    for (const control of [this.layer, this.head]) control.addEventListener('change', () => this.show());
    this.details.addEventListener('toggle', () => this.show());
  }

  makeMap(layer, head) {
    const canvas = element('canvas', { width: 1, height: 1 });
    const name = `layer ${layer + 1}, head ${head + 1}`;
    const button = element('button', { type: 'button', title: name, 'aria-label': name }, canvas);
    button.addEventListener('click', () => {
      [this.layer.value, this.head.value] = [layer, head];
      this.show();
    });
    this.grid.append(button);
    return { layer, head, canvas, button };
  }

  /** Draws the token at `index` of the reading. */
  show(index = this.index) {
    this.index = index;
    const { panel, text, list } = this, { reading } = panel;
    const row = index === undefined || index < 0 ? null : reading.row(index, +this.layer.value, +this.head.value);
    text.replaceChildren();
    list.replaceChildren();
    this.details.hidden = !row;
    if (!row) {
      this.sentence.textContent = index >= 0 ? 'Attention is kept for the newest tokens only.' : 'No token is read here.';
      return;
    }
    this.sentence.replaceChildren('“', element('bdi', { textContent: panel.label(index) }), '” gathers from');
    const largest = row.weights.reduce((a, b) => Math.max(a, b), 0);
    const spans = Array.from(row.weights, (weight, i) => {
      const span = tokenSpan(panel.tokenizer, panel.text, panel.tokenAt(row.start + i));
      span.style.setProperty('--share', `${(100 * weight) / largest}%`);
      return span;
    });
    spans.at(-1).classList.add('self');
    text.append(...spans);
    for (const i of mostProbable(row.weights, GATHERED)) {
      const back = index - row.start - i;
      const where = back ? `${back} back` : 'itself';
      const label = element('bdi', { textContent: panel.label(row.start + i) });
      list.append(element('li', {}, element('b', {}, label), ` ${where} `, element('span', { textContent: percent(row.weights[i]) })));
    }
    if (this.details.open) this.drawMaps(row.start, index + 1);
  }

  drawMaps(start, end) {
    const { reading } = this.panel, size = end - start;
    for (const { layer, head, canvas, button } of this.maps) {
      const rows = Array.from({ length: size }, (_, i) => reading.row(start + i, layer, head));
      paint(canvas, size, size, (i, j) => rows[i]?.weights[start + j - rows[i].start] ?? 0);
      button.setAttribute('aria-pressed', String(layer === +this.layer.value && head === +this.head.value));
    }
  }
}

/** p(next | one token alone) of a model without layers, as a table. */
class BigramView {
  constructor(place, panel) {
    const { V } = panel.model;
    this.panel = panel;
    this.canvas = element('canvas', { role: 'img', width: 1, height: 1 });
    this.caption = element('p', { className: 'quiet' });
    const why = panel.model.config.position === 'none'
      ? 'The model has no layers: what follows depends on one token alone. A row: what follows its token.'
      : 'The model has no layers: what follows depends on one token and its position. A row: what follows its token.';
    place.append(element('h3', { textContent: 'Table' }), element('p', { className: 'quiet', textContent: why }));
    if (V > LARGEST_TABLE) {
      this.caption.textContent = `The table of ${V} tokens is too large to show; its rows are the bars above.`;
      place.append(this.caption);
      return;
    }
    this.mark = element('i');
    const axis = (side) => {
      const labels = Array.from({ length: V }, (_, id) => element('span', { textContent: panel.tokenizer.label(id) }));
      return element('div', { className: `axis ${side}`, 'aria-hidden': 'true' }, ...labels);
    };
    const cells = element('div', { className: 'cells' }, this.canvas, this.mark);
    this.frame = element('div', { className: 'table', style: `--cells: ${V}` }, axis('next'), axis('this'), cells);
    place.append(this.frame, this.caption);
    this.canvas.addEventListener('pointermove', (event) => this.point(event));
    this.canvas.addEventListener('pointerleave', () => this.show());
  }

  /** Probabilities (V, V) at a position of the window. */
  fill(position) {
    const { model } = this.panel;
    this.position = position;
    this.table = Array.from({ length: model.V }, (_, id) => logSoftmax(model.row(id, position)).map(Math.exp));
  }

  show(index = this.index) {
    this.index = index;
    const { model, reading } = this.panel;
    if (!this.frame) return;
    const position = model.config.position === 'none' || !(index >= 0) ? 0 : index - reading.attention[index].start;
    if (position !== this.position) this.fill(position);
    paint(this.canvas, model.V, model.V, (i, j) => this.table[i][j]);
    this.mark.hidden = !(index >= 0);
    if (index >= 0) this.describe(reading.ids[index]);
  }

  describe(id, next = mostProbable(this.table[id], 1)[0]) {
    const label = (token) => this.panel.tokenizer.label(token);
    this.mark.style.top = `${(100 * id) / this.panel.model.V}%`;
    this.mark.style.height = `${100 / this.panel.model.V}%`;
    const caption = `after “${label(id)}”: “${label(next)}” ${percent(this.table[id][next])}`;
    this.caption.textContent = caption;
    this.canvas.setAttribute('aria-label', `Table of probabilities of the next token; ${caption}`);
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect(), { V } = this.panel.model;
    const cell = (offset, size) => Math.min(Math.max(Math.floor((offset / size) * V), 0), V - 1);
    this.describe(cell(event.clientY - box.top, box.height), cell(event.clientX - box.left, box.width));
  }
}
