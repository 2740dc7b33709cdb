'use strict';
/* Quality against four costs, the results as a table, and the details of the chosen point. */

const PAPER_SWITCH = '\u0000paper';
const COSTS = [
  { key: 'sparsity', name: 'FFN sparsity', axis: 'FFN sparsity: share of neurons skipped per token', isShare: true,
    better: 'right', says: 'the share of FFN neurons that a token skips' },
  { key: 'gflops', name: 'FLOPs per token', axis: 'GFLOPs per token (1 G = 2^30)', better: 'left',
    says: 'the arithmetic for one token, routers included' },
  { key: 'megabytes', name: 'Bytes per token', axis: 'MB of weights read per token', better: 'left',
    says: 'the weights that must come from memory for one token, which bounds the speed of decoding' },
  { key: 'latency_ms', name: 'Decode latency', axis: 'measured decoding step (ms)', better: 'left',
    says: 'the measured time of one decoding step at batch size 1' },
];

class Tradeoff {
  constructor(comparison, switches) {
    Object.assign(this, { comparison, switches, cost: COSTS[0] });
    const { element } = Shell;
    this.dense = comparison.points.filter((point) => point.is_dense);
    this.details = new DetailsPanel(comparison.metric);
    this.picture = new Shell.Picture({
      label: `${comparison.metric.name} against what a token costs, a curve for each method`,
      caption: '',
      options: (width) => this.options(width),
      rows: () => this.rows(),
      height: (width) => (width < 500 ? 360 : 460),
      onPick: ({ data }) => data?.place !== undefined && this.choose(data.place),
    });
    this.caption = this.picture.box.querySelector('.caption');
    this.table = new SortableTable({ ...comparison.results, csv: this.csv(),
      icon: (place) => Looks.icon(this.look(comparison.points[place])), onChoose: (place, opener) =>
        this.choose(place, opener) });
    this.fillSwitches();
    this.box = element('div', { class: 'panel' }, this.costChoice(), switches.box, this.picture.box, this.details.box,
      this.table.box);
    this.say();
  }

  look(point) {
    return point.is_dense ? Looks.dense(this.dense.indexOf(point)) : Looks.of(point.curve);
  }

  fillSwitches() {
    const seen = new Map();
    this.comparison.points.forEach((point) => {
      if (!seen.has(point.curve)) seen.set(point.curve, { name: point.curve, look: this.look(point) });
    });
    if (this.comparison.paper.length) {
      seen.set(PAPER_SWITCH, { name: PAPER_SWITCH, label: "the paper's points (hollow)", hollow: true,
        look: Looks.of(this.comparison.paper[0].method) });
    }
    this.switches.fill([...seen.values()]);
    this.switches.onChange(() => this.picture.draw());
  }

  costChoice() {
    const { element } = Shell;
    const radios = COSTS.map((cost, place) => {
      const radio = element('input', { type: 'radio', name: 'cost', value: cost.key, checked: place === 0 });
      radio.addEventListener('change', () => {
        this.cost = cost;
        this.say();
        this.picture.draw();
      });
      return element('label', {}, radio, cost.name);
    });
    return element('fieldset', {}, element('legend', {}, 'Cost on the horizontal axis'),
      element('div', { class: 'choices' }, ...radios));
  }

  say() {
    const { metric, paper, paper_left_out: leftOut } = this.comparison;
    const up = metric.higher_is_better;
    const hollow = paper.length ? ' Hollow symbols are the paper’s own numbers, of other models and settings.' : '';
    const far = leftOut ? ` ${leftOut} of the paper’s numbers are too far from these to show.` : '';
    const dense = this.dense.length ? ' Horizontal lines are dense models, which compute everything.' : '';
    this.caption.textContent =
      `Each symbol is a trained model, further ${up ? 'up' : 'down'} is better quality, and the horizontal ` +
      `axis is ${this.cost.says}: the best trade-offs lie ${up ? 'top' : 'bottom'} ${this.cost.better}. ` +
      `Bars and bands are one standard deviation over seeds.${dense}${hollow}${far} Choose a symbol to see its runs.`;
  }

  choose(place, opener) {
    const point = this.comparison.points[place];
    this.table.choose(place);
    this.details.show(this.title(point), point.runs, opener ?? this.table.rowElements[place].querySelector('button'));
  }

  title(point) {
    return point.target === null || point.is_dense ? point.name
      : `${point.name}, target ${Draw.short(100 * point.target)}%`;
  }

  shown() {
    return this.comparison.points.map((point, place) => ({ point, place }))
      .filter(({ point }) => this.switches.isOn(point.curve));
  }

  paperShown() {
    if (!this.switches.isOn(PAPER_SWITCH)) return [];
    return this.comparison.paper.filter(({ x }) => x[this.cost.key] !== undefined);
  }

  text({ point, place, marker }) {
    const { metric } = this.comparison;
    const format = (value) => value.toFixed(metric.decimals);
    if (marker) return `${marker.label}\n${metric.name} ${format(marker.value)}\nother model and settings`;
    const spread = (found, form) => (found === null ? '-' : form(found.mean) +
      (found.sd === null ? '' : ` ± ${form(found.sd)}`));
    const cost = point[this.cost.key];
    const runs = point.runs.slice(0, 5)
      .map((run) => `seed ${run.seed}: ${Draw.isNumber(run.value) ? format(run.value) : '-'}`);
    if (point.runs.length > 5) runs.push(`and ${point.runs.length - 5} more seeds`);
    return [Draw.clip(this.title(this.comparison.points[place])),
      `${metric.name} ${spread(point.value, format)}`,
      `${this.cost.name} ${spread(cost, this.cost.isShare ? Shell.percent : Draw.short)}`, ...runs].join('\n');
  }

