'use strict';
/* One task: quality lost against a cost, what is pinned beside it, and variants in pictures of their own. */

const COSTS = {
  bytes: { text: 'Bytes read', fact: 'bytes read, of dense', name: 'share of the dense model’s bytes that is read',
    share: true, inverse: true },
  flops: { text: 'FLOPs', fact: 'FLOPs, of dense', name: 'share of the dense model’s FLOPs', share: true,
    inverse: true },
  sparsity: { text: 'FFN sparsity', fact: 'FFN sparsity', name: 'share of FFN neurons that is skipped', share: true },
  time: { text: 'Measured time', fact: 'measured time, of dense', share: true, inverse: true,
    name: 'decoding time over that of the dense model beside it' },
};
/* How far up the picture goes, in goals. */
const RANGES = [['around the goal', 3], ['wider', 12], ['everything', Infinity]];

const titleOf = (point) => (point.target === null || point.is_dense ? point.name
  : `${point.name}, target ${Charts.short(100 * point.target)}%`);
const methodName = (method) => (method === 'lte' ? 'LTE' : method.replaceAll('_', ' '));
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const spread = (point, form) => (point.value.sd === null ? '' : ` ± ${form(point.value.sd)}`);
const seeds = ({ value }) => `${value.n} ${value.n === 1 ? 'seed' : 'seeds'}`;

class Task {
  /* pins: the places of the points to begin with. */
  constructor(comparison, pins) {
    Object.assign(this, comparison);
    const { element } = Shell;
    const kept = Shell.state.get('pins')?.split(',') ?? pins;
    this.pins = kept.map((place) => this.points[Number(place || NaN)]).filter(Boolean);
    this.known = this.points.filter((point) => point.is_main && point.lost !== null);
    const costs = Object.entries(COSTS).filter(([key]) => this.known.some((point) => point.costs[key] !== null));
    this.panel = element('aside', { class: 'panel pins', 'aria-label': 'Pinned points', tabindex: '-1' });
    const chart = costs.length ? [element('div', { class: 'panel' }, ...this.makeChart(costs))] : [];
    this.table = this.points.length ? new SortableTable({ ...this.results, csv: this.csv, best: this.metric,
      colours: this.points.map(({ method }) => Shell.data.colours[method]),
      onChoose: (place) => this.pin(this.points[place]) }) : null;
    this.box = element('div', { class: this.chart && 'beside' }, ...chart, ...(this.points.length ? [this.panel] : []));
    this.fill();
  }

  /* The controls and the picture; costs: the entries of COSTS that were measured. */
  makeChart(costs) {
    const { element, choice } = Shell;
    const cost = choice('Cost', costs.map(([key, { text }]) => [text, key]), (key) => this.show({ cost: key }),
      { name: 'cost' });
    const sparse = this.known.filter((point) => !point.is_dense);
    const ours = sparse.filter(({ method }) => method === 'lte');
    const least = Math.min(...(ours.length ? ours : sparse).map(({ lost }) => lost));
    const range = choice('Range', RANGES, (goals) => this.show({ goals }), { name: 'range',
      chosen: RANGES.findIndex(([, goals]) => goals === Infinity || least <= goals * this.goal) });
    Object.assign(this, { cost: cost.value, goals: range.value });
    this.chart = Charts.linePicture({
      label: `Quality lost against cost, ${this.title}`, describe: (width) => this.describe(width),
      height: (width) => (width < 500 ? 400 : 470), onPick: ({ data }) => this.pin(this.points[data?.place]) });
    this.said = this.chart.box.querySelector('.caption');
    this.say();
    const zooms = element('span', { class: 'zooms', role: 'group', 'aria-label': 'Zoom' },
      ...[['Zoom in', 0.7], ['Zoom out', 1.4], ['Reset', 0]].map(([text, factor]) =>
        Shell.button(text, () => this.zoom(factor))));
    Shell.rove(zooms, 'button');
    return [element('div', { class: 'controls' }, cost.box, range.box, zooms), this.chart.box];
  }

