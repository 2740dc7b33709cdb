'use strict';
/* One expert: how often it is on, and the tokens of the reference text that switch it on most. */

class ExpertPanel {
  constructor(routing, choice) {
    Object.assign(this, { routing, choice });
    const { element } = Shell;
    const numbers = (count) => Array.from({ length: count }, (_, index) => element('option', {}, String(index)));
    this.layer = element('select', {}, ...numbers(routing.layers));
    this.expert = element('select', {}, ...numbers(routing.experts));
    this.told = element('p', { 'aria-live': 'polite', class: 'told' });
    this.tokens = Shell.scrollBox('Tokens that switch the expert on most');
    const { known } = routing;
    this.picture = new Shell.Picture({
      label: 'Bars of how often each expert of the chosen layer is on',
      caption: 'Each bar is an expert of this layer, and its height the share of the tokens of the reference text that ' +
        'switch it on; the chosen expert is the bar in the other colour.',
      options: () => this.options(),
      rows: () => this.rows(),
      height: () => 208,
      onPick: ({ dataIndex }) => choice.set({ expert: dataIndex }),
    });
    const source = known.isOwn ? 'The reference text is this text itself.' : `The reference text is ${known.text}.`;
    this.box = element('section', { class: 'panel half' }, element('h3', {}, 'One expert'),
      element('div', { class: 'controls' }, element('label', {}, 'Layer ', this.layer),
        element('label', {}, 'Expert ', this.expert)),
      this.told, this.tokens,
      element('p', { class: 'caption' }, 'These tokens got the highest scores from the router for this expert, each ' +
        'distinct token once, at its strongest place; an expert is on where the score is above the threshold.'),
      this.picture.box, element('p', { class: 'quiet' }, [source, ...known.notes].join(' ')));
    this.layer.addEventListener('change', () => choice.set({ layer: this.layer.selectedIndex }));
    this.expert.addEventListener('change', () => choice.set({ expert: this.expert.selectedIndex }));
    choice.onChange(['token', 'layer', 'expert'], () => this.show());
  }

  show() {
    const { routing, choice } = this;
    const { known } = routing;
    this.layer.selectedIndex = choice.layer;
    this.expert.selectedIndex = choice.expert;
    const use = known.use(choice.layer, choice.expert);
    const state = routing.isOn(choice.layer, choice.token, choice.expert) ? 'on' : 'off';
    this.told.textContent = `Expert ${choice.expert} of layer ${choice.layer} is on for ${Shell.percent(use)} of the ` +
      `${Shell.count(known.list.length)} tokens of the reference text, and ${state} for the chosen token ` +
      `“${routing.list.label(choice.token)}”.`;
    const strongest = known.strongest(choice.layer, choice.expert);
    const rows = strongest.map((found) => [known.list.label(found.position), { mark: known.list.context(found.position) },
      found.score.toFixed(3), `${Shell.count(found.switchedOn)} of ${Shell.count(found.occurrences)}`]);
    this.tokens.replaceChildren(rows.length
      ? Shell.table(`Tokens that switch expert ${choice.expert} of layer ${choice.layer} on most`,
        ['token', { words: 'in the text' }, 'router score', 'on for'], rows)
      : Shell.element('p', {}, 'No token of the reference text switches this expert on.'));
    this.picture.drawSoon();
  }

  options() {
    const { routing, choice } = this;
    const bars = Array.from({ length: routing.experts }, (_, expert) => ({ value: routing.known.use(choice.layer, expert),
      itemStyle: { color: Shell.colour(expert === choice.expert ? 'mark' : 'on') } }));
    return {
      grid: { left: LEFT, right: 10, top: 12, bottom: 42 },
      tooltip: Shell.tooltip(({ dataIndex, value }) => `expert ${dataIndex}: on for ${Shell.percent(value)}`),
      xAxis: Shell.axis({ type: 'category', name: 'expert', nameLocation: 'middle', nameGap: 26,
        data: bars.map((_, expert) => String(expert)) }),
      yAxis: Shell.axis({ type: 'value', min: 0, max: 1, axisLabel: { formatter: (value) => Shell.percent(value, 0) } }),
      series: [{ type: 'bar', data: bars, barCategoryGap: '15%', barMinHeight: 1 }],
    };
  }

  rows() {
    const { routing, choice } = this;
    return [`Share of tokens that switch each expert of layer ${choice.layer} on`, ['expert', 'share of tokens'],
      Array.from({ length: routing.experts }, (_, expert) => [expert, Shell.percent(routing.known.use(choice.layer, expert))])];
  }
}
