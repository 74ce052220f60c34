// A text as tokens, coloured by a number between 0 and 1.

/** An element with properties, attributes (data-, aria-, role) and children. */
function element(tag, settings = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name.includes('-') || name === 'role') made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** A span for one token {id, start, end} of a text. */
function tokenSpan(tokenizer, text, token) {
  const span = element('span', { role: 'option', 'aria-selected': 'false', textContent: text.slice(token.start, token.end) });
  if (token.id < 0) span.className = 'unknown';
  else if (span.textContent === '\n') span.className = 'newline';
  else if (!span.textContent) Object.assign(span, { className: 'bytes', textContent: tokenizer.label(token.id) });
  return span;
}

/** Tokens to choose from by pointer or keyboard, as a list box; the last choice is the end of the text. */
class TokenText {
  /**
   * @param {HTMLElement} box - the list box.
   * @param {string} prefix - for the ids of the options.
   * @param {function(number|null, boolean)} choose - index of a token, or null for the end; whether to stay there.
   */
  constructor(box, prefix, choose) {
    Object.assign(this, { box, prefix, choose, spans: [], selected: null, cursor: null });
    this.end = element('span', { role: 'option', id: `${prefix}-end`, className: 'end', 'aria-label': 'end of the text' });
    box.append(this.end);
    box.addEventListener('pointerover', (event) => this.point(event, false));
    box.addEventListener('pointerleave', () => this.choose(undefined, false));
    box.addEventListener('click', (event) => this.point(event, true));
    box.addEventListener('keydown', (event) => this.key(event));
  }

  point(event, stay) {
    const option = event.target.closest('[role=option]');
    if (option) this.choose(option === this.end ? null : this.spans.indexOf(option), stay);
  }

  key(event) {
    const last = this.spans.length, at = this.cursor ?? last; // two keys may come before the next frame
    const [backward, forward] = this.runsLeft(at) ? ['ArrowRight', 'ArrowLeft'] : ['ArrowLeft', 'ArrowRight'];
    const moves = { [backward]: at - 1, [forward]: at + 1, ArrowUp: at - 10, ArrowDown: at + 10, Home: 0, End: last, Escape: last };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const next = Math.min(Math.max(moves[event.key], 0), last);
    this.cursor = next === last ? null : next;
    this.choose(this.cursor, true);
  }

  /** Whether the text runs from right to left at a token: the next one on its line is further left. */
  runsLeft(at) {
    for (const [first, second] of [[at, at + 1], [at - 1, at]]) {
      const [a, b] = [first, second].map((index) => this.spans[index]?.getBoundingClientRect());
      if (a && b && Math.abs(a.top - b.top) < a.height / 2) return b.left < a.left;
    }
    return false;
  }

  /** Shows the tokens; those before index `from` are there already. */
  show(tokenizer, text, tokens, from) {
    for (const span of this.spans.splice(from)) span.remove();
    const added = tokens.slice(from).map((token) => tokenSpan(tokenizer, text, token));
    added.forEach((span, i) => (span.id = `${this.prefix}-${from + i}`));
    this.spans.push(...added);
    this.end.before(...added);
  }

  /** Colours a token; null takes the colour away. */
  shade(index, share) {
    const span = this.spans[index];
    span.classList.toggle('pending', share === undefined);
    if (share === null || share === undefined) span.style.removeProperty('--share');
    else span.style.setProperty('--share', `${(100 * share).toFixed(1)}%`);
  }

  selectedSpan() {
    return this.selected === null ? this.end : this.spans[this.selected];
  }

  /** Marks a token as the one shown, and describes it for a screen reader. */
  select(index, description) {
    const before = this.selectedSpan();
    this.selected = this.cursor = index;
    const now = this.selectedSpan();
    if (before && before !== now) before.setAttribute('aria-selected', 'false');
    now.setAttribute('aria-selected', 'true');
    now.setAttribute('aria-label', description);
    this.box.setAttribute('aria-activedescendant', now.id);
    if (this.box.matches(':focus-visible')) now.scrollIntoView({ block: 'nearest' });
  }
}
