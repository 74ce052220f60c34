// The entry point of the tab: a list of runs, and the page of those that are chosen in a sandboxed frame.

const address = (name) => new URL(name, import.meta.url);

const STYLE = `
  html, body { height: 100%; margin: 0; }
  body { display: flex; flex-direction: column; font: 14px/1.4 system-ui, sans-serif; color-scheme: light dark; color: CanvasText; background: Canvas; }
  form { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: center; padding: 8px 16px; max-height: 22vh; overflow-y: auto; }
  iframe { flex: 1; border: 0; border-top: 1px solid color-mix(in srgb, CanvasText 20%, transparent); }
  button { font: inherit; }
`;

/** Whether TensorBoard shows itself dark. */
function theme() {
  return window.parent.document.body.classList.contains('dark-mode') ? 'dark' : 'light';
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export async function render() {
  const choice = make('form', {}), frame = make('iframe', { title: 'The models that are chosen' });
  frame.setAttribute('sandbox', 'allow-scripts');
  document.body.replaceChildren(make('style', { textContent: STYLE }), choice, frame);
  document.documentElement.style.colorScheme = theme();
  choice.addEventListener('submit', (event) => event.preventDefault());
  choice.addEventListener('change', show);
  await list();

  async function list() {
    const chosen = new Set(new FormData(choice).getAll('run'));
    const response = await fetch(address('runs'));
    if (!response.ok) {
      choice.replaceChildren('The runs cannot be listed; the terminal of TensorBoard says why.');
      return;
    }
    const runs = await response.json();
    const boxes = runs.map((run, i) => {
      const box = make('input', { type: 'checkbox', name: 'run', value: run, checked: chosen.size ? chosen.has(run) : i === 0 });
      return make('label', {}, box, ` ${run}`);
    });
    const again = make('button', { type: 'button', textContent: 'Reload', onclick: list });
    choice.replaceChildren(runs.length ? 'Runs' : 'No run below --logdir holds best.ckpt or last.ckpt.', ...boxes, again);
    show();
  }

  function show() {
    const page = address('model.html');
    for (const run of new FormData(choice).getAll('run')) page.searchParams.append('run', run);
    page.searchParams.append('theme', theme());
    frame.hidden = !page.searchParams.has('run');
    if (!frame.hidden) frame.src = page;
  }
}
