'use strict';
/* How much of each layer is computed: at the end, over training, and how that follows from the weight eta. */

const pointTitle = (point) => (point.target === null ? point.name
  : `${point.name}, target ${Draw.short(100 * point.target)}%`);
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);

/* The mean over the seeds of a point, layer by layer. */
function layerMeans(point) {
  const measured = point.runs.map((run) => run.routing).filter(Boolean);
  const layers = Math.max(0, ...measured.map(({ active_fraction: shares }) => shares.length));
  return Array.from({ length: layers }, (_, layer) =>
    mean(measured.map(({ active_fraction: shares }) => shares[layer]).filter(Draw.isNumber)));
}

class LayerCurves {
  constructor(comparison) {
    const points = comparison.points.filter((point) => layerMeans(point).length);
    this.curves = [...Map.groupBy(points, (point) => point.curve)];
    this.isEmpty = !this.curves.length;
    if (this.isEmpty) return;
    this.chosen = this.curves.reduce((best, curve) => (curve[1].length > best[1].length ? curve : best));
    const choice = choiceOf('Method', this.curves.map((curve) => [curve[0], curve]), (curve) => {
      this.chosen = curve;
      this.picture.draw();
    });
    choice.select.value = String(this.curves.indexOf(this.chosen));
    this.picture = new Shell.Picture({
      label: 'Share of neurons computed by layer, a line for each sparsity target',
      caption: 'Each line is a model after training, mean over its seeds, and each symbol one of its layers, the ' +
        'first layer on the left: the lower it lies, the more of that layer is skipped.',
      options: () => this.options(),
      rows: () => this.rows(),
      height: () => 340,
    });
    this.box = Shell.element('div', { class: 'panel' }, Shell.element('h3', {}, 'At the end of training'),
      Shell.element('div', { class: 'controls' }, choice.box), this.picture.box);
  }

  label(point) {
    const labels = this.chosen[1]
      .map((each) => (each.target === null ? each.name : `target ${Draw.short(100 * each.target)}%`));
    return labels[this.chosen[1].indexOf(point)];
  }

  options() {
    const [name, points] = this.chosen;
    const look = points[0].is_dense ? Looks.dense(0) : Looks.of(name);
    const layers = Math.max(...points.map((point) => layerMeans(point).length));
    const dashes = ['solid', 'dashed', 'dotted', [9, 3, 2, 3]];
    return {
      grid: { left: 14, right: 84, top: 34, bottom: 46, containLabel: true },
      tooltip: Shell.tooltip(({ seriesName, value }) =>
        `${Draw.clip(seriesName)}\nlayer ${value[0]}: ${Shell.percent(value[1])} computed`),
      xAxis: Shell.axis({ type: 'value', min: 0, max: Math.max(layers - 1, 1), minInterval: 1,
        ...Draw.below('layer') }),
      yAxis: Draw.shareAxis('neurons computed'),
      series: points.map((point, place) => ({ type: 'line', name: pointTitle(point), ...Looks.symbol(look),
        symbolSize: 8, showAllSymbol: true,
        lineStyle: { color: look.colour, width: 2, type: dashes[place % dashes.length] },
        labelLayout: { hideOverlap: true },
        endLabel: { show: true, color: Shell.colour('ink'), formatter: Draw.clip(this.label(point), 12) },
        data: layerMeans(point).map((share, layer) => [layer, share]) })),
    };
  }

  rows() {
    const [name, points] = this.chosen;
    const means = points.map(layerMeans);
    const layers = Math.max(...means.map((each) => each.length));
    return [`Share of neurons computed by layer, ${name}`,
      ['layer', ...points.map((point) => ({ words: pointTitle(point) }))],
      Array.from({ length: layers }, (_, layer) =>
        [layer, ...means.map((each) => (Draw.isNumber(each[layer]) ? Shell.percent(each[layer]) : '-'))])];
  }

  remove() {
    this.picture?.remove();
  }
}

class LayerHistory {
  constructor(comparison) {
    const runs = comparison.points.flatMap((point) => point.runs.filter((run) => run.history)
      .map((run) => [`${pointTitle(point)}, seed ${run.seed}`, run]));
    this.isEmpty = !runs.length;
    if (this.isEmpty) return;
    [, this.run] = runs[0];
    const choice = choiceOf('Run', runs, (run) => {
      this.run = run;
      this.picture.draw();
    });
    this.picture = new Shell.Picture({
      label: 'Map of the share of neurons computed by training step and layer',
      caption: 'A column is a step of the training and a row is a layer, the first layer on top; the colour of a ' +
        'field tells how much of that layer was computed then.',
      options: (width) => this.options(width),
      rows: () => this.rows(),
      height: () => Math.max(180, 13 * this.run.history.active_fraction[0].length) + 120,
    });
    this.box = Shell.element('div', { class: 'panel' }, Shell.element('h3', {}, 'Over the training'),
      Shell.element('div', { class: 'controls' }, choice.box), this.picture.box);
  }