  /* A value of the metric, as a text. */
  form = (value) => (Charts.isNumber(value) ? value.toFixed(this.metric.decimals) : '-');

  show(changes) {
    Object.assign(this, changes);
    this.say();
    this.chart.draw();
  }

  /* Keeps the middle; 0 shows everything again. */
  zoom(factor) {
    this.chart.chart.getOption().dataZoom.forEach(({ start, end }, dataZoomIndex) => {
      const [middle, half] = [(start + end) / 2, factor ? Math.min(((end - start) / 2) * factor, 50) : 50];
      const from = Math.min(Math.max((factor ? middle : 50) - half, 0), 100 - 2 * half);
      this.chart.chart.dispatchAction({ type: 'dataZoom', dataZoomIndex, start: from, end: from + 2 * half });
    });
  }

  /* A point as pictures have it. */
  item(point, x) {
    const { sd } = point.value;
    return { place: this.points.indexOf(point), title: titleOf(point), x, y: point.lost,
      pinned: this.pins.includes(point), low: point.lost - (sd ?? 0), high: point.lost + (sd ?? 0) };
  }

  lossAxis(points) {
    const name = `${this.metric.name} lost against dense, lower is better`;
    const losses = points.map(({ lost }) => lost);
    const top = this.goals * this.goal;
    if (!top || Math.max(...losses) <= top) return { name };
    const below = Math.max(Math.floor((3 * Math.min(0, ...losses)) / top), -2);
    return { name, min: below * (top / 3), max: top, interval: top / 3 };
  }

  describe(width) {
    const cost = COSTS[this.cost];
    const shown = this.known.filter((point) => point.costs[this.cost] !== null);
    const reference = this.points.find((point) => point.is_reference);
    const y = this.lossAxis(shown);
    const lines = [...Map.groupBy(shown, (point) => point.curve)].map(([name, points], place) => {
      const { method } = points[0];
      const strong = method === 'lte' || this.rivals.includes(method);
      const sign = cost.inverse ? -1 : 1;
      return { name, label: methodName(method), colour: strong ? Charts.colourOf(method) : Shell.colour('quiet'),
        pale: !strong, opacity: strong ? 1 : 0.45,
        width: method === 'lte' ? 4 : strong ? 2.5 : 1.5, size: method === 'lte' ? 13 : strong ? 10 : 6,
          symbol: Charts.look(method === 'lte' ? 0 : place + 1).symbol,
        hidden: !strong && width < 560, points: points.map((point) => this.item(point, point.costs[this.cost]))
          .sort((a, b) => sign * (a.x - b.x)) };
    });
    const front = this.fronts[this.cost].map((place) => this.points[place])
      .filter((point) => point.costs[this.cost] !== null);
    const least = Math.min(1, ...shown.map((point) => point.costs[this.cost]));
    const step = width < 560 ? 0.2 : cost.inverse ? 0.05 : 0.1;
    return {
      x: { ...cost, min: cost.inverse ? Math.max(Math.floor((least - 0.01) / step) * step, 0) : 0,
        max: Math.max(cost.inverse ? 1.02 : 1, ...shown.map((point) => point.costs[this.cost] + 0.02)), interval: step,
          label: (value) => (value > 1.01 ? '' : Charts.share(value, 0)) },
      y, tell: (data) => this.tell(data),
      marks: [{ yAxis: this.goal, label: `goal: at most ${this.goal}` }],
      lines: [
        { name: 'dense', colour: Shell.colour('dense'), level: 0, dash: 'dashed', hidden: true, symbol: 'rect',
          band: reference.value.sd && [-reference.value.sd, reference.value.sd],
          points: [{ ...this.item(reference, reference.costs[this.cost] ?? (cost.inverse ? 1 : 0)), low: 0,
            high: 0 }] },
        { name: 'Pareto front', colour: Shell.colour('ink'), width: 9, opacity: 0.16, size: 0, hidden: true,
          silent: true,
          points: front.map((point) => ({ x: point.costs[this.cost], y: point.lost })) },
        ...lines, ...this.paperLines()],
    };
  }

