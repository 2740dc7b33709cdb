'use strict';
/* The atlas of experts: all of one model, by how often each is on and how far the token alone decides it. */

class Atlas {
  constructor(state) {
    Object.assign(this, { state, shown: [] });
    const { element } = Shell;
    this.find = element('input', { type: 'search', value: state.find, list: 'atlas-words', size: '18' });
    this.list = element('ol', { class: 'experts' });
    this.told = element('p', { 'aria-live': 'polite' });
    this.source = element('p', { class: 'quiet' });
    this.picture = Charts.linePicture({
      label: 'Points of all experts, how selective each is over how often it is on',
      caption: 'A point is an expert: to the right those that most tokens of the reference text switch on, on top ' +
        'those that are on for the same tokens again and for few others. Pale ones are not among those found.',
      height: () => 300,
      describe: () => this.describe(),
      rows: () => this.rows(),
      chosen: () => [{ seriesIndex: 0, dataIndex: this.shown.findIndex(({ layer, expert }) =>
        layer === state.layer && expert === state.expert) }],
      onPick: ({ data: { layer, expert } }) => state.set({ layer, expert }),
    });
    const words = ['always on', 'dead'].map((value) => element('option', { value }));
    this.box = element('section', { class: 'panel' }, element('h2', { class: 'first' }, 'Atlas of experts'),
      element('div', { class: 'controls' }, element('label', {}, 'Find a token, or an expert’s number ', this.find,
        element('datalist', { id: 'atlas-words' }, ...words))),
      this.told, this.list, this.picture.box, this.source);
    this.find.addEventListener('input', () => state.set({ find: this.find.value }));
    state.onChange(['find', 'run'], () => this.show());
    state.onChange(['layer', 'expert'], () => this.picture.mark());
  }

  /* All experts of the model of the chosen token, most selective first, and whether each is found: by 17 that expert of
     all layers, by 3.17 that of layer 3, by `dead` and `always on` those; all else is a token. */
  all() {
    const { layers, experts, known } = this.state.routing;
    const wanted = this.state.find.trim().toLowerCase();
    const all = upTo(layers * experts).map((place) => {
      const [layer, expert] = [Math.floor(place / experts), place % experts];
      const labels = known.strongest(layer, expert).map(({ position }) => known.list.label(position));
      const mark = known.mark(layer, expert);
      const names = ['', `${expert}`, `${layer}.${expert}`, mark, ...labels.map((label) => label.trim().toLowerCase())];
      return { layer, expert, mark, labels, use: known.useOf(layer, expert),
        selectivity: known.selectivityOf(layer, expert), found: names.includes(wanted) };
    });
    return all.sort((a, b) => b.selectivity - a.selectivity);
  }

  show() {
    const { known } = this.state.routing;
    this.shown = this.all();
    const found = this.shown.filter((expert) => expert.found);
    const count = (mark) => Shell.count(this.shown.filter((expert) => expert.mark === mark).length);
    this.told.textContent = `${Shell.count(found.length)} of ${Shell.count(this.shown.length)} experts, the most ` +
      `selective first; ${count('always on')} always on, ${count('dead')} dead.`;
    this.list.replaceChildren(...found.slice(0, 12).map((expert) => Shell.element('li', {}, this.button(expert))));
    this.source.textContent = [`How often, and for which tokens, was counted on ${known.text}, ` +
      `${Shell.count(known.list.length)} tokens.`,
      'Selective is 1 − p / q: p is the share of its tokens that switch the expert on, q the chance that it is on ' +
      'again at another place of a token for which it is on.', ...known.notes].join(' ');
    this.picture.drawSoon();
  }

  button({ layer, expert, use, selectivity, mark, labels }) {
    const told = `${mark || `on for ${Shell.percent(use)}`}, selective ${selectivity.toFixed(2)}`;
    return Shell.button([Shell.element('b', {}, `${layer}.${expert}`), ` ${labels.slice(0, 4).join(' · ')} `,
      Shell.element('span', { class: 'quiet' }, told)], () => this.state.set({ layer, expert }));
  }

  describe() {
    const symbols = { 'always on': 'diamond', dead: 'triangle' };
    return {
      x: { name: 'tokens for which it is on', share: true, min: 0, max: 1 }, y: { name: 'selective', min: 0, max: 1 },
      tell: ({ x, y, layer, expert, mark }) => `layer ${layer}, expert ${expert}${mark && `, ${mark}`}\n` +
        `on for ${Shell.percent(x)}, selective ${y.toFixed(2)}`,
      lines: [{ name: 'experts', hidden: true, scatter: true, colour: Shell.colour('on'),
        points: this.shown.map(({ layer, expert, use: x, selectivity: y, mark, found }) => ({ x, y, layer, expert, mark,
          symbol: symbols[mark], size: mark ? 11 : 6, colour: mark ? Shell.colour('second') : undefined,
          opacity: found ? 0.6 : 0.08 })) }],
    };
  }

  rows() {
    return ['Experts, the most selective first', ['layer.expert', 'on for', 'selective', { words: 'mark' },
      { words: 'strongest tokens' }],
      this.shown.filter(({ found }) => found).map(({ layer, expert, use, selectivity, mark, labels }) =>
        [`${layer}.${expert}`, Shell.percent(use), selectivity.toFixed(2), { words: mark },
          { words: labels.join(' · ') }])];
  }
}
