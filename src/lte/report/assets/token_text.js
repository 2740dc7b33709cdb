'use strict';
/* The text token by token, coloured by how much of the network each used; a list box in which one token is chosen. */

class TokenText {
  constructor(routing, choice, scale, prefix) {
    Object.assign(this, { routing, choice, scale, prefix });
    const { element } = Shell;
    this.spans = Array.from({ length: routing.length }, (_, index) => this.span(index));
    this.text = element('div', { class: 'token-text', role: 'listbox', tabindex: '0', dir: 'auto',
      'aria-label': 'Tokens of the text', 'aria-orientation': 'horizontal' }, ...this.spans);
    this.colouring = element('select', {}, element('option', { value: 'share' }, 'share of the neurons used'),
      element('option', { value: 'layer' }, 'experts on in the chosen layer'),
      element('option', { value: 'expert' }, 'whether the chosen expert is on'));
    this.legend = element('p', { class: 'legend' });
    this.told = element('p', { 'aria-live': 'polite', class: 'told' });
    this.box = element('section', { class: 'panel' }, element('h3', {}, 'The text, token by token'),
      element('div', { class: 'controls' }, element('label', {}, 'Colour by ', this.colouring)),
      this.legend, this.text, this.told,
      element('p', { class: 'caption' }, 'Every coloured piece is a token, the unit in which the model reads; the ' +
        'darker it is (the lighter, on a dark page), the more of the network the model used for it. Choose a token with ' +
        'a click or with the arrow keys to see more of it below.'));
    this.listen();
  }

  span(index) {
    const { list } = this.routing;
    const text = list.texts[index];
    const shown = text ? visible(text).replaceAll('⏎', '⏎\n') : list.label(index);
    return Shell.element('span', { class: text ? 'token' : 'token entry', role: 'option', id: `${this.prefix}-${index}`,
      'aria-selected': 'false' }, shown);
  }

  listen() {
    this.text.addEventListener('click', (event) => {
      const index = this.spans.indexOf(event.target);
      if (index >= 0) this.choice.set({ token: index });
    });
    this.text.addEventListener('keydown', (event) => this.onKey(event));
    this.colouring.addEventListener('change', () => this.paint());
    this.choice.onChange(['token'], () => this.select(true));
    this.choice.onChange(['layer', 'expert'], () => {
      if (this.colouring.value !== 'share') this.paint();
    });
    Shell.onTheme(() => this.paint());
  }

  onKey(event) {
    const last = this.spans.length - 1;
    const now = this.choice.token;
    const goals = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - 10, PageDown: now + 10, Home: 0, End: last };
    const goal = { ArrowUp: () => this.lineAway(-1), ArrowDown: () => this.lineAway(1) }[event.key]?.() ?? goals[event.key];
    if (goal === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.choice.set({ token: Math.min(Math.max(goal, 0), last) });
  }

  /* The token of the line above or below that stands nearest to the chosen one. */
  lineAway(step) {
    const { offsetTop: top, offsetLeft: left } = this.spans[this.choice.token];
    let best = this.choice.token;
    let line = null;
    for (let index = best + step; index >= 0 && index < this.spans.length; index += step) {
      const span = this.spans[index];
      if (Math.abs(span.offsetTop - top) < 4) continue;
      if (line !== null && Math.abs(span.offsetTop - line) >= 4) break;
      if (line === null || Math.abs(span.offsetLeft - left) < Math.abs(this.spans[best].offsetLeft - left)) best = index;
      line = span.offsetTop;
    }
    return best;
  }

  /* What a token is coloured by: its value, and the lowest and highest value. */
  measure() {
    const { routing, choice, scale } = this;
    if (this.colouring.value === 'expert') {
      return { value: (token) => routing.isOn(choice.layer, token, choice.expert), low: 0, high: 1, words: ['off', 'on'] };
    }
    if (this.colouring.value === 'layer') {
      const [low, high] = scale.count;
      const words = [`${low}`, `${high} of ${routing.experts} experts in layer ${choice.layer}`];
      return { value: (token) => routing.count(choice.layer, token), low, high, words };
    }
    const [low, high] = scale.share;
    return { value: (token) => routing.shares[token], low, high,
      words: [Shell.percent(low), `${Shell.percent(high)} of the FFN neurons`] };
  }

  paint() {
    const { value, low, high, words } = this.measure();
    this.spans.forEach((span, token) => {
      const rgb = Shell.rampColour((value(token) - low) / (high - low || 1));
      span.style.backgroundColor = `rgb(${rgb.join(',')})`;
      span.style.color = Shell.inkOn(rgb);
    });
    const ramp = Shell.element('span', { class: 'ramp' });
    ramp.style.background = `linear-gradient(to right, ${Shell.ramp().join(',')})`;
    this.legend.replaceChildren(words[0], ramp, words[1]);
  }

  select(follow) {
    const { routing, choice } = this;
    this.chosen?.setAttribute('aria-selected', 'false');
    this.chosen = this.spans[choice.token];
    this.chosen.setAttribute('aria-selected', 'true');
    this.text.setAttribute('aria-activedescendant', this.chosen.id);
    if (follow) this.reveal();
    const total = routing.layers * routing.experts;
    this.told.textContent = `Token ${Shell.count(choice.token + 1)} of ${Shell.count(routing.length)}, ` +
      `“${routing.list.label(choice.token)}”: ${Shell.count(routing.total(choice.token))} of ${Shell.count(total)} ` +
      `experts are on, ${Shell.percent(routing.shares[choice.token])} of the FFN neurons.`;
  }

  /* Scrolls the box, and not the page, to the chosen token. */
  reveal() {
    const { offsetTop: top, offsetHeight: height } = this.chosen;
    if (top < this.text.scrollTop) this.text.scrollTop = top - height;
    else if (top + height > this.text.scrollTop + this.text.clientHeight) this.text.scrollTop = top + 2 * height - this.text.clientHeight;
  }

  show() {
    this.paint();
    this.select(false);
  }
}
