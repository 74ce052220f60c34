// Probabilities as bars: the model's own as an outline, filled with what sampling makes of them.

const LOG_DECADES = 6; // the log scale runs from 10⁻⁶ to 1

/** A probability in percent, with two or three digits. */
function percent(p) {
  if (p === 0) return '0 %';
  if (p < 5e-7) return '< 0.0001 %';
  if (p < 1e-4) return `${(100 * p).toFixed(4)} %`;
  return `${(100 * p).toPrecision(p < 0.1 ? 2 : 3)} %`;
}

class Bars {
  constructor(table, tokenizer) {
    Object.assign(this, { body: table.tBodies[0], tokenizer, rows: [] });
  }

  /**
   * @param {Float64Array} plain - the model's own distribution (V,).
   * @param {Float64Array} shaped - what a token is drawn from (V,).
   * @param {number|null} typed - the token that follows in the text.
   * @param {{count: number, log: boolean}} view - how many to show, and on which scale.
   */
  show(plain, shaped, typed, { count, log }) {
    const order = mostProbable(plain, count);
    const shown = order.map((id, i) => ({ id, rank: i + 1 }));
    if (typed !== null && !order.includes(typed)) {
      shown.push({ id: typed, rank: plain.reduce((rank, p) => rank + (p > plain[typed]), 1) });
    }
    const width = (p) => `${100 * (log ? Math.max(1 + Math.log10(p) / LOG_DECADES, 0) : p)}%`;
    while (this.rows.length < shown.length) this.rows.push(this.makeRow());
    for (const row of this.rows.splice(shown.length)) row.line.remove();
    shown.forEach(({ id, rank }, i) => {
      const row = this.rows[i], isTyped = id === typed;
      row.line.classList.toggle('typed', isTyped);
      row.line.classList.toggle('apart', rank > i + 1);
      row.rank.textContent = rank;
      row.label.textContent = this.tokenizer.label(id);
      row.mark.textContent = isTyped ? 'typed' : '';
      row.plain.style.width = width(plain[id]);
      row.shaped.style.width = width(shaped[id]);
      row.value.textContent = percent(shaped[id]);
      row.own.textContent = Math.abs(shaped[id] - plain[id]) > 5e-4 ? `(${percent(plain[id])})` : '';
    });
  }

  clear() {
    for (const row of this.rows.splice(0)) row.line.remove();
  }

  makeRow() {
    const row = {
      rank: element('td', { className: 'rank' }),
      label: element('bdi'),
      mark: element('small'),
      plain: element('i', { className: 'plain' }),
      shaped: element('i', { className: 'shaped' }),
      value: element('span'),
      own: element('small'),
    };
    row.line = element(
      'tr', {}, row.rank,
      element('th', { scope: 'row' }, row.label, ' ', row.mark),
      element('td', { className: 'track', 'aria-hidden': 'true' }, element('div', {}, row.plain, row.shaped)),
      element('td', { className: 'value' }, row.value, ' ', row.own),
    );
    this.body.append(row.line);
    return row;
  }
}

/** Ids of the `count` largest numbers, largest first; of equals the smaller id first. */
function mostProbable(p, count) {
  return Array.from(p.keys()).sort((a, b) => p[b] - p[a] || a - b).slice(0, count);
}