  /* The paper's numbers share one hollow symbol. */
  paperLines() {
    const found = this.paper.filter(({ costs }) => Charts.isNumber(costs[this.cost]));
    return found.length ? [{ name: 'the paper', colour: Shell.colour('ink'), scatter: true, symbol: 'diamond', size: 13,
      points: found.map(({ label, costs, lost }) =>
        ({ x: costs[this.cost], y: lost, hollow: true, title: label, paper: true })) }] : [];
  }

  tell({ place, title, x, y, paper, beyond, name }) {
    const point = this.points[place];
    const lost = `${this.form(point?.lost ?? y)} ${this.metric.name} lost`;
    if (paper) return `${title}\n${lost}\nof other models and settings`;
    const cost = name ? `${Charts.share(point.costs.bytes)} of the bytes`
      : `${Charts.share(x)} of the ${COSTS[this.cost].text.toLowerCase()}`;
    return [Charts.clip(title), `${lost}${spread(point, this.form)} (${seeds(point)})`, cost,
      ...(beyond ? ['beyond this range'] : []), 'Enter or click pins it'].join('\n');
  }

  say() {
    const of = (test) => [...new Set(this.known.filter((point) => !point.is_dense && test(point))
      .map(({ method }) => method))];
    const there = of((point) => point.costs[this.cost] !== null);
    const missing = of(() => true).filter((method) => !there.includes(method))
      .map((method) => Charts.clip(methodName(method), 30));
    const why = this.cost === 'sparsity' ? 'skips no whole neurons or was not measured' : 'was not measured';
    this.said.textContent = [
      'The further down, the less quality is lost; the further right, the less a token costs.',
      'The wide grey line is the Pareto front: no other method is better in both.',
      'Bars are one standard deviation over seeds, the dashed line is the dense reference, an arrow at the edge a loss',
      'beyond the range. Drag moves, Ctrl and the wheel zoom.',
      ...(missing.length ? [`Not on this axis, since it ${why}: ${missing.join(', ')}.`] : []),
      ...(this.paperLines().length ? ['Hollow diamonds are the paper’s numbers, of other models and settings.'] : []),
    ].join(' ');
  }

  /* A picture for each folder that holds other settings of a method than its main curve. */
  variants() {
    const points = this.points.filter((point) => !point.is_main && !point.is_dense && point.lost !== null);
    const groups = [...Map.groupBy(points, (point) => point.group)];
    const main = this.known.filter((point) => point.method === 'lte');
    const nameOf = (point) => [point.name, ...(point.target === null ? [] : [Charts.share(point.target)]), '·',
      Charts.share(point.costs.bytes, 0), 'of bytes'].join(' ');
    const boxes = groups.map(([group, found]) => {
      const targets = new Set(found.filter(({ method }) => method === 'lte').map((point) => point.target));
      const shown = [...main.filter((point) => targets.has(point.target)), ...found];
      const picture = Charts.linePicture({ label: `Variants in ${group || 'these files'}`,
        height: () => 80 + 24 * shown.length, onPick: ({ data }) => this.pin(this.points[data?.place]),
        describe: () => ({ x: { name: `${this.metric.name} lost against dense` }, y: { names: shown.map(nameOf) },
          marks: [{ xAxis: 0 }, { xAxis: this.goal }], tell: (data) => this.tell(data),
          lines: [{ name: 'settings', hidden: true, scatter: true, points: shown.map((point, row) =>
            ({ ...this.item(point, point.lost), y: row, name: nameOf(point), colour: Charts.colourOf(point.method) })),
          }] }) });
      return Shell.element('div', { class: 'panel' }, Shell.element('h3', {}, group || 'Variants'), picture.box);
    });
    return boxes.length ? [Shell.element('p', { class: 'caption' },
      'Other settings of a method than that of its curve above, by the folder ' +
      'of their files: quality lost against dense, and the share of its bytes. Dashed lines are dense and the goal.'),
    Shell.element('div', { class: 'columns two' }, ...boxes)] : [];
  }

