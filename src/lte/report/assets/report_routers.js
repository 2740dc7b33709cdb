'use strict';
/* The health of the routers of one run: scores around tau, and experts that are never or always on. */

/* The routing to begin with: of the point with the most seeds that has one. */
function mostRouted(comparison) {
  const points = comparison.points.filter((point) => point.runs.some((run) => run.routing?.histogram));
  const most = Math.max(...points.map((point) => point.runs.length));
  return points.find((point) => point.runs.length === most)?.runs.find((run) => run.routing?.histogram).routing;
}

class Routers {
  constructor(comparison) {
    const runs = comparison.points.flatMap((point) => point.runs.filter((run) =>
      run.routing?.histogram || run.routing?.dead)
      .map((run) => [`${pointTitle(point)}, seed ${run.seed}`, run.routing]));
    this.isEmpty = !runs.length;
    if (this.isEmpty) return;
    this.layer = null;
    const { element } = Shell;
    this.layerChoice = element('span', {});
    const choice = choiceOf('Run', runs, (routing) => this.show(routing));
    this.pictures = [this.scoreMap(), this.scoreBars(), this.expertBars()];
    this.boxes = this.pictures.map((picture, place) => element('div', { class: 'panel' },
      element('h3', {}, ['Scores by layer', 'Scores around tau', 'Dead and always-on experts'][place]),
      ...(place === 1 ? [element('div', { class: 'controls' }, this.layerChoice)] : []), picture.box));
    this.sentence = element('p', { role: 'status' });
    this.box = element('div', {}, element('div', { class: 'controls' }, choice.box), this.sentence,
      element('div', { class: 'columns two' }, ...this.boxes));
    const most = runs.findIndex(([, routing]) => routing === mostRouted(comparison));
    choice.select.value = String(Math.max(most, 0));
    this.show(runs[Math.max(most, 0)][1]);
  }

  show(routing) {
    this.routing = routing;
    this.layer = null;
    const layers = routing.active_fraction.map((_, layer) => [`layer ${layer}`, layer]);
    const choice = choiceOf('Layer', [['all layers', null], ...layers], (layer) => {
      this.layer = layer;
      this.pictures[1].draw();
    });
    this.layerChoice.replaceChildren(choice.box);
    this.sentence.textContent = this.health();
    this.boxes.forEach((box, place) => { box.hidden = !(place < 2 ? routing.histogram : routing.dead); });
    this.pictures.forEach((picture) => picture.draw());
  }

  health() {
    const { dead, always_on: always, experts, tokens } = this.routing;
    if (!dead) return '';
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    const on = tokens ? ` on ${Shell.count(tokens)} tokens` : '';
    return `Of ${Shell.count(sum(experts))} experts ${Shell.count(sum(dead))} were never used${on}, and ` +
      `${Shell.count(sum(always))} by every token.`;
  }

  get tau() {
    return this.routing.threshold ?? 0.5;
  }

  share(units) {
    return (units ?? 0) * Shell.data.histogram_unit;
  }

  binNames() {
    const bins = this.routing.histogram[0].length;
    return Array.from({ length: bins }, (_, bin) => `${(bin / bins).toFixed(3)} to ${((bin + 1) / bins).toFixed(3)}`);
  }

  /* Bins have an axis without labels, and the scores at their edges one with labels. */
  scoreAxes(names) {
    const name = `router score; on above tau = ${Draw.short(this.tau)}, dashed`;
    return [{ type: 'category', data: names, show: false },
      Shell.axis({ type: 'value', min: 0, max: 1, interval: 0.1, position: 'bottom', ...Draw.below(name),
        axisLabel: { formatter: (value) => value.toFixed(1), hideOverlap: true } })];
  }

  scoreMap() {
    return new Shell.Picture({
      label: 'Map of router scores by layer',
      caption: 'A router gives every expert a score for every token, and those above tau (dashed) are computed: ' +
        'the stronger a field, the more of that layer’s scores lie there. Few scores near tau are a clear choice.',
      options: () => this.routing.histogram ? this.mapOptions() : {},
      rows: () => {
        const names = this.binNames();
        return ['Share of scores by layer and score', ['layer', ...names],
          this.routing.histogram.map((units, layer) =>
            [layer, ...units.map((each) => Shell.percent(this.share(each), 2))])];
      },
      height: () => 360,
    });
  }

