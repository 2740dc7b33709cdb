'use strict';
/* What stays beside the text: the chosen token, what the model expected there, its experts, and the chosen expert. */

const ONE = [['off', 'off'], ['usual', 'on'], ['more', 'on, though for at most a quarter of all tokens'],
  ['less', 'off, though on for three quarters']];
const BOTH = [['off', 'off in both'], ['usual', 'on in both'], ['more', 'on in B alone'], ['less', 'on in A alone']];

class TokenPanel {
  constructor(state) {
    this.state = state;
    const { element } = Shell;
    this.title = element('h2', { class: 'first' });
    this.told = element('p', { 'aria-live': 'polite', class: 'told' });
    this.facts = element('div', { class: 'sideways' });
    this.next = element('div', { class: 'next' });
    this.unusual = element('div');
    this.legend = element('p', { class: 'legend' });
    this.picture = new Shell.Picture({
      label: 'Map of the experts of the chosen token, by layer',
      caption: 'A row is a layer and a field an expert, a fixed group of neurons; what is off was not computed.',
      height: () => state.routing.layers * 8 + 66,
      options: () => this.options(),
      rows: () => this.rows(),
      onPick: ({ value }) => state.set({ layer: value[1], expert: value[0] }),
    });
    this.chosen = element('section', { 'aria-label': 'The chosen expert' });
    this.box = element('aside', { class: 'panel side', tabindex: '0', 'aria-label': 'The chosen token and expert' },
      this.title, this.told, this.facts, this.next,
      element('h3', {}, 'Its experts'), this.legend, this.picture.box, this.unusual, this.chosen);
    state.onChange(['run', 'token', 'step'], () => {
      this.showToken();
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.showExperts(), PAUSE_MS);
    });
    state.onChange(['layer', 'expert'], (names) => {
      this.showExpert();
      this.picture.drawSoon();
      if (!names.includes('token')) this.box.scrollTop = this.chosen.offsetTop - this.box.offsetTop;
    });
  }

  /* The runs that read the chosen token, each with its place there. */
  places() {
    return this.state.routings.map((routing, run) => ({ routing, run, token: this.state.at(run) }))
      .filter(({ token }) => token !== null);
  }

  show() {
    this.showToken();
    this.showExperts();
  }

  showToken() {
    const { routing, token, run } = this.state;
    const [all, used] = [routing.all, routing.totals[token]];
    this.title.textContent = `“${routing.list.label(token)}”`;
    this.told.textContent = `${nameOf(this.state, run) || 'This is '}token ${Shell.count(token + 1)} of ` +
      `${Shell.count(routing.length)}: it skipped ${Shell.count(all - used)} of ${Shell.count(all)} experts and ` +
      `used ${Shell.percent(used / all)} of the FFN neurons.`;
    this.showFacts();
    const predicted = this.places().filter((place) => place.routing.next);
    this.next.replaceChildren(...predicted.map((place) => this.nextOf(place)));
  }

  showExperts() {
    this.showUnusual();
    this.showExpert();
    this.legend.replaceChildren(...(this.compared() ? BOTH : ONE).map(([shade, words]) =>
      Shell.element('span', {}, Shell.element('span', { class: `key ${shade}` }), words)));
    this.picture.draw();
  }

  showFacts() {
    const { step, routings } = this.state;
    const places = this.places();
    const tenth = (value) => value.toFixed(1);
    const share = ({ routing, token }) => routing.totals[token] / routing.all;
    const rows = [
      ['neurons used', share, Shell.percent, points],
      ['at the slider', ({ routing, token }) => (step === null ? NaN : routing.shares(step)[token]),
        Shell.percent, points],
      ['more than, of tokens', (place) => rankOf(place.routing.known.shares, share(place)),
        (found) => Shell.percent(found, 0), points],
      ['surprise, bits', ({ routing, token }) => (token ? routing.surprise?.[token] : NaN), tenth, tenth],
      ['entropy after, bits', ({ routing, token }) => routing.entropy?.[token], tenth, tenth],
    ].map(([name, value, words, difference]) => {
      const values = places.map((place) => value(place) ?? NaN);
      const change = values[1] - values[0];
      return [name, ...values.map((each) => (Number.isNaN(each) ? '' : words(each))), ...(places.length < 2 ? []
        : [Number.isNaN(change) ? '' : `${change < 0 ? '−' : '+'}${difference(Math.abs(change))}`])];
    }).filter((row) => row.slice(1).some(Boolean));
    const names = places.length > 1 ? ['A', 'B', 'B − A'] : [routings.length > 1 ? 'AB'[places[0].run] : 'here'];
    this.facts.replaceChildren(Shell.table('The token in numbers', ['', ...names], rows));
  }

  /* What a model expected after the token, the likeliest first. */
  nextOf({ routing, run, token }) {
    const { element } = Shell;
    const came = token + 1 < routing.length ? routing.list.label(token + 1) : null;
    const items = routing.expected(token).map(([word, chance]) => {
      const shown = /^[\s⏎]*$/.test(word) ? word.replaceAll(' ', '␣') || '‹nothing›' : word;
      const item = element('li', { class: word === came && 'came' }, element('bdi', {}, shown),
        ` ${Shell.percent(chance)}${word === came ? ' came' : ''}`);
      item.style.setProperty('--chance', `${100 * chance}%`);
      return item;
    });
    const of = this.state.routings.length > 1 ? ` of ${'AB'[run]}` : '';
    return element('div', {}, element('h3', {}, `Likeliest next tokens${of}`), element('ol', {}, ...items));
  }

  /* The places of a token that both runs read, where they are of one model, so that their experts are the same. */
  compared() {
    const [a, b] = this.places();
    return b && a.routing.known === b.routing.known ? [a, b] : null;
  }

  showUnusual() {
    const { element } = Shell;
    const { routing, token } = this.state;
    const { on, off } = routing.unusual(token);
    const list = (title, found) => (found.length ? [element('p', {}, `${title} (${Shell.count(found.length)}):`),
      element('p', { class: 'choices' }, ...found.slice(0, 5).map(({ layer, expert, use }) => Shell.button(
        `${layer}.${expert}, on for ${Shell.percent(use, 0)}`, () => this.state.set({ layer, expert }))))] : []);
    const usual = routing.totals[token] - on.length;
    this.unusual.replaceChildren(element('p', {},
      `${Shell.count(usual)} of its ${Shell.count(routing.totals[token])} experts are usual.`),
      ...list('On, though for at most a quarter of all tokens', on),
      ...list('Skipped, though three quarters of all tokens use them', off));
  }

  options() {
    const { routing, layer, expert, token } = this.state;
    const compared = this.compared();
    const kinds = compared ? BOTH : ONE;
    const kindOf = (row, column) => {
      if (!compared) return routing.kind(row, token, column);
      const [a, b] = compared.map((place) => place.routing.isOn(row, place.token, column));
      return [0, 3, 2, 1][a + 2 * b];
    };
    const cells = upTo(routing.layers).flatMap((row) =>
      upTo(routing.experts).map((column) => [column, row, kindOf(row, column)]));
    return {
      grid: { left: 30, right: 8, top: 24, bottom: 40 },
      tooltip: Shell.tooltip(({ value }) => `layer ${value[1]}, expert ${value[0]}: ${kinds[value[2]][1]}`),
      xAxis: Shell.axis({ type: 'category', name: 'expert', nameLocation: 'middle', nameGap: 24,
        data: upTo(routing.experts).map(String) }),
      yAxis: layerAxis(routing.layers),
      visualMap: { show: false, type: 'piecewise', dimension: 2, pieces: kinds.map(([shade], value) => ({ value,
        color: Shell.colour(shade) })) },
      series: [{ type: 'heatmap', data: cells, progressive: 0,
        emphasis: { itemStyle: { borderColor: Shell.colour('ink'), borderWidth: 2 } },
        itemStyle: { borderColor: Shell.colour('panel'), borderWidth: 0.5 } },
      /* Drawn last, so that its border lies above its neighbours. */
      { type: 'heatmap', silent: true, data: [cells[layer * routing.experts + expert]],
        itemStyle: { borderColor: Shell.colour('mark'), borderWidth: 3 } }],
    };
  }

  rows() {
    const { routing, token } = this.state;
    return [`Experts on for “${routing.list.label(token)}”`, ['layer', 'on', { words: 'experts' }],
      upTo(routing.layers).map((layer) => {
        const active = upTo(routing.experts).filter((expert) => routing.isOn(layer, token, expert));
        return [layer, `${active.length} of ${routing.experts}`, { words: active.join(', ') || 'none' }];
      })];
  }

  showExpert() {
    const { element } = Shell;
    const { routing, layer, expert, token } = this.state;
    const { known } = routing;
    const pick = (name, length) => {
      const { box, select } = Shell.choice(name, upTo(length).map((value) => [String(value), value]), (value) => {
        this.state.set({ [name]: value });
        this.chosen.querySelector(`[data-pick="${name}"]`)?.focus();
      }, { chosen: this.state[name] });
      select.dataset.pick = name;
      return box;
    };
    const mark = known.mark(layer, expert);
    const rows = known.strongest(layer, expert).map(({ position, score, switchedOn, occurrences }) =>
      [known.list.label(position), { words: known.list.context(position) }, score.toFixed(3),
        `${Shell.count(switchedOn)} of ${Shell.count(occurrences)}`]);
    this.chosen.replaceChildren(element('h3', {}, `Expert ${expert} of layer ${layer}${mark && `, ${mark}`}`),
      element('div', { class: 'controls' }, pick('layer', routing.layers), pick('expert', routing.experts)),
      element('p', { class: 'told', 'aria-live': 'polite' }, `On for ${Shell.percent(known.useOf(layer, expert))} of ` +
        `the tokens of ${known.text}, selective ${known.selectivityOf(layer, expert).toFixed(2)}; ` +
        `${routing.isOn(layer, token, expert) ? 'on' : 'off'} for the chosen token.`),
      rows.length ? Shell.scrollBox('Tokens that switch the expert on most',
        Shell.table('Tokens that switch it on most, each at its strongest place',
          ['token', { words: 'in the text' }, 'score', 'on for'], rows))
        : element('p', {}, 'No token there switches it on.'));
  }
}