  /* Of three pins the first goes; a pinned point is unpinned. */
  pin(point) {
    if (!point) return;
    this.pins = this.pins.includes(point) ? this.pins.filter((each) => each !== point)
      : [...this.pins, point].slice(-2);
    Shell.state.set({ pins: this.pins.map((each) => this.points.indexOf(each)).join(',') || 'none' });
    this.fill();
    Shell.redraw();
  }

  fill() {
    const { element } = Shell;
    const facts = [['quality lost', (point) => `${this.form(point.lost)}${spread(point, this.form)}`],
      [this.metric.name, (point) => this.form(point.value.mean)],
      ...Object.entries(COSTS).map(([key, { fact }]) => [fact, (point) => Charts.share(point.costs[key])]),
      ['target', (point) => Charts.share(point.target)], ['seeds', (point) => point.value.n]];
    const heads = this.pins.map((point, place) => element('div', { class: 'pin' },
      element('strong', {}, `${place ? 'B' : 'A'}: ${titleOf(point)}`), Shell.button('Unpin', () => {
        this.pin(point);
        this.panel.focus();
      }, `Unpin ${titleOf(point)}`)));
    const rows = facts.map(([name, value]) => [name, ...this.pins.map(value)])
      .filter(([, ...found]) => found.some((value) => value !== '-'));
    this.panel.replaceChildren(element('h3', {}, this.pins.length === 2 ? 'Two points compared' : 'The pinned point'),
      ...(this.pins.length ? [...heads, Shell.table('', [{ words: 'fact' },
        ...this.pins.map((_, place) => (place ? 'B' : 'A'))], rows)] : []),
      ...(this.pins.length < 2 ? [element('p', { class: 'quiet' },
        this.pins.length ? 'Pin a second point to see how their settings differ.'
        : 'Choose a point, with the mouse or with arrow keys and Enter, or a name in the table of all results.')]
          : [this.difference()]),
      ...this.pins.map((point, place) => this.runs(point, place)));
  }

  /* The settings of the first runs that are not the same. */
  difference() {
    const [one, other] = this.pins.map(({ settings }) => settings);
    const rows = Object.keys({ ...one, ...other }).filter((name) => one[name] !== other[name])
      .map((name) => [name, { words: one[name] ?? '-' }, { words: other[name] ?? '-' }]);
    return Shell.scrollBox('Settings that differ', rows.length
      ? Shell.table('Settings that differ', [{ words: 'setting' }, { words: 'A' }, { words: 'B' }], rows)
      : Shell.element('p', { class: 'quiet' }, 'Their settings are the same.'));
  }

  runs(point, place) {
    const { element } = Shell;
    const facts = { command: 'Command', source: 'File', hardware: 'Hardware', git_commit: 'Commit',
      versions: 'Versions', tokens_trained: 'Tokens trained', wall_time_s: 'Seconds', method_config: 'Method',
      config: 'Config' };
    const text = (value) => (value !== null && typeof value === 'object' ? JSON.stringify(value, null, 1)
      : String(value ?? 'not in the record'));
    return element('details', { class: 'runs' }, element('summary', {}, `Runs of ${place ? 'B' : 'A'}`),
      ...point.runs.flatMap((run) => [
      element('h4', {}, `Seed ${run.seed}: ${this.metric.name} ${this.form(run.value)}`),
      element('dl', { class: 'run-facts' }, ...Object.entries(facts).flatMap(([key, name]) => [element('dt', {}, name),
        element('dd', {}, text(run[key]))]))]));
  }
}
