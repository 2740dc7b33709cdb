'use strict';
/* Two maps: experts on by layer and token, and the experts of one token by layer. */

const MAP_CELL = 14;
/* Room for the labels of a vertical axis. */
const LEFT = 46;

function layerAxis(routing) {
  const labels = Array.from({ length: routing.layers }, (_, layer) => String(layer));
  return Shell.axis({ type: 'category', data: labels, inverse: true, name: 'layer', nameLocation: 'start' });
}

function layerHeight(layers) {
  return Math.max(layers * 13, 60);
}

class LayerMap {
  constructor(routing, choice, scale) {
    Object.assign(this, { routing, choice, scale, first: 0, shown: 0 });
    const { element } = Shell;
    this.slider = element('input', { type: 'range', min: '0', step: '1', value: '0' });
    this.place = element('output', {});
    this.sliderBox = element('label', { class: 'wide' }, 'Tokens shown ', this.slider, this.place);
    this.picture = new Shell.Picture({
      label: 'Map of the number of active experts by layer and token',
      caption: 'A column is a token and a row is a layer, the first layer on top; the colour of a field tells how many ' +
        'of the experts of this layer the token switched on.',
      options: (width) => this.options(width),
      rows: () => this.rows(),
      height: () => layerHeight(routing.layers) + 140,
      onPick: ({ value }) => choice.set({ token: value[3], layer: value[1] }),
    });
    this.box = element('section', { class: 'panel' }, element('h3', {}, 'Layer by layer'),
      element('div', { class: 'controls' }, this.sliderBox), this.picture.box);
    this.slider.addEventListener('input', () => {
      this.first = Number(this.slider.value);
      this.picture.draw();
    });
    choice.onChange(['token', 'layer'], () => {
      this.follow();
      this.picture.drawSoon();
    });
  }

  /* Moves the window to the chosen token if that lies outside. */
  follow() {
    const { token } = this.choice;
    if (token < this.first || token >= this.first + this.shown) this.first = token - Math.floor(this.shown / 2);
  }

  fit(width) {
    const { length } = this.routing;
    const before = this.shown;
    this.shown = Math.min(length, Math.max(Math.floor((width - LEFT - 10) / MAP_CELL), 5));
    if (before !== this.shown) this.follow();
    this.first = Math.min(Math.max(this.first, 0), length - this.shown);
    this.slider.max = String(length - this.shown);
    this.slider.value = String(this.first);
    const words = `${Shell.count(this.first + 1)} to ${Shell.count(this.first + this.shown)} of ${Shell.count(length)}`;
    this.place.textContent = words;
    this.slider.setAttribute('aria-valuetext', words);
    this.sliderBox.hidden = this.shown === length;
  }

  options(width) {
    this.fit(width);
    const { routing, choice, first, shown } = this;
    const [low, high] = this.scale.count;
    const mark = Shell.colour('mark');
    const quiet = Shell.colour('quiet');
    const cells = [];
    for (let layer = 0; layer < routing.layers; layer++) {
      for (let column = 0; column < shown; column++) {
        const token = first + column;
        const chosen = token === choice.token;
        cells.push({ value: [column, layer, routing.count(layer, token), token], itemStyle: chosen
          ? { borderColor: mark, borderWidth: layer === choice.layer ? 3.5 : 1.5 } : undefined });
      }
    }
    const labels = Array.from({ length: shown }, (_, column) => routing.list.label(first + column));
    return {
      grid: { left: LEFT, right: 10, top: 40, bottom: 90, width: Math.min(shown * 2 * MAP_CELL, width - LEFT - 10) },
      tooltip: Shell.tooltip(({ value }) => `${routing.list.label(value[3])}\nlayer ${value[1]}: ${value[2]} of ` +
        `${routing.experts} experts on`),
      xAxis: Shell.axis({ type: 'category', data: labels,
        axisLabel: { interval: 0, rotate: 90, fontSize: 11, width: 80, overflow: 'truncate',
          color: (_, column) => (first + column === choice.token ? mark : quiet) } }),
      yAxis: layerAxis(routing),
      visualMap: { type: 'continuous', min: low, max: Math.max(high, low + 1), dimension: 2, orient: 'horizontal',
        left: LEFT + 20, top: 0, itemHeight: Math.min(width / 4, 120), itemWidth: 12, calculable: false, inRange: { color: Shell.ramp() },
        textStyle: { color: quiet }, text: [`${high} experts on`, `${low}`] },
      series: [{ type: 'heatmap', data: cells, progressive: 0, emphasis: { disabled: true } }],
    };
  }