  options(width) {
    const { metric } = this.comparison;
    const shown = this.shown();
    const measured = shown.filter(({ point }) => point[this.cost.key] !== null);
    const paper = this.paperShown();
    if (!measured.length && !paper.length) return Draw.nothing(this.why(shown.length));
    const limits = ({ mean, sd }) => [mean - (sd ?? 0), mean, mean + (sd ?? 0)];
    const dense = shown.filter(({ point }) => point.is_dense);
    const y = [...[...measured, ...dense].flatMap(({ point }) => limits(point.value)),
      ...paper.map(({ value }) => value)];
    const x = [...measured.flatMap(({ point }) => limits(point[this.cost.key])),
      ...paper.map((marker) => marker.x[this.cost.key])];
    const perToken = metric.name === 'perplexity' ? ' per token' : '';
    return {
      grid: { left: 14, right: 24, top: 34, bottom: 46, containLabel: true },
      tooltip: Shell.tooltip(({ data }) => (data?.point || data?.marker ? this.text(data) : ''), { trigger: 'item' }),
      xAxis: this.cost.isShare ? Draw.shareAxis(...this.xName(width)) : { ...Draw.valueAxis('', x, { fromZero: true }),
        ...Draw.below(this.xName(width)[0]) },
      yAxis: Draw.valueAxis(`${metric.name}${perToken}, ${metric.higher_is_better ? 'higher' : 'lower'} is better`, y,
        { ratio: metric.higher_is_better ? Infinity : 3 }),
      series: [...this.curveSeries(measured), ...dense.map((each) => this.denseSeries(each)), this.barSeries(measured),
        ...this.paperSeries(paper)],
    };
  }

  xName(width) {
    const name = width < 500 ? this.cost.name : this.cost.axis;
    return [name, Draw.below(name)];
  }

  why(anyShown) {
    return anyShown ? `No shown run has a number for ${this.cost.name.toLowerCase()}` : 'All methods are switched off';
  }

  curveSeries(measured) {
    const curves = Map.groupBy(measured.filter(({ point }) => !point.is_dense), ({ point }) => point.curve);
    return [...curves].map(([name, items]) => {
      const look = Looks.of(name);
      const data = items.map((item) => ({ ...item, value: [item.point[this.cost.key].mean, item.point.value.mean] }));
      data.sort((a, b) => a.value[0] - b.value[0]);
      return { type: 'line', name, data, ...Looks.symbol(look), lineStyle: { color: look.colour, type: look.dash,
        width: 2 }, showAllSymbol: true, z: 4 };
    });
  }

  denseSeries({ point, place }) {
    const look = this.look(point);
    const { mean, sd } = point.value;
    const cost = point[this.cost.key];
    const data = cost === null ? [] : [{ point, place, value: [cost.mean, mean] }];
    return { type: 'line', name: point.curve, data, ...Looks.symbol(look), z: 2,
      markLine: Draw.lines([mean], { color: look.colour, type: look.dash, width: 2 }),
      markArea: sd ? { silent: true, itemStyle: { color: look.colour, opacity: 0.18 },
        data: [[{ yAxis: mean - sd }, { yAxis: mean + sd }]] } : undefined };
  }

  barSeries(measured) {
    /* Dense models have bands. */
    const spread = measured.filter(({ point }) => !point.is_dense && (point.value.sd || point[this.cost.key].sd));
    const ends = ({ mean, sd }) => [mean - (sd ?? 0), mean + (sd ?? 0)];
    return Draw.errorBars(spread.map(({ point }) => {
      const [x, y] = [point[this.cost.key], point.value];
      return [x.mean, y.mean, ...ends(x), ...ends(y)];
    }), spread.map(({ point }) => this.look(point).colour));
  }

  paperSeries(paper) {
    return paper.map((marker) => ({ type: 'scatter', name: marker.label, ...Looks.symbol(Looks.of(marker.method),
      true), z: 5,
      data: [{ marker, value: [marker.x[this.cost.key], marker.value] }] }));
  }

  rows() {
    const { metric } = this.comparison;
    const form = this.cost.isShare ? Shell.percent : Draw.short;
    const cells = ({ point }) => {
      const cost = point[this.cost.key];
      return [{ words: this.title(point) }, cost === null ? '-' : form(cost.mean), cost?.sd == null ? '-'
        : form(cost.sd),
        point.value.mean.toFixed(metric.decimals), point.value.sd === null ? '-'
          : point.value.sd.toFixed(metric.decimals), point.value.n];
    };
    const paper = this.paperShown().map((marker) => [{ words: marker.label }, form(marker.x[this.cost.key]), '-',
      marker.value.toFixed(metric.decimals), '-', '-']);
    return [`${metric.name} against ${this.cost.name}, of what is switched on`,
      [{ words: 'point' }, this.cost.name, 'its deviation', metric.name, 'its deviation', 'seeds'],
      [...this.shown().map(cells), ...paper]];
  }

  /* All numbers unrounded. */
  csv() {
    const header = Object.keys(this.comparison.csv[0] ?? {});
    return { header, rows: this.comparison.csv.map((row) => header.map((name) => row[name])) };
  }

  remove() {
    this.picture.remove();
  }
}