  mapOptions() {
    const { histogram } = this.routing;
    const names = this.binNames();
    const highest = Math.max(...histogram.flat().map((units) => this.share(units)));
    /* Square roots, so that small shares show. */
    const data = histogram.flatMap((layer, row) => layer.map((units, bin) => [bin, row, Math.sqrt(this.share(units))]));
    return {
      grid: { left: 50, right: 14, top: 44, bottom: 50 },
      tooltip: Shell.tooltip(({ value }) =>
        `layer ${value[1]}\nscore ${names[value[0]]}\n${Shell.percent(value[2] ** 2, 2)} of the scores`),
      xAxis: this.scoreAxes(names),
      yAxis: Shell.axis({ type: 'category', inverse: true, data: histogram.map((_, layer) => String(layer)),
        name: 'layer', nameLocation: 'start' }),
      visualMap: { type: 'continuous', seriesIndex: 0, min: 0, max: Math.sqrt(highest) || 1, dimension: 2,
        orient: 'horizontal', left: 60, top: 0,
        itemHeight: 110, itemWidth: 12, calculable: false, inRange: { color: Shell.ramp() },
        text: [Shell.percent(highest), '0%'], textStyle: { color: Shell.colour('quiet') } },
      series: [{ type: 'heatmap', data, progressive: 0, emphasis: { disabled: true } }, Draw.threshold(this.tau)],
    };
  }

  /* The chosen layer's shares by bin, or the mean over layers. */
  shares() {
    const { histogram } = this.routing;
    const layers = this.layer === null ? histogram : [histogram[this.layer]];
    return layers[0].map((_, bin) => mean(layers.map((units) => this.share(units[bin]))));
  }

  scoreBars() {
    return new Shell.Picture({
      label: 'Histogram of router scores around tau',
      caption: 'Scores left of the dashed line switch an expert off, those right of it switch it on; a hill on ' +
        'each side with a valley at the line means that the routers know what they want.',
      options: () => {
        if (!this.routing.histogram) return {};
        const names = this.binNames();
        return {
          grid: { left: 54, right: 14, top: 44, bottom: 50 },
          tooltip: Shell.tooltip(({ name, value }) => `score ${name}\n${Shell.percent(value, 2)} of the scores`),
          xAxis: this.scoreAxes(names),
          yAxis: Draw.axis('share of the scores', { type: 'value',
            axisLabel: { formatter: (value) => `${Number((100 * value).toPrecision(3))}%` } }),
          series: [{ type: 'bar', barCategoryGap: '10%', data: this.shares(),
            itemStyle: { color: Shell.colour('on') } }, Draw.threshold(this.tau)],
        };
      },
      rows: () => {
        const names = this.binNames();
        return [`Share of scores, ${this.layer === null ? 'all layers' : `layer ${this.layer}`}`,
          [{ words: 'score' }, 'share'],
          this.shares().map((share, bin) => [{ words: names[bin] }, Shell.percent(share, 2)])];
      },
      height: () => 360,
    });
  }

  expertBars() {
    const kinds = [['dead', 'never on', 'curve-1'], ['always_on', 'always on', 'curve-2']];
    return new Shell.Picture({
      label: 'Experts that are never on and always on, by layer',
      caption: 'An expert that no token uses could be deleted, and one that every token uses needs no router: both ' +
        'are capacity that routing does not use.',
      options: () => {
        const { dead, experts } = this.routing;
        if (!dead) return {};
        return {
          legend: { top: 0, left: 50, selectedMode: false, textStyle: { color: Shell.colour('ink') } },
          grid: { left: 50, right: 14, top: 50, bottom: 46 },
          tooltip: Shell.tooltip(({ name, seriesName, value, dataIndex }) =>
            `layer ${name}\n${value} of ${experts[dataIndex]} experts ${seriesName}`),
          xAxis: Shell.axis({ type: 'category', data: dead.map((_, layer) => String(layer)), ...Draw.below('layer') }),
          yAxis: Draw.axis('experts', { type: 'value', minInterval: 1 }),
          series: kinds.map(([key, name, shade], place) =>
            ({ type: 'bar', name, stack: 'experts', data: this.routing[key],
            itemStyle: { color: Shell.colour(shade), decal: place ? { symbol: 'rect', dashArrayX: [1, 0],
              dashArrayY: [2, 4], rotation: 0.8,
              color: Shell.colour('paper') } : undefined } })),
        };
      },
      rows: () => ['Experts by layer', ['layer', 'experts', 'never on', 'always on'],
        this.routing.dead.map((count, layer) => [layer, this.routing.experts[layer], count,
          this.routing.always_on[layer]])],
      height: () => 300,
    });
  }

  remove() {
    this.pictures?.forEach((picture) => picture.remove());
  }
}