  rows() {
    const { routing, first, shown } = this;
    const columns = Array.from({ length: shown }, (_, column) => first + column);
    const layers = Array.from({ length: routing.layers }, (_, layer) => layer);
    return ['Experts on, by token (row) and layer (column)', ['token', { words: 'text' }, ...layers.map((layer) => `layer ${layer}`)],
      columns.map((token) => [token + 1, { words: routing.list.label(token) }, ...layers.map((layer) => routing.count(layer, token))])];
  }
}

class ExpertMap {
  constructor(routing, choice) {
    Object.assign(this, { routing, choice });
    const { element } = Shell;
    this.title = element('h3', {});
    this.picture = new Shell.Picture({
      label: 'Map of the experts that the chosen token switched on, by layer',
      caption: 'A row is a layer and a field in it is an expert, a fixed group of neurons; filled fields are those that ' +
        'the router switched on for this token, and the others were not computed. Choose a field to see more of its expert.',
      options: () => this.options(),
      rows: () => this.rows(),
      height: () => layerHeight(routing.layers) + 72,
      onPick: ({ value }) => choice.set({ layer: value[1], expert: value[0] }),
    });
    this.picture.plot.style.minWidth = `${LEFT + 10 + 5 * routing.experts}px`;
    const wide = element('div', { class: 'sideways', tabindex: '0', role: 'region', 'aria-label': 'Experts of the token, scrollable' },
      this.picture.plot);
    this.picture.box.prepend(wide);
    this.box = element('section', { class: 'panel half' }, this.title, element('p', { class: 'legend' },
      element('span', {}, element('span', { class: 'key on' }), 'on'),
      element('span', {}, element('span', { class: 'key off' }), 'off, not computed')), this.picture.box);
    choice.onChange(['token', 'layer', 'expert'], () => this.picture.drawSoon());
  }

  options() {
    const { routing, choice } = this;
    this.title.textContent = `Experts of the token “${routing.list.label(choice.token)}”`;
    const mark = Shell.colour('mark');
    const cells = [];
    for (let layer = 0; layer < routing.layers; layer++) {
      for (let expert = 0; expert < routing.experts; expert++) {
        cells.push({ value: [expert, layer, routing.isOn(layer, choice.token, expert)] });
      }
    }
    /* Drawn last, so that its border lies above its neighbours. */
    const chosen = cells.splice(choice.layer * routing.experts + choice.expert, 1)[0];
    cells.push({ ...chosen, itemStyle: { borderColor: mark, borderWidth: 3 } });
    const colours = [Shell.colour('off'), Shell.colour('on')];
    return {
      grid: { left: LEFT, right: 10, top: 30, bottom: 42 },
      tooltip: Shell.tooltip(({ value }) => `layer ${value[1]}, expert ${value[0]}: ${value[2] ? 'on' : 'off'}`),
      xAxis: Shell.axis({ type: 'category', name: 'expert', nameLocation: 'middle', nameGap: 26,
        data: Array.from({ length: routing.experts }, (_, expert) => String(expert)) }),
      yAxis: layerAxis(routing),
      visualMap: { show: false, type: 'piecewise', dimension: 2, pieces: [0, 1].map((value) => ({ value, color: colours[value] })) },
      series: [{ type: 'heatmap', data: cells, progressive: 0, emphasis: { disabled: true },
        itemStyle: { borderColor: Shell.colour('panel'), borderWidth: 1 } }],
    };
  }

  rows() {
    const { routing, choice } = this;
    const layers = Array.from({ length: routing.layers }, (_, layer) => layer);
    return [`Experts on for “${routing.list.label(choice.token)}”`, ['layer', 'on', { words: 'experts' }],
      layers.map((layer) => {
        const active = routing.activeExperts(layer, choice.token);
        return [layer, `${active.length} of ${routing.experts}`, { words: active.join(', ') || 'none' }];
      })];
  }
}