  steps() {
    const { step, stage } = this.run.history;
    return step.map((each, place) => (stage[place] === null ? String(each) : `${each} (stage ${stage[place]})`));
  }

  options(width) {
    const shares = this.run.history.active_fraction;
    const steps = this.steps();
    return {
      grid: { left: 14, right: 14, top: 44, bottom: 50, containLabel: true },
      tooltip: Shell.tooltip(({ value }) =>
        `step ${steps[value[0]]}\nlayer ${value[1]}: ${Shell.percent(value[2])} computed`),
      xAxis: Shell.axis({ type: 'category', data: steps, ...Draw.below('step') }),
      yAxis: Shell.axis({ type: 'category', inverse: true, data: shares[0].map((_, layer) => String(layer)),
        name: 'layer', nameLocation: 'start' }),
      visualMap: { type: 'continuous', min: 0, max: 1, dimension: 2, orient: 'horizontal', left: 60, top: 0,
        itemHeight: Math.min(width / 4, 120), itemWidth: 12,
        calculable: false, inRange: { color: Shell.ramp() }, text: ['100% computed', '0%'],
        textStyle: { color: Shell.colour('quiet') } },
      series: [{ type: 'heatmap', progressive: 0, emphasis: { disabled: true },
        data: shares.flatMap((layers, step) => layers.map((share, layer) => [step, layer, share])) }],
    };
  }

  rows() {
    const shares = this.run.history.active_fraction;
    const steps = this.steps();
    return ['Share of neurons computed by step and layer', ['step', ...shares[0].map((_, layer) => `layer ${layer}`)],
      shares.map((layers, place) => [steps[place], ...layers.map((share) => (Draw.isNumber(share) ? Shell.percent(share)
        : '-'))])];
  }

  remove() {
    this.picture?.remove();
  }
}

/* Sparsity against the weight of the efficiency loss. */
class EtaPlot {
  constructor(comparison, switches) {
    this.switches = switches;
    this.items = comparison.points.filter((point) => point.sparsity !== null)
      .map((point) => ({ point, eta: mean(point.runs.map((run) => run.eta).filter(Draw.isNumber)) }))
        .filter(({ eta }) => eta !== null);
    this.isEmpty = !this.items.length;
    if (this.isEmpty) return;
    this.picture = new Shell.Picture({
      label: 'FFN sparsity against eta, the weight of the loss that asks for fewer experts',
      caption: 'eta tells the training how much skipping is worth against quality: the further right, the harder ' +
        'it was asked to skip; the higher, the more neurons it ended up skipping.',
      options: () => this.options(),
      rows: () => this.rows(),
      height: () => 340,
    });
    switches.onChange(() => this.picture.draw());
    this.box = Shell.element('div', { class: 'panel' }, this.picture.box);
  }

  shown() {
    return this.items.filter(({ point }) => this.switches.isOn(point.curve));
  }

  options() {
    const shown = this.shown();
    if (!shown.length) return Draw.nothing('All methods with an eta are switched off');
    return {
      grid: { left: 14, right: 24, top: 34, bottom: 46, containLabel: true },
      tooltip: Shell.tooltip(({ data: { point, value: [eta, sparsity] } }) =>
        `${Draw.clip(pointTitle(point))}\neta ${Draw.short(eta)}\nFFN sparsity ${Shell.percent(sparsity)}`),
      xAxis: { ...Draw.valueAxis('', shown.map(({ eta }) => eta), { ratio: 100, fromZero: true }),
        ...Draw.below('eta') },
      yAxis: Draw.shareAxis('FFN sparsity'),
      series: [...Map.groupBy(shown, ({ point }) => point.curve)].map(([name, items]) => {
        const look = Looks.of(name);
        const data = items.map(({ point, eta }) => ({ point, value: [eta, point.sparsity.mean] }))
          .sort((a, b) => a.value[0] - b.value[0]);
        return { type: 'line', name, data, ...Looks.symbol(look), showAllSymbol: true, lineStyle: { color: look.colour,
          type: look.dash, width: 2 } };
      }),
    };
  }

  rows() {
    return ['FFN sparsity against eta', [{ words: 'point' }, 'eta', 'FFN sparsity'],
      this.shown().map(({ point, eta }) => [{ words: pointTitle(point) }, Draw.short(eta),
        Shell.percent(point.sparsity.mean)])];
  }

  remove() {
    this.picture?.remove();
  }
}
