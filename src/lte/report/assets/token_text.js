'use strict';
/* The text token by token, tinted by how far each is from the mean; a list box in which one token is chosen. */

const bits = (value) => `${value.toFixed(1)} bits`;
const points = (share) => `${(100 * share).toFixed(1)} points`;

/* What tokens can be coloured by. values: of a run, one number for each token, not a number where there is none.
   centre and sorted: the mean, and the values among which a percentile counts. */
const COLOURINGS = {
  share: { name: () => 'FFN neurons used', words: (value) => Shell.percent(value),
    values: (run, { step }) => run.shares(run.length && step), centre: (run) => run.known.mean,
    sorted: (run) => run.known.shares, mean: 'the model’s mean on its reference text' },
  difference: { name: () => 'difference, B less A',
    words: (value) => `${value > 0 ? '+' : '−'}${points(Math.abs(value))}`, centre: () => 0, mean: 'no difference',
    values: (run, state) => {
      const here = state.routings.indexOf(run);
      const [own, other] = [here, 1 - here].map((index) => state.routings[index].shares(state.step));
      return own.map((share, token) => {
        const partner = state.partners[here][token];
        return partner < 0 ? NaN : (here ? 1 : -1) * (share - other[partner]);
      });
    },
    offered: ({ routings }) => routings.length > 1 },
  surprise: { name: () => 'surprise of what came', words: bits, values: (run) => [NaN, ...run.surprise.subarray(1)],
    offered: ({ routings }) => routings.every(({ next }) => next) },
  entropy: { name: () => 'entropy of what comes next', words: bits, values: (run) => Array.from(run.entropy),
    offered: ({ routings }) => routings.every(({ next }) => next) },
  layer: { name: ({ layer }) => `experts on in layer ${layer}`, words: (value) => value.toFixed(1).replace('.0', ''),
    values: (run, { layer }) => upTo(run.length).map((token) => (layer < run.layers ? run.count(layer, token) : NaN)) },
  expert: { name: ({ layer, expert }) => `whether expert ${expert} of layer ${layer} is on`,
    words: (value) => ['off', 'on'][value], centre: () => 0, mean: 'off',
    values: (run, { layer, expert }) => upTo(run.length).map((token) =>
      (layer < run.layers && expert < run.experts ? run.isOn(layer, token, expert) : NaN)) },
};

/* How all runs are coloured now: one scale for all but the neurons used, where each model has its own mean. */
function colouring(state) {
  const kind = COLOURINGS[state.colour]?.offered?.(state) === false ? 'share' : state.colour;
  const found = COLOURINGS[kind] ?? COLOURINGS.share;
  const values = state.routings.map((run) => found.values(run, state));
  const pooled = Float64Array.from(values.flat().filter((value) => !Number.isNaN(value))).sort();
  const scales = state.routings.map((run, index) => ({ values: values[index], sorted: found.sorted?.(run) ?? pooled,
    centre: found.centre?.(run) ?? meanOf(pooled) }));
  return { ...found, scales, ends: [pooled[0], pooled.at(-1)] };
}

/* How far a value is from the centre, on percentiles: from -1, the least of all, to 1, the most. */
function farFrom(value, { centre, sorted }) {
  if (Number.isNaN(value)) return NaN;
  const [rank, middle] = [value, centre].map((each) => rankOf(sorted, each));
  return value > centre ? (rank - middle) / (1 - middle || 1) : (rank - middle) / (middle || 1);
}

class TokenText {
  constructor(index, state) {
    Object.assign(this, { index, state, routing: state.routings[index] });
    this.spans = upTo(this.routing.length).map((token) => this.span(token));
    this.text = Shell.element('div', { class: 'token-text', role: 'listbox', tabindex: '0', dir: 'ltr',
      'aria-label': `Tokens of ${this.routing.text}`, 'aria-orientation': 'horizontal' }, ...this.spans);
    this.text.addEventListener('click', (event) => {
      const token = this.spans.indexOf(event.target);
      if (token >= 0) state.set({ run: index, token });
    });
    this.text.addEventListener('keydown', (event) => this.onKey(event));
    state.onChange(['run', 'token'], () => this.select());
  }

  span(token) {
    const { list } = this.routing;
    const text = list.texts[token];
    const shown = text ? visible(text).replaceAll('⏎', '⏎\n') : list.label(token);
    const kinds = ['token', !text && 'entry', list.special.has(token) && 'special'].filter(Boolean);
    return Shell.element('span', { class: kinds.join(' '), role: 'option', id: `token-${this.index}-${token}`,
      'aria-label': !shown.trim() && 'white space', title: list.special.has(token) && 'a special token',
        'aria-selected': 'false' }, shown);
  }

  onKey(event) {
    const last = this.spans.length - 1;
    const now = this.state.at(this.index) ?? 0;
    const goals = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - 10, PageDown: now + 10, Home: 0, End: last };
    const sign = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const next = sign && Shell.lineAway(this.spans, this.spans[now], sign);
    const goal = sign ? this.spans.indexOf(next ?? this.spans[now]) : goals[event.key];
    if (goal === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.state.set({ run: this.index, token: Math.min(Math.max(goal, 0), last) });
  }

  paint({ scales }) {
    const scale = scales[this.index];
    this.spans.forEach((span, token) => {
      const far = farFrom(scale.values[token], scale);
      span.style.setProperty('--tint', `${Math.round(45 * Math.abs(far)) || 0}%`);
      span.classList.toggle('less', far < 0);
      span.classList.toggle('alone', Number.isNaN(far));
    });
  }

  /* Marks the chosen token or its counterpart, and scrolls the box, not the page, to it. */
  select() {
    this.chosen?.setAttribute('aria-selected', 'false');
    this.chosen = this.spans[this.state.at(this.index) ?? -1];
    if (!this.chosen) {
      this.text.removeAttribute('aria-activedescendant');
      return;
    }
    this.chosen.setAttribute('aria-selected', 'true');
    this.text.setAttribute('aria-activedescendant', this.chosen.id);
    const { offsetTop: top, offsetHeight: height } = this.chosen;
    if (top < this.text.scrollTop) this.text.scrollTop = top - height;
    else if (top + height > this.text.scrollTop + this.text.clientHeight) this.text.scrollTop = top +
      2 * height - this.text.clientHeight;
  }
}
